"""Searches: how a Lance data set of embeddings is searched, and how much is found.

A small data set is searched exactly. A large one is partitioned (IVF) and its vectors are quantised; the nearest
candidates are compared again by their full vectors, so that scores are exact. How many partitions a search looks at is
not a guess: it is the least that finds 98% of the exact ten neighbours of a sample of queries.

N rows, Q queries, D width.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from vladva.hits import Hit, check_query, hit_of, matrix_of
from vladva.recall import Measured, Queries, cheapest, exact_thresholds, measure

if TYPE_CHECKING:
    import lance

IndexType = Literal["exact", "IVF_SQ", "IVF_HNSW_SQ", "IVF_PQ"]

EXACT_BELOW = 20_000  # rows of a data set, or left by a filter, below which every vector is compared
PARTITION_ROWS = 512
GRAPH_ROWS = 200_000  # of a partition that is searched by a graph (HNSW)
RECALL_AT, WANTED, MARGIN = 10, 0.98, 0.005  # the margin is for the sample's error
NUM_QUERIES = 200
VECTORS = "embedding_idx"

# What is tried until recall suffices: candidates compared again by their full vectors, as a multiple of k; of graphs,
# the length of the list of candidates.
EFFORTS = {"IVF_SQ": (3, 10), "IVF_PQ": (10, 30, 100), "IVF_HNSW_SQ": (64, 128, 256, 512)}


@dataclass(frozen=True)
class SearchSettings:
    """How a data set is searched, and what was measured of it."""

    index_type: IndexType = "exact"
    partitions: int = 0
    nprobes: int = 0
    effort: int = 0
    recall_at_10: float = 1.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0

    @classmethod
    def of(cls, dataset: lance.LanceDataset) -> SearchSettings:
        """The settings kept with a data set."""
        return cls(**json.loads((dataset.schema.metadata or {}).get(b"vladva.search", b"{}")))

    def keep(self, dataset: lance.LanceDataset) -> None:
        """Keep the settings with a data set."""
        dataset.update_schema_metadata({"vladva.search": json.dumps(asdict(self))})

    def nearest(self, k: int, share: float) -> dict[str, Any]:
        """Arguments of Lance's search; `share` is the fraction of the rows that a filter leaves."""
        if self.index_type == "exact":
            return {"use_index": False}
        nprobes = min(self.partitions, math.ceil(self.nprobes / share))
        if self.index_type == "IVF_HNSW_SQ":
            return {"minimum_nprobes": nprobes, "ef": max(self.effort, k), "refine_factor": 3}
        return {"minimum_nprobes": nprobes, "refine_factor": self.effort}


EXACT = SearchSettings()


def search(
    dataset: lance.LanceDataset, settings: SearchSettings, vector: np.ndarray, k: int, where: str | None = None
) -> list[Hit]:
    """The k rows nearest to a vector [D] among those for which the SQL condition holds. Raises ValueError."""
    query_D = check_query(vector, k, dataset.schema.field("embedding").type.list_size)
    share = 1.0
    with plain_errors(where):
        if where is not None and settings.index_type != "exact":
            left, rows = rows_left(dataset, where), dataset.count_rows()
            settings, share = (EXACT, 1.0) if left < EXACT_BELOW else (settings, left / rows)
        nearest = {"column": "embedding", "q": query_D, "k": k, "metric": "cosine", **settings.nearest(k, share)}
        found = dataset.to_table(
            columns=[*_carried(dataset), "_distance"], nearest=nearest, filter=where, prefilter=where is not None
        )
    # Lance's cosine distance is 1 - cosine.
    return [hit_of(row, 1.0 - row.pop("_distance")) for row in found.to_pylist()]


def _carried(dataset: lance.LanceDataset) -> list[str]:
    return [name for name in dataset.schema.names if name != "embedding"]


@lru_cache(maxsize=64)
def rows_left(dataset: lance.LanceDataset, where: str) -> int:
    """Rows for which the SQL condition holds."""
    return dataset.count_rows(where)


@contextmanager
def plain_errors(where: str | None) -> Iterator[None]:
    """Lance's errors without the places in its source that they end with."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(re.sub(r",? /\S+\.rs:\d+:\d+", "", str(error)).split())
        raise ValueError(f"filter {where!r}: {reason}" if where is not None else reason) from None


# --- building --------------------------------------------------------------------------------------------------------


def partition(dataset: lance.LanceDataset, index_type: IndexType, workers: int) -> int:
    """Partition and quantise the vectors, with several workers on the cluster; returns the number of partitions."""
    rows = GRAPH_ROWS if index_type == "IVF_HNSW_SQ" else PARTITION_ROWS
    options: dict[str, Any] = {"metric": "cosine", "replace": True, "name": VECTORS}
    if index_type == "IVF_PQ":
        options["num_sub_vectors"] = _sub_vectors(dataset.schema.field("embedding").type.list_size)
    if workers > 1:
        import lance_ray

        options["num_partitions"] = max(1, dataset.count_rows() // rows)
        lance_ray.create_index(dataset.uri, "embedding", index_type, num_workers=workers, **options)
        dataset.checkout_latest()
    else:
        # The size, not the number: Lance keeps it and holds to it when it takes in new rows.
        dataset.create_index("embedding", index_type, target_partition_size=rows, **options)
    return num_partitions(dataset)


def num_partitions(dataset: lance.LanceDataset) -> int:
    """Partitions of the vector index."""
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")  # they would come along otherwise
    return max(part["num_partitions"] for part in dataset.stats.index_stats(VECTORS)["indices"])


def _sub_vectors(dimension: int) -> int:
    """Product quantisation: sub-vectors of eight numbers, one byte each, or of the next size that divides D."""
    return dimension // next(size for size in (8, 4, 2, 1) if dimension % size == 0)


# --- measuring -------------------------------------------------------------------------------------------------------


def sample(dataset: lance.LanceDataset, seed: int = 0) -> Queries:
    """Rows of a data set, to be used as queries."""
    rows = dataset.count_rows()
    chosen = sorted(random.Random(seed).sample(range(rows), min(NUM_QUERIES, rows)))
    return queries_of(dataset.take(chosen, columns=["id", "kind", "embedding"]))


def queries_of(rows: pa.Table) -> Queries:
    """Rows of an embeddings table, as queries."""
    return Queries(matrix_of(rows), _keys(rows))


def fit(
    dataset: lance.LanceDataset, settings: SearchSettings, queries: Queries, wheres: list[str | None], wanted: float
) -> SearchSettings:
    """The settings with the least work that find enough, for the worst of the conditions, and what was measured.

    `settings` say the type of index, and the least number of partitions to look at.
    """
    k = max(1, min(RECALL_AT, min(dataset.count_rows(where) for where in wheres) - 1))
    thresholds = [exact_thresholds(_blocks(dataset, where), queries, k) for where in wheres]

    def try_out(nprobes: int, effort: int) -> Measured:
        tried = replace(settings, nprobes=max(nprobes, settings.nprobes), effort=effort)
        measured = [
            measure(partial(search, dataset, tried, where=where), queries, threshold, k)
            for where, threshold in zip(wheres, thresholds, strict=True)
        ]
        return min(measured, key=lambda one: one.recall)

    if settings.index_type == "exact":
        nprobes, effort, measured = 0, 0, try_out(0, 0)
    else:
        efforts = EFFORTS[settings.index_type]
        nprobes, effort, measured = cheapest(settings.partitions, efforts, try_out, min(1.0, wanted + MARGIN))
    return replace(
        settings,
        nprobes=max(nprobes, settings.nprobes),
        effort=effort,
        recall_at_10=measured.recall,
        p50_ms=measured.p50_ms,
        p99_ms=measured.p99_ms,
    )


def _blocks(dataset: lance.LanceDataset, where: str | None) -> Iterator[tuple[np.ndarray, list[tuple[str, str]]]]:
    for batch in dataset.to_batches(columns=["id", "kind", "embedding"], filter=where, batch_size=8192):
        table = pa.Table.from_batches([batch])
        yield matrix_of(table), _keys(table)


def _keys(table: pa.Table) -> list[tuple[str, str]]:
    return list(zip(table["id"].to_pylist(), table["kind"].to_pylist(), strict=True))
