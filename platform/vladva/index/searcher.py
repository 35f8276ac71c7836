"""Searcher: how a Lance data set of embeddings is searched.

A small data set is searched exactly. A large one is partitioned (IVF) and its vectors are quantised; the nearest
candidates are compared again by their full vectors, so that scores are exact: in memory where they fit, else by Lance.
How many partitions a search looks at is measured, not guessed (`tuning.py`): it is the least with which 98% of the
exact ten neighbours of a sample of queries are found.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from vladva.index.filters import lance_sql, parse_condition
from vladva.index.ivf import MEMORY_LIMIT, VECTORS, IndexType, centroids, fits_memory
from vladva.index.memory_index import Effort, MemoryIndex, has_lists
from vladva.index.store import Hit, check_query, to_hit

if TYPE_CHECKING:
    import lance

EXACT_BELOW = 20_000  # rows of a data set below which every vector is compared
EXACT_LEFT = 4_000  # rows left by a filter below which every one of them is compared
RECALL_AT = 10  # neighbours of which the recall is measured
REMEMBERED = 16  # conditions whose rows a searcher remembers


@dataclass(frozen=True)
class SearchSettings:
    """How a data set is searched, and what was measured of it."""

    index_type: IndexType = "exact"
    planned: IndexType = "exact"  # from `exact_below` rows on, which an index may grow to have
    exact_below: int = EXACT_BELOW
    partitions: int = 0
    nprobes: int = 0  # partitions that a search looks at
    refine_factor: int = 0  # candidates compared again by their full vectors, as a multiple of k
    ef: int = 0  # of IVF_HNSW_SQ: candidates that the search of a graph keeps
    recall_at_10: float = 1.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0

    @classmethod
    def of(cls, dataset: lance.LanceDataset) -> SearchSettings:
        """The settings kept with a data set."""
        kept = json.loads((dataset.schema.metadata or {}).get(b"vladva.search", b"{}"))
        effort = kept.pop("effort", None)  # what indexes of version 0.1 call it, whatever their type
        settings = cls(**kept)
        return settings if effort is None else settings.with_candidates(effort)

    @classmethod
    def are_kept(cls, dataset: lance.LanceDataset) -> bool:
        """Whether a data set has settings: a build keeps them last, so without them it is not done."""
        return b"vladva.search" in (dataset.schema.metadata or {})

    def keep(self, dataset: lance.LanceDataset) -> None:
        """Keep the settings with a data set."""
        dataset.update_schema_metadata({"vladva.search": json.dumps(asdict(self))})

    def with_candidates(self, candidates: int) -> SearchSettings:
        """With another number of candidates: `ef` of graphs, else `refine_factor`."""
        if self.index_type == "IVF_HNSW_SQ":
            return replace(self, ef=candidates, refine_factor=3)
        return replace(self, refine_factor=candidates)

    def probes(self, k: int, share: float) -> int:
        """Partitions to look at for k hits; `share` is the fraction of the rows that a filter leaves."""
        # Further neighbours, and those left by a filter are further, are spread over more partitions: for 100 to be
        # found as 10 are, it takes nearly twice as many.
        further = max(1, k / share // RECALL_AT) ** 0.25
        return min(self.partitions, math.ceil(self.nprobes * further / share))

    def nearest(self, k: int, share: float) -> dict[str, Any]:
        """Arguments of Lance's search."""
        # As many partitions as it says and no guess of Lance's own, except that it goes on until there are k hits.
        probes = {"minimum_nprobes": self.probes(k, share), "search_effort": 0.0, "refine_factor": self.refine_factor}
        return probes | ({"ef": max(self.ef, k)} if self.index_type == "IVF_HNSW_SQ" else {})


class Searcher:
    """One version of a data set, and what it keeps between searches: its rows as well, if they have been warmed up.

    Several threads may search at once: Lance and numpy let others run while they work.
    """

    def __init__(self, dataset: lance.LanceDataset, settings: SearchSettings) -> None:
        self.dataset = dataset
        self.settings = settings
        self.rows: MemoryIndex | None = None
        self.dimension: int = dataset.schema.field("embedding").type.list_size
        self.num_rows: int = dataset.count_rows()
        self.columns = [name for name in dataset.schema.names if name != "embedding"]
        self._ids: dict[str, np.ndarray] = {}  # condition -> row ids
        self._counts: dict[str, int] = {}

    def warm(self, limit: int = MEMORY_LIMIT) -> None:
        """Read into memory what searches use: of IVF_SQ the rows, unless over `limit` bytes, else Lance's index."""
        if self.settings.index_type in ("exact", "IVF_SQ") and self.rows is None:
            if self.settings.index_type == "exact":
                self.rows = MemoryIndex.of(self.dataset, None)
            elif fits_memory(self.dataset, limit) and has_lists():
                self.rows = MemoryIndex.of(self.dataset, centroids(self.dataset))
        if self.rows is None:
            self.dataset.prewarm_index(VECTORS)

    def search(self, vector: np.ndarray, k: int, where: str | None = None, timeout_s: float | None = None) -> list[Hit]:
        """The k rows nearest to a vector [D] among those for which the SQL condition holds.

        Raises ValueError, and TimeoutError where the condition is still being evaluated after `timeout_s`.
        """
        query_D = check_query(vector, k, self.dimension)
        condition = None if where is None else lance_sql(parse_condition(where, self.columns))
        deadline = math.inf if timeout_s is None else time.monotonic() + timeout_s
        with plain_errors(where):
            if self.settings.index_type == "exact":
                self.warm()
            if self.rows is not None:
                return self._search_memory(self.rows, query_D, k, condition, deadline)
            share, few = self._share(self.num_rows if condition is None else self._count_left(condition, deadline))
            how: dict[str, Any] = {"use_index": False} if few else self.settings.nearest(k, share)
            nearest = {"column": "embedding", "q": query_D, "k": k, "metric": "cosine", **how}
            columns = [*self.columns, "_distance"]
            found = self.dataset.to_table(columns=columns, nearest=nearest, filter=condition, prefilter=True)
        # Lance's cosine distance is 1 - cosine.
        return [to_hit(row, 1.0 - row.pop("_distance")) for row in found.to_pylist()]

    def _search_memory(
        self, rows: MemoryIndex, query_D: np.ndarray, k: int, condition: str | None, deadline: float
    ) -> list[Hit]:
        ids = None if condition is None else self._ids_left(condition, deadline)
        share, few = self._share(self.num_rows if ids is None else len(ids))
        effort = None if few else Effort(self.settings.probes(k, share), self.settings.refine_factor)
        return rows.nearest(query_D, k, effort, ids)

    def _share(self, left: int) -> tuple[float, bool]:
        """The fraction of the rows that is left, and whether these are few enough to be compared one by one."""
        return left / max(1, self.num_rows), left < EXACT_LEFT

    def _ids_left(self, condition: str, deadline: float) -> np.ndarray:
        """Ids of the rows for which the condition holds."""
        if condition not in self._ids:
            ids = [np.zeros(0, np.uint64), *self._matching(condition, deadline)]
            _remember(self._ids, condition, np.concatenate(ids))
        return self._ids[condition]

    def _count_left(self, condition: str, deadline: float) -> int:
        if condition not in self._counts:
            _remember(self._counts, condition, sum(map(len, self._matching(condition, deadline))))
        return self._counts[condition]

    def _matching(self, condition: str, deadline: float) -> Iterator[np.ndarray]:
        """Row ids of the rows for which the condition holds, block by block. Raises TimeoutError."""
        scanner = self.dataset.scanner(columns=[], filter=condition, with_row_id=True)
        for batch in scanner.to_batches():  # whoever stops taking batches ends the scan
            if time.monotonic() > deadline:
                raise TimeoutError("the filter takes too long: index its columns (jobs/index.py --filter-columns)")
            yield batch["_rowid"].to_numpy()


def _remember(memory: dict[str, Any], condition: str, value: Any) -> None:
    """Keep the value; the oldest is forgotten."""
    memory[condition] = value
    for old in list(memory)[:-REMEMBERED]:
        memory.pop(old, None)


@contextmanager
def plain_errors(where: str | None) -> Iterator[None]:
    """Lance's errors without the places in its source that they end with."""
    try:
        yield
    except TimeoutError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(re.sub(r",? /\S+\.rs:\d+:\d+", "", str(error)).split())
        raise ValueError(f"filter {where!r}: {reason}" if where is not None else reason) from None
