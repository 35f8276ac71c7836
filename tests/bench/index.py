#!/usr/bin/env python
"""The index beside exact numpy and FAISS HNSW32: recall, latency, build time, size, and what happens under writes.

    python tests/bench/index.py                                       # 100,000 x 512
    python tests/bench/index.py --rows 1000000 --queries 200 --no-faiss
    python tests/bench/index.py --sizes 10000,100000,1000000          # how the time of a search grows
    python tests/bench/index.py --rows 30000 --dimension 128          # a try

All three answer the same queries, which are not in the index, one at a time, interleaved, in the same process. FAISS
takes part if it is installed (`pip install vladva[bench]`). The last line is one JSON object. Goals: recall_at_10 >=
0.98, p50_vs_exact <= 0.3 (0.1 at a million rows), index_bytes_ratio <= 0.34, upserts_seen 1000, rows_lost 0,
pinned_undisturbed true.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Threads that wait for work in a loop would take the cores from whoever searches next.
os.environ |= {"OMP_WAIT_POLICY": "passive", "OPENBLAS_THREAD_TIMEOUT": "4"}
os.environ.setdefault("LANCE_LOG", "error")

import numpy as np
import pyarrow as pa

from vladva.core.hashing import digest
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.index.build import build_index
from vladva.index.vector_index import open_index

K = 10
WARM_UP = 20  # queries that are not counted
UPSERTS = 1000
MODEL = {"fingerprint": "benchmarkbenchma"}

Search = Callable[[np.ndarray], list[int]]


def embeddings(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Unit vectors [rows, dimension], clustered as embeddings of images and captions are.

    They lie in a cone (two at random have a cosine of about 0.4), in topics that differ in size (Zipf) and in width and
    that overlap; the variance falls with the direction by a power law (15 of 512 carry most of it), and within a topic
    as well, so that the 10th of 100,000 neighbours has a cosine of about 0.9 and local dimension is about 14.
    """
    shape = np.random.default_rng(12345)  # of the space; the same for rows and queries
    topics = 2000
    basis = np.linalg.qr(shape.normal(size=(dimension, dimension)))[0]
    scale = np.arange(1, dimension + 1) ** -0.6
    scale /= np.linalg.norm(scale)
    cone = shape.normal(size=dimension) / np.sqrt(dimension)
    centres = 1.2 * shape.normal(size=(topics, dimension)) * scale
    widths = 0.6 * np.exp(0.3 * shape.normal(size=topics))
    sizes = 1 / np.arange(1, topics + 1) ** 0.7
    random = np.random.default_rng(seed)
    vectors_ND = np.empty((rows, dimension), np.float32)
    for block in np.array_split(vectors_ND, max(1, rows // 10_000)):
        chosen = random.choice(topics, len(block), p=sizes / sizes.sum())
        within = widths[chosen, None] * random.normal(size=block.shape) * scale
        points = cone + (centres[chosen] + within) @ basis
        block[:] = points / np.linalg.norm(points, axis=1, keepdims=True)
    return vectors_ND


def items_of(first: int, count: int) -> pa.Table:
    """Items with the ids `first`, `first + 1`, ..."""
    ids = [str(number) for number in range(first, first + count)]
    contents = pa.array([digest(one) for one in ids], pa.binary(16))
    captions = [f"the caption of image {one}" for one in ids]
    return pa.table({"id": ids, "kind": ["image"] * count, "content": contents, "caption": captions})


def write_table(uri: str, vectors_ND: np.ndarray, model: dict[str, Any]) -> None:
    """A complete embeddings table, as the embedding job leaves it."""
    table = TableWriter(uri, model, "")
    for first in range(0, len(vectors_ND), 10_000):
        block_ND = vectors_ND[first : first + 10_000]
        write_part(uri, items_of(first, len(block_ND)), block_ND, model)
    table.commit()


def exact_search(vectors_ND: np.ndarray) -> Search:
    """Every row compared, float32."""

    def search(query_D: np.ndarray) -> list[int]:
        scores = vectors_ND @ query_D
        best = np.argpartition(-scores, K)[:K]
        return best[np.argsort(-scores[best])].tolist()

    return search


def faiss_search(vectors_ND: np.ndarray) -> tuple[Search, float, int]:
    """FAISS HNSW with 32 links, as its users build it; seconds to build and bytes beside the vectors."""
    import faiss

    began = time.perf_counter()
    index = faiss.IndexHNSWFlat(vectors_ND.shape[1], 32, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efConstruction, index.hnsw.efSearch = 200, 128
    index.add(vectors_ND)
    seconds = time.perf_counter() - began
    size = len(faiss.serialize_index(index)) - vectors_ND.nbytes
    return lambda query_D: index.search(query_D[None], K)[1][0].tolist(), seconds, size


def race(searches: dict[str, Search], queries_QD: np.ndarray) -> dict[str, dict[str, float]]:
    """Recall@10 against the first of the searches, and latency in milliseconds, of each."""
    times: dict[str, list[float]] = {name: [] for name in searches}
    found = dict.fromkeys(searches, 0)
    for number, query_D in enumerate(queries_QD):
        answers = {}
        for name, search in searches.items():
            began = time.perf_counter()
            answers[name] = search(query_D)
            times[name].append(1e3 * (time.perf_counter() - began))
        if number >= WARM_UP:
            right = set(next(iter(answers.values())))
            for name, answer in answers.items():
                found[name] += len(right & set(answer))
    expected = K * (len(queries_QD) - WARM_UP)
    return {
        name: {
            "recall_at_10": found[name] / expected,
            "p50_ms": float(np.percentile(times[name][WARM_UP:], 50)),
            "p99_ms": float(np.percentile(times[name][WARM_UP:], 99)),
        }
        for name in searches
    }


def under_writes(uri: str, tag: str, new_ND: np.ndarray, query_D: np.ndarray, model: dict[str, Any]) -> dict[str, Any]:
    """Upserts are seen by the next search, two processes that write lose nothing, a pinned reader sees no change."""
    pinned = open_index(uri, version=tag)
    before = [hit.id for hit in pinned.search(query_D, K)]
    rows = pinned.num_rows
    new = rows_to_upsert(new_ND, rows, model)
    index = open_index(uri)
    began = time.perf_counter()
    index.upsert(new.slice(0, UPSERTS))
    seconds = time.perf_counter() - began
    seen = sum(index.search(vector_D, 1)[0].id == str(rows + i) for i, vector_D in enumerate(new_ND[:UPSERTS]))
    halves = [new.slice(UPSERTS, UPSERTS // 2), new.slice(UPSERTS * 3 // 2, UPSERTS // 2)]
    spawn = multiprocessing.get_context("spawn")
    writers = [spawn.Process(target=write, args=(uri, half)) for half in halves]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    index.refresh()
    undisturbed = pinned.num_rows == rows and [hit.id for hit in pinned.search(query_D, K)] == before
    return {
        "upsert_s": seconds,
        "upserts_seen": seen,
        "rows_lost": rows + 2 * UPSERTS - index.num_rows,
        "pinned_undisturbed": undisturbed,
    }


def write(uri: str, rows: pa.Table) -> None:
    """Upsert fifty rows at a time."""
    index = open_index(uri)
    for first in range(0, len(rows), 50):
        index.upsert(rows.slice(first, 50))


def rows_to_upsert(vectors_ND: np.ndarray, first: int, model: dict[str, Any]) -> pa.Table:
    """An embeddings table in memory."""
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
    rows = items_of(first, len(vectors_ND)).drop_columns(["content"]).append_column("embedding", embedding)
    return rows.replace_schema_metadata({"vladva": json.dumps(model)})


def measure(rows: int, queries: int, args: argparse.Namespace) -> dict[str, Any]:
    """Everything, for one number of rows."""
    model = MODEL | {"dimension": args.dimension}
    vectors_ND = embeddings(rows, args.dimension, seed=1)
    queries_QD = embeddings(queries + WARM_UP, args.dimension, seed=2)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table, uri = str(Path(folder, "table")), str(Path(folder, "index"))
        write_table(table, vectors_ND, model)
        summary = build_index(table, uri, index_type=args.type, tag="built")
        print(f"built: {summary}", flush=True)
        index = open_index(uri, version="built")
        index.warm()
        searches: dict[str, Search] = {
            "exact": exact_search(vectors_ND),
            # As everybody searches: hits with their columns.
            "ours": lambda query_D: [int(hit.id) for hit in index.search(query_D, K)],
        }
        extra: dict[str, Any] = {}
        if not args.no_faiss and importlib.util.find_spec("faiss"):
            searches["faiss"], extra["faiss_build_s"], size = faiss_search(vectors_ND)
            extra["faiss_bytes_ratio"] = size / vectors_ND.nbytes
        load = os.getloadavg()[0]
        measured = race(searches, queries_QD)
        for name, figures in measured.items():
            print(name.ljust(6), "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
        new_ND = embeddings(2 * UPSERTS, args.dimension, seed=3)
        writes = under_writes(uri, "built", new_ND, queries_QD[0], model)
    for name in ("exact", "faiss"):
        extra |= {f"{name}_{key}": value for key, value in measured.get(name, {}).items()}
    return {
        "rows": rows,
        "dimension": args.dimension,
        "index_type": summary.settings.index_type,
        "nprobes": f"{summary.settings.nprobes} of {summary.settings.partitions}",
        **measured["ours"],
        "p50_vs_exact": measured["ours"]["p50_ms"] / measured["exact"]["p50_ms"],
        "measured_at_build": summary.settings.recall_at_10,
        "build_s": summary.seconds,
        "index_bytes_ratio": summary.index_bytes / vectors_ND.nbytes,
        **extra,
        **writes,
        "load_average": load,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--sizes", help="several numbers of rows, commas between")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--type", default="IVF_SQ", choices=("exact", "IVF_SQ", "IVF_HNSW_SQ", "IVF_PQ"))
    parser.add_argument("--no-faiss", action="store_true")
    parser.add_argument("--folder", help="where to write; by default a temporary folder")
    args = parser.parse_args()

    sizes = [int(size) for size in args.sizes.split(",")] if args.sizes else [args.rows]
    results = []
    for rows in sizes:
        results.append(rounded(measure(rows, args.queries, args)))
        if args.sizes:
            print(json.dumps(results[-1]), flush=True)
    if not args.sizes:
        print(json.dumps(results[0]))
        return
    first, last = results[0], results[-1]
    # 1 would be linear.
    exponent = math.log(last["p50_ms"] / first["p50_ms"]) / math.log(last["rows"] / first["rows"])
    names = ("rows", "p50_ms", "exact_p50_ms", "p50_vs_exact", "recall_at_10")
    growth = {name: [one[name] for one in results] for name in names}
    print(json.dumps(rounded(growth | {"growth_exponent": exponent})))


def rounded(figures: dict[str, Any]) -> dict[str, Any]:
    """Four digits after the point."""
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}


if __name__ == "__main__":
    main()
