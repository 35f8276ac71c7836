#!/usr/bin/env python
"""The index in memory beside numpy, FAISS's other kinds and usearch: same rows and centroids, same recall.

    pip install usearch
    tests/bench/index_libraries.py                             # 100,000 x 512
    tests/bench/index_libraries.py --rows 20000 --dimension 128    # a try

Ours is `MemoryIndex`: FAISS's inverted lists of a byte a number, with the centroids that Lance's k-means makes, and the
candidates compared again by their full vectors. FAISS IVF-Flat gets the same centroids; `numpy` multiplies all rows
with the query; HNSW of FAISS and of usearch get 32 links and 200 candidates while they are built. Each then looks at
the least (partitions, or candidates of a graph) with which 98% of the exact ten neighbours are found, of queries that
are not timed. The others are timed one at a time, interleaved, in one process, with one thread, as a replica's threads
search beside one another; every search ends with hits and their columns. usearch is left out, by name, where it is not
installed.

The last line is JSON: for each its recall@10, effort, p50 and p99 in ms, seconds to build, bytes a row, and
`p50_ratio`, its p50 over ours: below 1 it is faster than ours.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
os.environ.setdefault("LANCE_LOG", "error")
PROJECT = Path(__file__).parents[2]
sys.path[:0] = [str(PROJECT), str(PROJECT / "platform")]  # also from an environment that has the libraries only

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402

from tests.bench.index import WARM_UP, K, embeddings, exact_search, items_of  # noqa: E402
from vladva.index.ivf import VECTORS, centroids, partition  # noqa: E402
from vladva.index.memory_index import Effort, MemoryIndex  # noqa: E402
from vladva.index.store import Hit, to_hit  # noqa: E402

RECALL = 0.98
LINKS, CANDIDATES_AT_BUILD, REFINED = 32, 200, 3
GRAPH_EFFORTS = (16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)


@dataclass(frozen=True)
class Contender:
    """One way to search: `search(query, effort)` gives hits; efforts from the least to the most."""

    search: Callable[[np.ndarray, int], list[Hit]]
    efforts: tuple[int, ...]
    build_s: float
    index_bytes: int  # vectors included


def ours(vectors_ND: np.ndarray) -> tuple[Contender, np.ndarray]:
    """The index as a replica has it in memory, and its centroids."""
    import lance
    from faiss import serialize_index

    began = time.perf_counter()
    rows = items_of(0, len(vectors_ND)).drop_columns(["content"])
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
    with tempfile.TemporaryDirectory() as folder:
        dataset = lance.write_dataset(rows.append_column("embedding", embedding), folder)
        partition(dataset, "IVF_SQ", workers=1)
        centroids_PD = centroids(dataset)
        index = MemoryIndex.of(dataset, centroids_PD)
        size = dataset.stats.index_stats(VECTORS)["num_indexed_rows"]
    assert size == len(vectors_ND)
    efforts = tuple(range(1, len(centroids_PD) + 1))
    seconds = time.perf_counter() - began
    search = lambda query_D, effort: index.nearest(query_D, K, Effort(effort, REFINED), None)  # noqa: E731
    assert index.lists is not None
    return Contender(search, efforts, seconds, index.matrix_ND.nbytes + len(serialize_index(index.lists))), centroids_PD


def compare_all(vectors_ND: np.ndarray, carried: pa.Table) -> Contender:
    """Every row, by numpy."""

    def found(query_D: np.ndarray, effort: int) -> tuple[np.ndarray, np.ndarray]:
        scores = np.vecdot(vectors_ND, query_D)
        best = np.argpartition(-scores, K)[:K]
        best = best[np.argsort(-scores[best])]
        return scores[best], best

    return Contender(with_columns(found, carried), (1,), 0.0, vectors_ND.nbytes)


def with_columns(found: Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]], carried: pa.Table) -> Any:
    """A search that gives hits, of one that gives scores and row numbers."""

    def search(query_D: np.ndarray, effort: int) -> list[Hit]:
        scores, rows = found(query_D, effort)
        columns = carried.take(rows).to_pylist()
        return [to_hit(row, float(score)) for row, score in zip(columns, scores, strict=True)]

    return search


def faiss_flat(vectors_ND: np.ndarray, centroids_PD: np.ndarray, carried: pa.Table) -> Contender:
    """FAISS's inverted lists of full vectors."""
    import faiss

    began = time.perf_counter()
    nearest_centroid = faiss.IndexFlatL2(vectors_ND.shape[1])
    nearest_centroid.add(centroids_PD)
    lists = faiss.IndexIVFFlat(nearest_centroid, vectors_ND.shape[1], len(centroids_PD), faiss.METRIC_INNER_PRODUCT)
    lists.train(vectors_ND)
    assert np.array_equal(nearest_centroid.reconstruct_n(0, len(centroids_PD)), centroids_PD)  # and not its own
    lists.add(vectors_ND)

    def found(query_D: np.ndarray, effort: int) -> tuple[np.ndarray, np.ndarray]:
        lists.nprobe = effort
        scores, rows = lists.search(query_D[None], K)
        return scores[0], rows[0]

    efforts = tuple(range(1, len(centroids_PD) + 1))
    return Contender(
        with_columns(found, carried), efforts, time.perf_counter() - began, len(faiss.serialize_index(lists))
    )


def faiss_hnsw(vectors_ND: np.ndarray, carried: pa.Table) -> Contender:
    """FAISS's graph over full vectors."""
    import faiss

    faiss.omp_set_num_threads(os.cpu_count() or 1)  # to build; searches have one
    began = time.perf_counter()
    index = faiss.IndexHNSWFlat(vectors_ND.shape[1], LINKS, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction = CANDIDATES_AT_BUILD
    index.add(vectors_ND)
    seconds = time.perf_counter() - began
    faiss.omp_set_num_threads(1)

    def found(query_D: np.ndarray, effort: int) -> tuple[np.ndarray, np.ndarray]:
        index.hnsw.efSearch = effort
        scores, rows = index.search(query_D[None], K)
        return scores[0], rows[0]

    return Contender(with_columns(found, carried), GRAPH_EFFORTS, seconds, len(faiss.serialize_index(index)))


def usearch_hnsw(vectors_ND: np.ndarray, carried: pa.Table) -> Contender:
    """usearch's graph over full vectors."""
    from usearch.index import Index

    began = time.perf_counter()
    options = {"connectivity": LINKS, "expansion_add": CANDIDATES_AT_BUILD}
    index = Index(ndim=vectors_ND.shape[1], metric="ip", dtype="f32", **options)
    index.add(np.arange(len(vectors_ND)), vectors_ND, threads=os.cpu_count() or 1)
    seconds = time.perf_counter() - began

    def found(query_D: np.ndarray, effort: int) -> tuple[np.ndarray, np.ndarray]:
        index.expansion_search = effort
        matches = index.search(query_D, K, threads=1)
        return 1 - matches.distances, matches.keys.astype(np.int64)

    return Contender(with_columns(found, carried), GRAPH_EFFORTS, seconds, index.serialized_length)


def recall(contender: Contender, effort: int, queries_QD: np.ndarray, right: list[set[int]]) -> float:
    """The share of the exact neighbours that are found."""
    found = [
        len(exact & {int(hit.id) for hit in contender.search(query_D, effort)})
        for query_D, exact in zip(queries_QD, right, strict=True)
    ]
    return sum(found) / (K * len(found))


def least_effort(contender: Contender, queries_QD: np.ndarray, right: list[set[int]]) -> int:
    """The least effort with which enough is found; the most where no effort is enough."""
    low, high = 0, len(contender.efforts) - 1
    while low < high:
        middle = (low + high) // 2
        if recall(contender, contender.efforts[middle], queries_QD, right) >= RECALL:
            high = middle
        else:
            low = middle + 1
    return contender.efforts[low]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200, help="timed; as many more set the efforts")
    options = parser.parse_args()

    vectors_ND = embeddings(options.rows, options.dimension, seed=1)
    queries_QD = embeddings(2 * options.queries, options.dimension, seed=2)
    exact = exact_search(vectors_ND)
    right = [set(exact(query_D)) for query_D in queries_QD]
    carried = items_of(0, options.rows).drop_columns(["content"])
    mine, centroids_PD = ours(vectors_ND)
    contenders = {"ours": mine}
    contenders["numpy"] = compare_all(vectors_ND, carried)
    contenders["faiss IVF-Flat"] = faiss_flat(vectors_ND, centroids_PD, carried)
    contenders["faiss HNSW"] = faiss_hnsw(vectors_ND, carried)
    left_out = [name for name in ("usearch",) if importlib.util.find_spec(name) is None]
    if "usearch" not in left_out:
        contenders["usearch HNSW"] = usearch_hnsw(vectors_ND, carried)

    for name, one in contenders.items():
        print(f"{name:<15} built in {one.build_s:.1f} s", flush=True)
    half = options.queries
    efforts = {name: least_effort(one, queries_QD[:half], right[:half]) for name, one in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for query_D in queries_QD[half:]:
        for name, one in contenders.items():
            began = time.perf_counter()
            one.search(query_D, efforts[name])
            times[name].append(1e3 * (time.perf_counter() - began))
    found: dict[str, dict[str, float]] = {}
    for name, one in contenders.items():
        p50, p99 = np.percentile(times[name][WARM_UP:], (50, 99))
        found[name] = {
            "recall_at_10": recall(one, efforts[name], queries_QD[half:], right[half:]),
            "effort": efforts[name],
            "p50_ms": p50,
            "p50_ratio": p50 / found["ours"]["p50_ms"] if found else 1.0,
            "p99_ms": p99,
            "build_s": one.build_s,
            "bytes_per_row": one.index_bytes / options.rows,
        }
        found[name] = {key: round(float(value), 4) for key, value in found[name].items()}
        print(f"{name:<15}", "  ".join(f"{key} {value:,g}" for key, value in found[name].items()), flush=True)
    if left_out:
        print(f"left out, not installed: {', '.join(left_out)}")
    size = {"rows": options.rows, "dimension": options.dimension, "partitions": len(centroids_PD)}
    print(json.dumps(size | {"contenders": found, "left_out": left_out, "load_average": os.getloadavg()[0]}))


if __name__ == "__main__":
    main()
