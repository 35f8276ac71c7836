"""ExactStore: the slow, exact twin of every vector store; conditions are evaluated by SQLite, as they were written."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from vladva.embed.table import embedding_matrix, keys_of
from vladva.index.store import Hit, check_query, check_rows, to_hit

# In SQL; a quote within is doubled, and so ends one and begins another.
QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")


class ExactStore:
    """Every row compared with the query, in numpy; conditions evaluated by SQLite. Small, in memory, and right."""

    def __init__(self, rows: pa.Table, fingerprint: str) -> None:
        self.fingerprint = fingerprint
        self.version = 1
        self._set(rows)

    def _set(self, rows: pa.Table) -> None:
        self.rows = rows.combine_chunks()
        self.matrix_ND = embedding_matrix(self.rows)

    @property
    def dimension(self) -> int:
        """D."""
        return self.matrix_ND.shape[1]

    @property
    def num_rows(self) -> int:
        """Rows that can be found."""
        return len(self.rows)

    def search(self, vector: np.ndarray, k: int, filter: str | None = None) -> list[Hit]:  # noqa: A002
        """See VectorStore."""
        query_D = check_query(vector, k, self.dimension)
        allowed = np.arange(self.num_rows) if filter is None else self._where(filter)
        scores = self.matrix_ND[allowed] @ query_D
        best = np.argsort(-scores, kind="stable")[:k]
        columns = self.rows.drop_columns(["embedding"]).take(allowed[best]).to_pylist()
        return [to_hit(row, float(score)) for row, score in zip(columns, scores[best], strict=True)]

    def upsert(self, rows: pa.Table) -> None:
        """See VectorStore."""
        check_rows(rows, self.fingerprint, "this store")
        new = set(keys_of(rows))
        kept = self.rows.filter(pa.array([key not in new for key in keys_of(self.rows)], pa.bool_()))
        self._set(pa.concat_tables([kept, rows.select(kept.column_names).cast(kept.schema)]))
        self.version += 1

    def delete(self, ids: Sequence[str]) -> int:
        """See VectorStore."""
        gone = set(ids)
        before = self.num_rows
        self._set(self.rows.filter(pa.array([one not in gone for one in self.rows["id"].to_pylist()], pa.bool_())))
        self.version += 1
        return before - self.num_rows

    def optimize(self) -> None:
        """See VectorStore; there is nothing to do."""

    def _where(self, condition: str) -> np.ndarray:
        """Numbers of the rows for which the condition holds."""
        check_brackets(condition)
        names = [name for name in self.rows.column_names if name != "embedding"]
        with sqlite3.connect(":memory:") as database:
            database.execute(f"CREATE TABLE rows ({', '.join(_quoted(name) for name in names)})")
            values = zip(*(self.rows[name].to_pylist() for name in names), strict=True)
            database.executemany(f"INSERT INTO rows VALUES ({', '.join('?' * len(names))})", values)
            try:
                found = database.execute(f"SELECT rowid - 1 FROM rows WHERE ({condition}) ORDER BY rowid").fetchall()
            except sqlite3.Error as error:
                raise ValueError(f"filter {condition!r} cannot be evaluated: {error}") from None
        return np.array([row for (row,) in found], np.int64)


def check_brackets(where: str) -> None:
    """Raises ValueError where a condition closes a bracket that it has not opened: it would close that around it."""
    depth = 0
    for bracket in re.findall(r"[()]", QUOTED.sub("", where)):
        depth += 1 if bracket == "(" else -1
        if depth < 0:
            raise ValueError(f"filter {where!r}: a bracket is closed that was not opened")


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
