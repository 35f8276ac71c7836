"""Searches: how a Lance data set of embeddings is searched, and how much is found.

A small data set is searched exactly. A large one is partitioned (IVF) and its vectors are quantised; the nearest
candidates are compared again by their full vectors, so that scores are exact: in memory where they fit, else by Lance.
How many partitions a search looks at is not a guess: it is the least with which 98% of the exact ten neighbours of a
sample of queries are found.

N rows, Q queries, D width.
"""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vladva.hits import Hit, check_brackets, check_query, hit_of, matrix_of
from vladva.partitions import IN_MEMORY, VECTORS, IndexType, centroids, in_memory
from vladva.recall import Measured, Queries, cheapest, exact_thresholds, measure
from vladva.rows import Rows

if TYPE_CHECKING:
    import lance

EXACT_BELOW = 20_000  # rows of a data set below which every vector is compared
EXACT_LEFT = 4_000  # rows left by a filter below which every one of them is compared
RECALL_AT, WANTED = 10, 0.98
NUM_QUERIES = 200  # of each kind

# What is tried until recall suffices: candidates compared again by their full vectors, as a multiple of k; of graphs,
# the length of the list of candidates.
EFFORTS = {"IVF_SQ": (3, 10), "IVF_PQ": (10, 30, 100), "IVF_HNSW_SQ": (64, 128, 256, 512)}


@dataclass(frozen=True)
class SearchSettings:
    """How a data set is searched, and what was measured of it."""

    index_type: IndexType = "exact"
    planned: IndexType = "exact"  # from `exact_below` rows on, which an index may grow to have
    exact_below: int = EXACT_BELOW
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

    def probes(self, k: int, share: float) -> int:
        """Partitions to look at for k hits; `share` is the fraction of the rows that a filter leaves."""
        # Further neighbours, and those left by a filter are further, are spread over more partitions: for 100 to be
        # found as 10 are, it takes nearly twice as many.
        further = max(1, k / share // RECALL_AT) ** 0.25
        return min(self.partitions, math.ceil(self.nprobes * further / share))

    def nearest(self, k: int, share: float) -> dict[str, Any]:
        """Arguments of Lance's search."""
        # As many partitions as it says and no guess of Lance's own, except that it goes on until there are k hits.
        probes = {"minimum_nprobes": self.probes(k, share), "search_effort": 0.0}
        if self.index_type == "IVF_HNSW_SQ":
            return probes | {"ef": max(self.effort, k), "refine_factor": 3}
        return probes | {"refine_factor": self.effort}


class Searcher:
    """One version of a data set, and what it keeps between searches: its rows as well, if they have been warmed up."""

    def __init__(self, dataset: lance.LanceDataset, settings: SearchSettings) -> None:
        self.dataset = dataset
        self.settings = settings
        self.rows: Rows | None = None
        self.dimension: int = dataset.schema.field("embedding").type.list_size
        self.num_rows: int = dataset.count_rows()
        self.columns = [*(name for name in dataset.schema.names if name != "embedding"), "_distance"]
        self.rows_left = lru_cache(maxsize=64)(dataset.count_rows)
        self.ids_left = lru_cache(maxsize=16)(self._ids_left)

    def warm(self, most: int = IN_MEMORY) -> None:
        """Read into memory what searches use: of IVF_SQ the rows, unless they are over `most` bytes, else the index."""
        kind = self.settings.index_type
        if kind == "exact":
            self.rows = self.rows or Rows.of(self.dataset, np.zeros((1, self.dimension), np.float32))
        elif kind == "IVF_SQ" and in_memory(self.dataset, most):
            self.rows = self.rows or Rows.of(self.dataset, centroids(self.dataset))
        else:
            self.dataset.prewarm_index(VECTORS)

    def search(self, vector: np.ndarray, k: int, where: str | None = None) -> list[Hit]:
        """The k rows nearest to a vector [D] among those for which the SQL condition holds. Raises ValueError."""
        query_D = check_query(vector, k, self.dimension)
        check_brackets(where or "")
        with plain_errors(where):
            # In brackets, or Lance would not look at what follows a complete condition.
            condition = None if where is None else f"({where}\n)"
            if self.settings.index_type == "exact":
                self.warm()
                return self.rows.nearest(query_D, k, None, self.ids_left(condition))
            left = self.num_rows if condition is None else self.rows_left(condition)
            few = left < EXACT_LEFT
            if self.rows is not None:
                nprobes = None if few else self.settings.probes(k, left / self.num_rows)
                return self.rows.nearest(query_D, k, nprobes, self.ids_left(condition))
            how = {"use_index": False} if few else self.settings.nearest(k, left / self.num_rows)
            nearest = {"column": "embedding", "q": query_D, "k": k, "metric": "cosine", **how}
            found = self.dataset.to_table(columns=self.columns, nearest=nearest, filter=condition, prefilter=True)
        # Lance's cosine distance is 1 - cosine.
        return [hit_of(row, 1.0 - row.pop("_distance")) for row in found.to_pylist()]

    def _ids_left(self, condition: str | None) -> np.ndarray | None:
        """Ids of the rows for which the condition holds; None for all."""
        if condition is None:
            return None
        return self.dataset.to_table(columns=[], filter=condition, with_row_id=True)["_rowid"].to_numpy()


@contextmanager
def plain_errors(where: str | None) -> Iterator[None]:
    """Lance's errors without the places in its source that they end with."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(re.sub(r",? /\S+\.rs:\d+:\d+", "", str(error)).split())
        raise ValueError(f"filter {where!r}: {reason}" if where is not None else reason) from None


# --- measuring -------------------------------------------------------------------------------------------------------


def sample(dataset: lance.LanceDataset, seed: int = 0) -> list[Queries]:
    """Rows of a data set, to be used as queries."""
    rows = dataset.count_rows()
    chosen = sorted(random.Random(seed).sample(range(rows), min(2 * NUM_QUERIES, rows)))
    return queries_of(dataset.take(chosen, columns=["id", "kind", "embedding"]))


def queries_of(rows: pa.Table) -> list[Queries]:
    """Rows of an embeddings table as queries, those of each kind by themselves, at most NUM_QUERIES of each."""
    tables = [rows.filter(pa.compute.equal(rows["kind"], kind)).slice(0, NUM_QUERIES) for kind in ("image", "text")]
    return [Queries(matrix_of(table), _keys(table)) for table in tables if len(table)]


def fit(
    dataset: lance.LanceDataset,
    settings: SearchSettings,
    samples: Sequence[Queries],
    wheres: Sequence[str | None],
    wanted: float,
) -> SearchSettings:
    """The settings with the least work that find enough, for the worst of the samples and of the conditions.

    `settings` say the type of index, and the least number of partitions to look at.
    """
    k = max(1, min(RECALL_AT, min(dataset.count_rows(where) for where in wheres) - 1))
    cases = [
        (where, queries, exact_thresholds(_blocks(dataset, where), queries, k))
        for where in wheres
        for queries in samples
    ]

    # By Lance, from disk: in memory as much is found, or more, because nothing is quantised.
    def try_out(nprobes: int, effort: int, at_least: float = wanted) -> Measured:
        tried = replace(settings, nprobes=max(nprobes, settings.nprobes), effort=effort)
        searcher = Searcher(dataset, tried)
        measured = []
        for where, queries, thresholds in cases:
            ask = partial(searcher.search, where=where)
            measured.append(measure(ask, queries, thresholds, k, at_least))
        return min(measured, key=lambda one: one.assured)

    if settings.index_type == "exact":
        nprobes, effort, measured = 0, 0, try_out(0, 0)
    else:
        nprobes, effort, measured = cheapest(settings.partitions, EFFORTS[settings.index_type], try_out, wanted)
        if measured.recall < wanted:
            measured = try_out(nprobes, effort, 0.0)
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
