"""Neighbours: embeddings of all samples -> an order in which near ones are near one another.

The samples are halved along the direction in which they differ most, at the median, and each half again, until few are
left: any run of the order is then from a small region, and as many samples are on each side of every cut. (As B3,
arXiv 2505.11293, batches are made of communities; theirs are of a graph.) N samples, D width.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from vladva.core import storage
from vladva.data.order import write_order
from vladva.data.shard_index import ShardIndex
from vladva.embed.table import embedding_matrix, open_table, rows_of_file, schema_of

LEAF = 4  # samples that are not divided any further
PROJECTED = 64  # dimensions that are kept of wider embeddings: distances stay nearly what they are
POWER_STEPS = 8


def order_samples(table_uri: str, index: ShardIndex, out_uri: str) -> None:
    """Write the order of a data set's samples by the images of an embeddings table.

    Samples that the table does not have are at the end, in their own order.
    """
    vectors_ND, numbers_N = _vectors(table_uri, index)
    missing = np.setdiff1d(np.arange(index.num_samples), numbers_N)
    write_order(out_uri, np.concatenate([numbers_N[neighbour_order(vectors_ND)], missing]), index)


def neighbour_order(vectors_ND: np.ndarray) -> np.ndarray:
    """The rows int64 [N] in an order in which neighbours are near; the same for the same vectors."""
    order = np.arange(len(vectors_ND))
    waiting = [(0, len(order))]
    while waiting:
        first, end = waiting.pop()
        if end - first <= LEAF:
            continue
        part = order[first:end]
        along_N = _along_main_direction(vectors_ND[part])
        order[first:end] = part[np.argsort(along_N, kind="stable")]
        middle = (first + end) // 2
        waiting += [(first, middle), (middle, end)]
    return order


def _along_main_direction(vectors_ND: np.ndarray) -> np.ndarray:
    """[N]: where each vector is along the direction in which they differ most, by a few steps of power iteration."""
    centred_ND = vectors_ND - vectors_ND.mean(axis=0)
    direction_D = centred_ND[np.abs(centred_ND).sum(axis=1).argmax()].copy()  # of one that is far out
    for _ in range(POWER_STEPS):
        direction_D = (centred_ND @ direction_D) @ centred_ND
        length = np.linalg.norm(direction_D)
        if length == 0:  # all are equal
            return np.zeros(len(vectors_ND), np.float32)
        direction_D /= length
    return centred_ND @ direction_D


def _vectors(table_uri: str, index: ShardIndex) -> tuple[np.ndarray, np.ndarray]:
    """The images' vectors [N, D], projected where they are wide, and the numbers of their samples, ascending."""
    manifest, schema = open_table(table_uri), schema_of(table_uri)
    width = min(manifest.dimension, PROJECTED)
    projection = np.random.default_rng(0).normal(size=(manifest.dimension, width)).astype(np.float32) / width**0.5
    vectors, numbers = [], []
    known: dict[str, dict[str, int]] = {}  # shard -> id -> number
    for file in manifest.files:
        for batch in rows_of_file(storage.join(table_uri, file), "image", schema):
            rows = pa.Table.from_batches([batch])
            matrix_ND = embedding_matrix(rows)
            vectors.append(matrix_ND @ projection if width < manifest.dimension else matrix_ND)
            for name in rows["id"].to_pylist():
                shard = name.partition("#")[0]
                known[shard] = known.get(shard) or index.numbers_of(shard)
                numbers.append(known[shard][name])
    numbers_N = np.array(numbers, np.int64)
    ascending = np.argsort(numbers_N)
    return np.concatenate(vectors)[ascending], numbers_N[ascending]
