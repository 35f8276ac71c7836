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
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from vladva.index.ivf import IN_MEMORY, VECTORS, IndexType, centroids, in_memory
from vladva.index.memory_index import MemoryIndex
from vladva.index.store import Hit, check_brackets, check_query, to_hit

if TYPE_CHECKING:
    import lance

EXACT_BELOW = 20_000  # rows of a data set below which every vector is compared
EXACT_LEFT = 4_000  # rows left by a filter below which every one of them is compared

RECALL_AT = 10  # neighbours of which the recall is measured


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
        self.rows: MemoryIndex | None = None
        self.dimension: int = dataset.schema.field("embedding").type.list_size
        self.num_rows: int = dataset.count_rows()
        self.columns = [*(name for name in dataset.schema.names if name != "embedding"), "_distance"]
        self.rows_left = lru_cache(maxsize=64)(dataset.count_rows)
        self.ids_left = lru_cache(maxsize=16)(self._ids_left)

    def warm(self, most: int = IN_MEMORY) -> None:
        """Read into memory what searches use: of IVF_SQ the rows, unless they are over `most` bytes, else the index."""
        kind = self.settings.index_type
        if kind == "exact":
            self.rows = self.rows or MemoryIndex.of(self.dataset, np.zeros((1, self.dimension), np.float32))
        elif kind == "IVF_SQ" and in_memory(self.dataset, most):
            self.rows = self.rows or MemoryIndex.of(self.dataset, centroids(self.dataset))
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
        return [to_hit(row, 1.0 - row.pop("_distance")) for row in found.to_pylist()]

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
