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
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vladva.hits import Hit, check_query, hit_of, matrix_of
from vladva.partitions import VECTORS, IndexType
from vladva.recall import Measured, Queries, cheapest, exact_thresholds, measure

if TYPE_CHECKING:
    import lance

EXACT_BELOW = 20_000  # rows of a data set below which every vector is compared
EXACT_LEFT = 4_000  # rows left by a filter below which every one of them is compared
IN_MEMORY = 512 << 20  # bytes of vectors up to which they are held in memory
RECALL_AT, WANTED = 10, 0.98
NUM_QUERIES = 200  # of each kind

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
        # The further neighbours are spread over more partitions: recall@100 as recall@10 takes nearly twice as many.
        nprobes = min(self.partitions, math.ceil(self.nprobes * max(1, k // RECALL_AT) ** 0.25 / share))
        # As many as it says and no guess of Lance's own, except that it goes on until there are k hits.
        probes = {"minimum_nprobes": nprobes, "search_effort": 0.0}
        if self.index_type == "IVF_HNSW_SQ":
            return probes | {"ef": max(self.effort, k), "refine_factor": 3}
        return probes | {"refine_factor": self.effort}


EXACT = SearchSettings()


class Searcher:
    """One version of a data set, and what it keeps between searches: its rows as well, if they have been warmed up."""

    def __init__(self, dataset: lance.LanceDataset, settings: SearchSettings, rows: Rows | None = None) -> None:
        self.dataset = dataset
        self.settings = settings
        self.rows = rows
        self.dimension: int = dataset.schema.field("embedding").type.list_size
        self.num_rows: int = dataset.count_rows()
        self.columns = [*(name for name in dataset.schema.names if name != "embedding"), "_distance"]
        self.rows_left = lru_cache(maxsize=64)(dataset.count_rows)

    def warm(self) -> None:
        """Read into memory what searches use: the index, and the vectors unless they are large."""
        exact = self.settings.index_type == "exact"
        if self.rows is None and (exact or 4 * self.num_rows * self.dimension <= IN_MEMORY):
            self.rows = Rows.of(self.dataset)
        if not exact:
            self.dataset.prewarm_index(VECTORS)

    def search(self, vector: np.ndarray, k: int, where: str | None = None) -> list[Hit]:
        """The k rows nearest to a vector [D] among those for which the SQL condition holds. Raises ValueError."""
        query_D = check_query(vector, k, self.dimension)
        with plain_errors(where):
            # In brackets, or Lance would not look at what follows a complete condition.
            condition = None if where is None else f"({where}\n)"
            if self.settings.index_type == "exact":
                self.warm()
                few, left = True, self.num_rows
            else:
                left = self.num_rows if condition is None else self.rows_left(condition)
                few = left < EXACT_LEFT
            how = {"use_index": False} if few else self.settings.nearest(k, left / self.num_rows)
            if self.rows is not None:
                ids = self._matching(condition) if few else self._candidates(query_D, k, condition, how)
                return self.rows.nearest(query_D, k, ids)
            found = self._ask(query_D, k, condition, how, self.columns)
        # Lance's cosine distance is 1 - cosine.
        return [hit_of(row, 1.0 - row.pop("_distance")) for row in found.to_pylist()]

    def _ask(self, query_D: np.ndarray, k: int, where: str | None, how: dict[str, Any], columns: list[str]) -> pa.Table:
        nearest = {"column": "embedding", "q": query_D, "k": k, "metric": "cosine", **how}
        return self.dataset.to_table(columns=columns, nearest=nearest, filter=where, prefilter=True)

    def _candidates(self, query_D: np.ndarray, k: int, where: str | None, how: dict[str, Any]) -> np.ndarray:
        """Ids of the rows that are near by their quantised vectors: Lance neither refines nor reads the rows."""
        count = k * how.pop("refine_factor")
        if "ef" in how:
            how["ef"] = max(how["ef"], count)
        return self._ask(query_D, count, where, how, ["_rowid", "_distance"])["_rowid"].to_numpy()

    def _matching(self, where: str | None) -> np.ndarray | None:
        """Ids of the rows for which the condition holds; None for all."""
        if where is None:
            return None
        return self.dataset.to_table(columns=[], filter=where, with_row_id=True)["_rowid"].to_numpy()


@dataclass(frozen=True)
class Rows:
    """The rows of a data set in memory, in the order of their ids: here comparing takes less than asking Lance."""

    ids_N: np.ndarray
    matrix_ND: np.ndarray  # unit norm
    carried: pa.Table

    @classmethod
    def of(cls, dataset: lance.LanceDataset) -> Rows:
        """Read them."""
        rows = dataset.to_table(with_row_id=True).sort_by("_rowid")
        matrix_ND = matrix_of(rows)
        matrix_ND = matrix_ND / np.linalg.norm(matrix_ND, axis=1, keepdims=True)
        return cls(rows["_rowid"].to_numpy(), matrix_ND, rows.drop_columns(["_rowid", "embedding"]))

    def nearest(self, query_D: np.ndarray, k: int, ids: np.ndarray | None) -> list[Hit]:
        """The k rows nearest to a unit vector, among those with the ids, or among all."""
        if ids is None:
            allowed, scores = None, self.matrix_ND @ query_D
        else:
            allowed = np.searchsorted(self.ids_N, np.sort(ids))
            scores = self.matrix_ND[allowed] @ query_D
        best = np.argpartition(-scores, k)[:k] if k < len(scores) else np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        found = self.carried.take(best if allowed is None else allowed[best]).to_pylist()
        return [hit_of(row, float(score)) for row, score in zip(found, scores[best], strict=True)]


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

    warm = Searcher(dataset, settings)
    warm.warm()

    def try_out(nprobes: int, effort: int) -> Measured:
        tried = replace(settings, nprobes=max(nprobes, settings.nprobes), effort=effort)
        searcher = Searcher(dataset, tried, warm.rows)
        measured = [
            measure(lambda vector, k, where=where: searcher.search(vector, k, where), queries, thresholds, k)
            for where, queries, thresholds in cases
        ]
        return min(measured, key=lambda one: one.assured)

    if settings.index_type == "exact":
        nprobes, effort, measured = 0, 0, try_out(0, 0)
    else:
        nprobes, effort, measured = cheapest(settings.partitions, EFFORTS[settings.index_type], try_out, wanted)
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
