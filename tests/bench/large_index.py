#!/usr/bin/env python
"""An index beyond one machine's memory, built by Ray workers: recall, filtered recall, latency warm and cold, bytes.

    python tests/bench/large_index.py                              # 1,000,000 x 512, IVF_PQ, two workers
    python tests/bench/large_index.py --rows 10000000              # takes 45 GB of disk
    python tests/bench/large_index.py --rows 50000 --dimension 64  # a try

Rows are made and written block by block, and compared with the queries on the way, so the exact neighbours are known
and no more than a block is in memory. Queries are not in the index. `filtered`: a condition that leaves a tenth.
`cold`: files are dropped from the system's cache and the index is opened anew before every search. `by_id`: a row found
by its id, as a thumbnail is. `driver_gib`: the highest memory of the process that asks for the build. The last line is
one JSON object. Goals: recall_at_10 and filtered_recall_at_10 >= 0.95, p50_vs_exact <= 0.1.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("LANCE_LOG", "error")

import index as small
import numpy as np
import pyarrow as pa

from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.index.build import build_index
from vladva.index.vector_index import VectorIndex, open_index

K = 10
BLOCK = 100_000  # rows made at once
SHELVES = 10  # values of the column that the condition is about
WHERE = "shelf = 3"
COLD = 20  # searches


def make_block(uri: str, first: int, rows: int, dimension: int, queries_QD: np.ndarray) -> tuple[np.ndarray, ...]:
    """Write a block of the table; its rows nearest to each query: (ids, scores) [Q, K] of all, and of one shelf."""
    model = small.MODEL | {"dimension": dimension}
    vectors_ND = small.embeddings(rows, dimension, seed=1000 + first)
    for start in range(0, rows, 20_000):
        part_ND = vectors_ND[start : start + 20_000]
        items = small.items_of(first + start, len(part_ND))
        shelves = pa.array(np.arange(first + start, first + start + len(part_ND)) % SHELVES)
        write_part(uri, items.append_column("shelf", shelves), part_ND, model)
    scores_QN = queries_QD @ vectors_ND.T
    numbers_N = np.arange(first, first + rows)
    shelf_N = numbers_N % SHELVES == 3
    return *nearest(numbers_N, scores_QN), *nearest(numbers_N[shelf_N], scores_QN[:, shelf_N])


def nearest(numbers_N: np.ndarray, scores_QN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(numbers, scores) [Q, K] of the best."""
    best_QK = np.argpartition(-scores_QN, K - 1, axis=1)[:, :K]
    return numbers_N[best_QK], np.take_along_axis(scores_QN, best_QK, axis=1)


def merged(found: list[tuple[np.ndarray, ...]], place: int) -> list[set[int]]:
    """The best numbers of all blocks, for each query."""
    numbers_QN = np.concatenate([one[place] for one in found], axis=1)
    scores_QN = np.concatenate([one[place + 1] for one in found], axis=1)
    best_QK = np.argpartition(-scores_QN, K - 1, axis=1)[:, :K]
    return [set(row.tolist()) for row in np.take_along_axis(numbers_QN, best_QK, axis=1)]


def make_table(uri: str, rows: int, dimension: int, queries_QD: np.ndarray) -> tuple[list[set[int]], list[set[int]]]:
    """A complete table, and the exact neighbours of the queries: of all rows, and of those of a shelf."""
    firsts = range(0, rows, BLOCK)
    found = []
    with ProcessPoolExecutor(2) as pool:
        blocks = [
            pool.submit(make_block, uri, first, min(BLOCK, rows - first), dimension, queries_QD) for first in firsts
        ]
        for number, block in enumerate(blocks, start=1):
            found.append(block.result())
            if number % 10 == 0:
                print(f"made {number * BLOCK:,} rows", flush=True)
    TableWriter(uri, small.MODEL | {"dimension": dimension}, "").commit()
    return merged(found, 0), merged(found, 2)


def exact_ms(rows: int, dimension: int, query_D: np.ndarray) -> float:
    """Milliseconds in which a query is compared with so many rows in memory: of a block, the rest in proportion."""
    vectors_ND = np.random.default_rng(0).normal(size=(min(rows, 500_000), dimension)).astype(np.float32)
    times = []
    for _ in range(5):
        began = time.perf_counter()
        scores_N = vectors_ND @ query_D
        np.argpartition(-scores_N, K)
        times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times)) * rows / len(vectors_ND)


def forget(folder: Path) -> None:
    """Drop the files of a folder from the system's cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            file = os.open(path, os.O_RDONLY)
            os.fdatasync(file)
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(file)


def timed(calls: Iterator[Callable[[], Any]]) -> tuple[list[Any], dict[str, float]]:
    """Results, and percentiles of the milliseconds that each took."""
    results, times = [], []
    for call in calls:
        began = time.perf_counter()
        results.append(call())
        times.append(1e3 * (time.perf_counter() - began))
    return results, {"p50_ms": float(np.percentile(times, 50)), "p99_ms": float(np.percentile(times, 99))}


def recall(results: list[Any], expected: list[set[int]]) -> float:
    """The share of the exact neighbours that was found."""
    return sum(len({int(hit.id) for hit in hits} & right) for hits, right in zip(results, expected, strict=True)) / (
        K * len(expected)
    )


def searched(
    uri: str, queries_QD: np.ndarray, exact: list[set[int]], of_shelf: list[set[int]], rows: int
) -> dict[str, float]:
    """Recall and latency of searches, cold and warm, with a condition and without; and of rows found by their ids."""

    def cold(query_D: np.ndarray) -> Iterator[Callable[[], Any]]:
        forget(Path(uri))
        opened: VectorIndex = open_index(uri)
        yield lambda: opened.search(query_D, K)

    found: dict[str, float] = {}
    times = [timed(cold(query_D))[1]["p50_ms"] for query_D in queries_QD[:COLD]]
    found |= {"cold_p50_ms": float(np.median(times)), "cold_p99_ms": float(np.percentile(times, 99))}
    index = open_index(uri)
    began = time.perf_counter()
    index.warm()
    found["warm_s"] = time.perf_counter() - began
    for query_D in queries_QD[:COLD]:  # what is refined is read from the vectors: those are not warmed
        index.search(query_D, K)
    results, latency = timed(lambda q=q: index.search(q, K) for q in queries_QD)  # type: ignore[misc]
    found |= {"recall_at_10": recall(results, exact), **latency}
    index.search(queries_QD[0], K, WHERE)
    results, latency = timed(lambda q=q: index.search(q, K, WHERE) for q in queries_QD)  # type: ignore[misc]
    found |= {"filtered_recall_at_10": recall(results, of_shelf)}
    found |= {f"filtered_{name}": value for name, value in latency.items()}
    names = np.random.default_rng(5).choice(rows, 100, replace=False).tolist()
    results, latency = timed(
        lambda n=n: index.dataset.to_table(columns=["caption"], filter=f"id = '{n}' AND kind = 'image'", limit=1)  # type: ignore[misc]
        for n in names
    )
    assert [one["caption"].to_pylist() for one in results] == [[f"the caption of image {n}"] for n in names]
    return found | {f"by_id_{name}": value for name, value in latency.items()}


def main() -> None:
    """Measure, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--type", default="IVF_PQ", choices=("IVF_SQ", "IVF_PQ"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--recall", type=float, default=0.95, help="that is tuned for")
    parser.add_argument("--folder", help="where to write; by default a temporary folder")
    args = parser.parse_args()

    import ray

    queries_QD = small.embeddings(args.queries, args.dimension, seed=2)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        table, uri = str(Path(folder, "table")), str(Path(folder, "index"))
        began = time.monotonic()
        exact, of_shelf = make_table(table, args.rows, args.dimension, queries_QD)
        print(f"made the table in {time.monotonic() - began:.0f} s", flush=True)
        ray.init("local", num_cpus=args.workers, include_dashboard=False)
        summary = build_index(
            table,
            uri,
            index_type=args.type,
            filter_columns=["shelf"],
            workers=args.workers,
            recall=args.recall,
        )
        print(f"built: {summary}", flush=True)
        ray.shutdown()
        driver = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        found = searched(uri, queries_QD, exact, of_shelf, args.rows)
    vectors = 4 * args.rows * args.dimension
    compared = exact_ms(args.rows, args.dimension, queries_QD[0])
    figures = {
        "rows": args.rows,
        "dimension": args.dimension,
        "index_type": summary.settings.index_type,
        "workers": args.workers,
        "nprobes": f"{summary.settings.nprobes} of {summary.settings.partitions}",
        "refine_factor": summary.settings.refine_factor,
        "measured_at_build": summary.settings.recall_at_10,
        "build_s": summary.seconds,
        "index_bytes_ratio": summary.index_bytes / vectors,
        "driver_gib": driver,
        **found,
        "exact_p50_ms": compared,
        "p50_vs_exact": found["p50_ms"] / compared,
    }
    print(json.dumps(small.rounded(figures)))


if __name__ == "__main__":
    main()
