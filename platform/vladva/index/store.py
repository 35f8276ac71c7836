"""Hits: what a search gives, and what can be searched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from vladva.core.errors import FingerprintMismatch


@dataclass(frozen=True)
class Hit:
    """A neighbour: cosine similarity, and the columns that its row carries (all but id and embedding)."""

    id: str
    score: float
    columns: dict[str, Any]


class VectorStore(Protocol):
    """Embeddings of one model that can be searched and changed. A row is known by its (id, kind)."""

    @property
    def fingerprint(self) -> str:
        """Of the model that made the embeddings."""
        ...

    @property
    def dimension(self) -> int:
        """D."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows that can be found."""
        ...

    @property
    def version(self) -> int:
        """Grows with every change."""
        ...

    def search(self, vector: np.ndarray, k: int, filter: str | None = None) -> list[Hit]:  # noqa: A002
        """The k rows nearest to a vector [D] among those for which the SQL condition holds, best first.

        Raises ValueError for a vector of another dimension, k below 1, or a condition that cannot be evaluated.
        """
        ...

    def upsert(self, rows: pa.Table) -> None:
        """Add rows (an embeddings table), in place of those with the same (id, kind). Raises FingerprintMismatch."""
        ...

    def delete(self, ids: Sequence[str]) -> int:
        """Remove the rows with these ids; returns how many there were."""
        ...

    def optimize(self) -> None:
        """Make searches as fast as they were before the changes."""
        ...


def to_hit(row: dict[str, Any], score: float) -> Hit:
    """A row without its embedding, as a hit."""
    return Hit(row["id"], score, {name: value for name, value in row.items() if name != "id"})


def check_query(vector: np.ndarray, k: int, dimension: int) -> np.ndarray:
    """The query as a unit vector [D], float32. Raises ValueError."""
    query_D = np.asarray(vector, np.float32)
    if query_D.shape != (dimension,):
        raise ValueError(f"the query has the shape {query_D.shape}; the index holds vectors of {dimension} numbers")
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    wide_D = query_D.astype(np.float64)  # the squares of large numbers are no float32
    length = np.linalg.norm(wide_D)
    if not np.isfinite(length) or length == 0:
        raise ValueError("the query is zero or not finite; it has no direction")
    return (wide_D / length).astype(np.float32)


def check_rows(rows: pa.Table, fingerprint: str, store: str) -> None:
    """Raises FingerprintMismatch for rows of another model, ValueError for rows that do not say of which."""
    metadata = (rows.schema.metadata or {}).get(b"vladva")
    if metadata is None:
        raise ValueError("the rows do not say which model made them; take them from read_embeddings")
    found = json.loads(metadata)["fingerprint"]
    if found != fingerprint:
        raise FingerprintMismatch(store, fingerprint, found, "embed the rows with the model of the index")
