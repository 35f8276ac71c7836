#!/usr/bin/env python
"""The index beside exact numpy and FAISS HNSW32: recall, latency, build time, size, and what happens under writes.

    python tests/bench/index.py                                   # 100,000 x 512, a few minutes
    python tests/bench/index.py --rows 1000000 --no-faiss          # how the cost grows
    python tests/bench/index.py --rows 30000 --dimension 128       # a try

All three answer the same queries one at a time, interleaved, in the same process. FAISS takes part if `faiss-cpu` is
installed. The last line is one JSON object. Goals: recall_at_10 >= 0.98, p50_vs_exact <= 0.3 (0.1 at a million rows),
index_bytes_ratio <= 0.34.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from vladva.index import VectorIndex, build_index, open_index
from vladva.parts import TableInProgress, write_part
from vladva.tables import digest

K = 10
WARM_UP = 20  # queries that are not counted
WRITERS, UPSERTS = 4, 1000
MODEL = {"fingerprint": "benchmarkbenchma"}

Search = Callable[[np.ndarray], list[int]]


def embeddings(rows: int, dimension: int, seed: int) -> Iterator[np.ndarray]:
    """Unit vectors [n, dimension] in blocks, clustered as embeddings of pictures and captions are.

    All share a direction (such embeddings lie in a cone), there are topics within themes, topics differ in size (Zipf),
    and what differs within a topic has a few dozen dimensions.
    """
    shape = np.random.default_rng(12345)  # of the space; the same for rows and queries
    topics, latent = 2000, 48
    cone = shape.normal(size=dimension)
    themes = shape.normal(size=(60, dimension))
    centres = themes[shape.integers(0, 60, topics)] + 0.7 * shape.normal(size=(topics, dimension))
    spread = shape.normal(size=(latent, dimension)) / np.sqrt(latent)
    sizes = 1 / np.arange(1, topics + 1) ** 0.7
    random = np.random.default_rng(seed)
    for first in range(0, rows, 10_000):
        count = min(10_000, rows - first)
        chosen = random.choice(topics, count, p=sizes / sizes.sum())
        vectors_ND = cone + centres[chosen] + 0.9 * random.normal(size=(count, latent)) @ spread
        vectors_ND += 0.2 * random.normal(size=(count, dimension))
        yield (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


def items_of(first: int, count: int) -> pa.Table:
    """Items with the ids `first`, `first + 1`, ..."""
    ids = [str(number) for number in range(first, first + count)]
    contents = pa.array([digest(one) for one in ids], pa.binary(16))
    captions = [f"the caption of picture {one}" for one in ids]
    return pa.table({"id": ids, "kind": ["image"] * count, "content": contents, "caption": captions})


def write_table(uri: str, vectors_ND: np.ndarray, model: dict[str, Any]) -> None:
    """A complete embeddings table, as the embedding job leaves it."""
    table = TableInProgress(uri, model, "")
    for first in range(0, len(vectors_ND), 10_000):
        block_ND = vectors_ND[first : first + 10_000]
        write_part(uri, items_of(first, len(block_ND)), block_ND, model)
    table.commit([])


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
    """Upserts are seen by the next search, writers at the same time lose nothing, a pinned reader sees no change."""
    pinned = open_index(uri, version=tag)
    before = [hit.id for hit in pinned.search(query_D, K)]
    rows = pinned.num_rows
    new = rows_to_upsert(new_ND, rows, model)
    index = open_index(uri)
    began = time.perf_counter()
    index.upsert(new.slice(0, UPSERTS))
    seconds = time.perf_counter() - began
    seen = sum(index.search(vector_D, 1)[0].id == str(rows + i) for i, vector_D in enumerate(new_ND[:UPSERTS]))

    def write(worker: int) -> None:
        for part in range(5):
            first = UPSERTS + (worker * 5 + part) * 50
            open_index(uri).upsert(new.slice(first, 50))

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(write, range(WRITERS)))
    lost = rows + UPSERTS + WRITERS * 250 - open_index(uri).num_rows
    undisturbed = pinned.num_rows == rows and [hit.id for hit in pinned.search(query_D, K)] == before
    return {"upsert_s": seconds, "upserts_seen": seen, "rows_lost": lost, "pinned_undisturbed": undisturbed}


def rows_to_upsert(vectors_ND: np.ndarray, first: int, model: dict[str, Any]) -> pa.Table:
    """An embeddings table in memory."""
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.ravel()), vectors_ND.shape[1])
    rows = items_of(first, len(vectors_ND)).drop_columns(["content"]).append_column("embedding", embedding)
    return rows.replace_schema_metadata({"vladva": json.dumps(model)})


def ours(index: VectorIndex) -> Search:
    """The index as everybody searches it: hits with their columns."""
    return lambda query_D: [int(hit.id) for hit in index.search(query_D, K)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--queries", type=int, default=500)
    parser.add_argument("--type", default="IVF_SQ", choices=("exact", "IVF_SQ", "IVF_HNSW_SQ", "IVF_PQ"))
    parser.add_argument("--no-faiss", action="store_true")
    args = parser.parse_args()

    model = MODEL | {"dimension": args.dimension}
    vectors_ND = np.concatenate(list(embeddings(args.rows, args.dimension, seed=1)))
    queries_QD = np.concatenate(list(embeddings(args.queries + WARM_UP, args.dimension, seed=2)))
    new_ND = np.concatenate(list(embeddings(UPSERTS + WRITERS * 250, args.dimension, seed=3)))
    with tempfile.TemporaryDirectory() as folder:
        table, uri = str(Path(folder, "table")), str(Path(folder, "index"))
        write_table(table, vectors_ND, model)
        summary = build_index(table, uri, index_type=args.type, tag="built")
        print(f"built: {summary}", flush=True)
        searches = {"exact": exact_search(vectors_ND), "ours": ours(open_index(uri, version="built"))}
        extra: dict[str, Any] = {}
        if not args.no_faiss and importlib.util.find_spec("faiss"):
            searches["faiss"], extra["faiss_build_s"], size = faiss_search(vectors_ND)
            extra["faiss_bytes_ratio"] = size / vectors_ND.nbytes
        measured = race(searches, queries_QD)
        for name, figures in measured.items():
            print(name.ljust(6), "  ".join(f"{key} {value:.3f}" for key, value in figures.items()), flush=True)
        writes = under_writes(uri, "built", new_ND, queries_QD[0], model)
    for name in ("exact", "faiss"):
        extra |= {f"{name}_{key}": value for key, value in measured.get(name, {}).items()}
    figures = {
        "rows": args.rows,
        "dimension": args.dimension,
        "index_type": summary.settings.index_type,
        **measured["ours"],
        "p50_vs_exact": measured["ours"]["p50_ms"] / measured["exact"]["p50_ms"],
        "measured_at_build": summary.settings.recall_at_10,
        "build_s": summary.seconds,
        "index_bytes_ratio": summary.index_bytes / vectors_ND.nbytes,
        **extra,
        **writes,
    }
    print(json.dumps({key: round(value, 4) if isinstance(value, float) else value for key, value in figures.items()}))


if __name__ == "__main__":
    main()
