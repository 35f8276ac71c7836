"""MemoryIndex: the rows of a Lance data set in memory, with FAISS's inverted lists over them.

What Lance's index does from disk, with the same centroids: the nearest partitions are looked through by vectors of one
byte a number, and the best candidates are compared again by their full vectors, so that scores are exact. N rows, P
partitions, D width.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from vladva.embed.table import embedding_matrix
from vladva.index.store import Hit, to_hit

if TYPE_CHECKING:
    from collections.abc import Iterator

    import faiss
    import lance

BLOCK = 8192  # rows read at once


@dataclass(frozen=True)
class Effort:
    """How much of an index a search looks at."""

    nprobes: int  # nearest partitions
    refine_factor: int  # candidates compared again by their full vectors, as a multiple of k


@dataclass(frozen=True)
class MemoryIndex:
    """Rows in the order in which Lance reads them."""

    matrix_ND: np.ndarray  # unit norm
    lists: faiss.IndexIVF | None  # None: every row is compared
    carried: pa.Table
    ids_N: np.ndarray  # Lance's row ids, ascending
    row_of_id: np.ndarray  # [N]: the row of the matrix that each of them has

    @classmethod
    def of(cls, dataset: lance.LanceDataset, centroids_PD: np.ndarray | None) -> MemoryIndex:
        """Read all rows; with centroids, also divide them into inverted lists."""
        matrix_ND = np.empty((dataset.count_rows(), dataset.schema.field("embedding").type.list_size), np.float32)
        ids, carried, first = [], [], 0
        for rows in blocks(dataset):
            ids.append(rows["_rowid"].to_numpy())
            carried.append(rows.drop_columns(["_rowid", "embedding"]))
            matrix_ND[first : first + len(rows)] = unit_vectors(rows)
            first += len(rows)
        ids_N = np.concatenate(ids)
        row_of_id = np.argsort(ids_N)
        return cls(
            matrix_ND=matrix_ND,
            lists=None if centroids_PD is None or not len(matrix_ND) else inverted_lists(matrix_ND, centroids_PD),
            # Of many chunks, taking a few rows would look at them all.
            carried=pa.concat_tables(carried).combine_chunks(),
            ids_N=ids_N[row_of_id],
            row_of_id=row_of_id,
        )

    def nearest(self, query_D: np.ndarray, k: int, effort: Effort | None, ids: np.ndarray | None) -> list[Hit]:
        """The k rows nearest to a unit vector, of those with the ids (None: all).

        Without an effort, or without lists, every row is compared.
        """
        if effort is None or self.lists is None:
            rows = None if ids is None else self._rows(ids)
        else:
            rows = self._candidates(query_D, k, effort, ids)
        # Row by row takes half the time of OpenBLAS's product of matrix and vector, where rows come from memory.
        scores = np.vecdot(self.matrix_ND if rows is None else self.matrix_ND[rows], query_D)
        best = np.argpartition(-scores, k)[:k] if k < len(scores) else np.arange(len(scores))
        best = best[np.argsort(-scores[best], kind="stable")]
        found = self.carried.take(best if rows is None else rows[best]).to_pylist()
        return [to_hit(row, float(score)) for row, score in zip(found, scores[best], strict=True)]

    def _candidates(self, query_D: np.ndarray, k: int, effort: Effort, ids: np.ndarray | None) -> np.ndarray:
        """Rows that the nearest partitions hold near the query; of more partitions where those do not hold k."""
        import faiss

        assert self.lists is not None
        options: dict[str, faiss.IDSelector] = {}
        if ids is not None:  # only rows that a filter has left: a bit for each row
            allowed_N = np.zeros(len(self.matrix_ND), bool)
            allowed_N[self._rows(ids)] = True
            bits = np.packbits(allowed_N, bitorder="little")  # FAISS does not copy them: held until it is done
            options["sel"] = faiss.IDSelectorBitmap(bits)
        nprobes, most = effort.nprobes, self.lists.nlist
        while True:
            how = faiss.SearchParametersIVF(nprobe=nprobes, **options)
            rows = self.lists.search(query_D[None], k * max(1, effort.refine_factor), params=how)[1][0]
            rows = rows[rows >= 0]  # -1: there were no more
            if len(rows) >= k or nprobes >= most:
                return rows
            nprobes = min(2 * nprobes, most)

    def _rows(self, ids: np.ndarray) -> np.ndarray:
        return self.row_of_id[np.searchsorted(self.ids_N, ids)]


def has_lists() -> bool:
    """Whether FAISS is installed, as it is on Linux; without it Lance searches from disk."""
    return importlib.util.find_spec("faiss") is not None


def inverted_lists(matrix_ND: np.ndarray, centroids_PD: np.ndarray) -> faiss.IndexIVF:
    """Row numbers by the partition whose centroid is nearest, each with its unit vector in a byte a number."""
    import faiss

    # Rows belong to the centroid at the least distance, as in Lance; candidates are compared by products.
    nearest_centroid = faiss.IndexFlatL2(matrix_ND.shape[1])
    nearest_centroid.add(centroids_PD)
    kind, inner = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
    lists = faiss.IndexIVFScalarQuantizer(nearest_centroid, matrix_ND.shape[1], len(centroids_PD), kind, inner)
    lists.by_residual = False  # a residual's product with a query would lack that with the centroid
    lists.train(matrix_ND)  # the bounds of each number: the centroids are given
    for first in range(0, len(matrix_ND), BLOCK):
        lists.add(matrix_ND[first : first + BLOCK])
    return lists


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
