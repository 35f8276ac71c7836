"""Rows: those of a Lance data set in memory, partition after partition, compared with a query by matrix products.

What Lance's index does from disk with quantised vectors, with the same centroids and full vectors: no candidates to
compare again, no rows to read. N rows, P partitions, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from vladva.hits import Hit, hit_of, matrix_of

if TYPE_CHECKING:
    import lance
    import pyarrow as pa

BLOCK = 8192  # rows compared with the centroids at once


@dataclass(frozen=True)
class Rows:
    """Rows in the order of their partitions: partition p is from `bounds[p]` to `bounds[p + 1]`."""

    matrix_ND: np.ndarray  # unit norm
    carried: pa.Table
    centroids_PD: np.ndarray
    bounds: np.ndarray
    ids_N: np.ndarray  # Lance's row ids, ascending
    places_N: np.ndarray  # where in the matrix each of them is

    @classmethod
    def of(cls, dataset: lance.LanceDataset, centroids_PD: np.ndarray) -> Rows:
        """Read all rows and divide them by the centroids."""
        rows = dataset.to_table(with_row_id=True)
        matrix_ND = matrix_of(rows)
        matrix_ND = matrix_ND / np.linalg.norm(matrix_ND, axis=1, keepdims=True)
        blocks = (matrix_ND[first : first + BLOCK] for first in range(0, len(matrix_ND), BLOCK))
        partition_N = np.concatenate([nearness(block, centroids_PD).argmax(axis=1) for block in blocks])
        order = np.argsort(partition_N, kind="stable")
        ids_N = rows["_rowid"].to_numpy()[order]
        places_N = np.argsort(ids_N)
        return cls(
            matrix_ND=matrix_ND[order],
            carried=rows.drop_columns(["_rowid", "embedding"]).take(order),
            centroids_PD=centroids_PD,
            bounds=np.searchsorted(partition_N[order], np.arange(len(centroids_PD) + 1)),
            ids_N=ids_N[places_N],
            places_N=places_N,
        )

    def nearest(self, query_D: np.ndarray, k: int, nprobes: int | None, ids: np.ndarray | None) -> list[Hit]:
        """The k rows nearest to a unit vector, of those with the ids (None: all), in the nprobes nearest partitions.

        Without nprobes every row is compared. More partitions are taken where those do not hold k rows.
        """
        if nprobes is None:
            places = None if ids is None else self._places(ids)
            scores = (self.matrix_ND if places is None else self.matrix_ND[places]) @ query_D
        else:
            places, scores = self._probe(query_D, nprobes, ids)
            if len(places) < k and nprobes < len(self.centroids_PD):
                return self.nearest(query_D, k, min(2 * nprobes, len(self.centroids_PD)), ids)
        best = np.argpartition(-scores, k)[:k] if k < len(scores) else np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        found = self.carried.take(best if places is None else places[best]).to_pylist()
        return [hit_of(row, float(score)) for row, score in zip(found, scores[best], strict=True)]

    def _probe(self, query_D: np.ndarray, nprobes: int, ids: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Places and scores of the rows in the nearest partitions; neighbours in the matrix are compared at once."""
        chosen = np.sort(np.argsort(-nearness(query_D, self.centroids_PD))[:nprobes])
        runs = np.split(chosen, np.flatnonzero(np.diff(chosen) > 1) + 1)
        spans = [(self.bounds[run[0]], self.bounds[run[-1] + 1]) for run in runs]
        places = np.concatenate([np.arange(first, last) for first, last in spans])
        scores = np.concatenate([self.matrix_ND[first:last] @ query_D for first, last in spans])
        if ids is None:
            return places, scores
        allowed_N = np.zeros(len(self.matrix_ND), bool)
        allowed_N[self._places(ids)] = True
        return places[allowed_N[places]], scores[allowed_N[places]]

    def _places(self, ids: np.ndarray) -> np.ndarray:
        return self.places_N[np.searchsorted(self.ids_N, ids)]


def nearness(vectors_ND: np.ndarray, centroids_PD: np.ndarray) -> np.ndarray:
    """[N, P] (of one vector: [P]), greatest where the distance between unit vector and centroid is least."""
    return vectors_ND @ centroids_PD.T - 0.5 * np.square(centroids_PD).sum(axis=1)
