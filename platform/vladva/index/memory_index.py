"""MemoryIndex: the rows of a Lance data set in memory, partition after partition (an in-memory IVF).

What Lance's index does from disk with quantised vectors, with the same centroids and full vectors: no candidates to
compare again, no rows to read. N rows, P partitions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from vladva.embed.table import embedding_matrix
from vladva.index.store import Hit, to_hit

if TYPE_CHECKING:
    from collections.abc import Iterator

    import lance

BLOCK = 8192  # rows read at once


@dataclass(frozen=True)
class Centroids:
    """Of the partitions, with what every comparison with them needs."""

    matrix_PD: np.ndarray
    half_squares_P: np.ndarray

    @classmethod
    def of(cls, matrix_PD: np.ndarray) -> Centroids:
        """With half of each centroid's squared length."""
        return cls(matrix_PD, 0.5 * np.square(matrix_PD).sum(axis=1))

    def similarity(self, vectors_ND: np.ndarray) -> np.ndarray:
        """[N, P] (of one vector: [P]), greatest where the distance between unit vector and centroid is least."""
        # |v - c|^2 = 1 - 2 v.c + |c|^2 for a unit vector v.
        return vectors_ND @ self.matrix_PD.T - self.half_squares_P


@dataclass(frozen=True)
class MemoryIndex:
    """Rows in the order of their partitions: partition p is from `bounds[p]` to `bounds[p + 1]`."""

    matrix_ND: np.ndarray  # unit norm
    carried: pa.Table
    centroids: Centroids
    bounds: np.ndarray
    ids_N: np.ndarray  # Lance's row ids, ascending
    row_of_id: np.ndarray  # [N]: the row of the matrix that each of them has

    @classmethod
    def of(cls, dataset: lance.LanceDataset, centroids_PD: np.ndarray) -> MemoryIndex:
        """Read all rows and divide them by the centroids.

        They are read twice, to be put where they belong at once: two matrices would not fit where one does.
        """
        centroids = Centroids.of(centroids_PD)
        ids, carried, partitions = [], [], []
        for rows in blocks(dataset):
            ids.append(rows["_rowid"].to_numpy())
            carried.append(rows.drop_columns(["_rowid", "embedding"]))
            partitions.append(centroids.similarity(unit_vectors(rows)).argmax(axis=1))
        partition_N = np.concatenate(partitions)
        order = np.argsort(partition_N, kind="stable")
        target_N = np.argsort(order)  # the row of the matrix, of each row as it is read
        matrix_ND = np.empty((len(order), centroids_PD.shape[1]), np.float32)
        first = 0
        for rows in blocks(dataset):
            matrix_ND[target_N[first : first + len(rows)]] = unit_vectors(rows)
            first += len(rows)
        ids_N = np.concatenate(ids)[order]
        row_of_id = np.argsort(ids_N)
        return cls(
            matrix_ND=matrix_ND,
            carried=pa.concat_tables(carried).take(order),
            centroids=centroids,
            bounds=np.searchsorted(partition_N[order], np.arange(len(centroids_PD) + 1)),
            ids_N=ids_N[row_of_id],
            row_of_id=row_of_id,
        )

    def nearest(self, query_D: np.ndarray, k: int, nprobes: int | None, ids: np.ndarray | None) -> list[Hit]:
        """The k rows nearest to a unit vector, of those with the ids (None: all), in the nprobes nearest partitions.

        Without nprobes every row is compared. More partitions are taken where those do not hold k rows.
        """
        if nprobes is None:
            rows = None if ids is None else self._rows(ids)
            scores = np.vecdot(self.matrix_ND if rows is None else self.matrix_ND[rows], query_D)
        else:
            rows, scores = self._probe(query_D, nprobes, ids)
            if len(rows) < k and nprobes < len(self.centroids.matrix_PD):
                return self.nearest(query_D, k, min(2 * nprobes, len(self.centroids.matrix_PD)), ids)
        best = np.argpartition(-scores, k)[:k] if k < len(scores) else np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        found = self.carried.take(best if rows is None else rows[best]).to_pylist()
        return [to_hit(row, float(score)) for row, score in zip(found, scores[best], strict=True)]

    def _probe(self, query_D: np.ndarray, nprobes: int, ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Rows and scores of the nearest partitions; neighbours in the matrix are taken together."""
        # The nearest partitions, in the order of the matrix.
        chosen = np.sort(np.argsort(-self.centroids.similarity(query_D))[:nprobes])
        # Runs of partitions that follow one another: each begins at a row of `firsts` and ends before one of `lasts`.
        gaps = np.flatnonzero(np.diff(chosen) > 1)
        firsts = self.bounds[chosen[np.concatenate([[0], gaps + 1])]]
        lasts = self.bounds[chosen[np.concatenate([gaps, [len(chosen) - 1]])] + 1]
        # Where each run ends among the rows that are compared.
        ends = np.cumsum(lasts - firsts)
        # The matrix row of each compared row: its number, moved by as much as its run is.
        rows = np.arange(ends[-1]) + np.repeat(lasts - ends, lasts - firsts)
        # The products of each run, written where they belong. Row by row takes half the time of OpenBLAS's product of
        # matrix and vector, where rows come from memory.
        scores = np.empty(ends[-1], np.float32)
        for first, last, end in zip(firsts.tolist(), lasts.tolist(), ends.tolist(), strict=True):
            np.vecdot(self.matrix_ND[first:last], query_D, out=scores[end - (last - first) : end])
        if ids is None:
            return rows, scores
        # Only rows that a filter has left.
        allowed_N = np.zeros(len(self.matrix_ND), bool)
        allowed_N[self._rows(ids)] = True
        return rows[allowed_N[rows]], scores[allowed_N[rows]]

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        return self.row_of_id[np.searchsorted(self.ids_N, ids)]


def blocks(dataset: lance.LanceDataset) -> Iterator[pa.Table]:
    """All rows, with Lance's row ids, always in the same order; one block at least, if only of no rows."""
    batches = dataset.scanner(with_row_id=True, batch_size=BLOCK).to_reader()
    yield batches.schema.empty_table()
    for batch in batches:
        yield pa.Table.from_batches([batch])


def unit_vectors(rows: pa.Table) -> np.ndarray:
    """The embeddings of rows [N, D], of unit norm."""
    matrix_ND = embedding_matrix(rows)
    return matrix_ND / np.linalg.norm(matrix_ND, axis=1, keepdims=True)
