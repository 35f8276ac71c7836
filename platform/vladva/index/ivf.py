"""IVF: the vectors of a Lance data set partitioned by similarity and quantised, here or by many workers."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    import lance

IndexType = Literal["exact", "IVF_SQ", "IVF_HNSW_SQ", "IVF_PQ"]

MEMORY_LIMIT = 2 << 30  # bytes of vectors up to which searches hold them in memory, and lists of a fourth as many
ROWS_IN_MEMORY, ROWS_ON_DISK = 128, 256  # of a partition: from memory smaller ones cost nothing more, from disk a read
PQ_ROWS = 65_536  # that the codes of product quantisation are trained on where several workers share them
GRAPH_ROWS = 200_000  # of a partition that is searched by a graph (HNSW)
TRAINING_BYTES = 4 << 30  # of vectors that centroids are learned from
SAMPLED_ROWS, LEAST_SAMPLED_ROWS = 256, 32  # for each centroid: Lance's own number; fewer leave centroids by chance
VECTORS = "embedding_idx"  # name of the index


def partition(dataset: lance.LanceDataset, index_type: IndexType, workers: int) -> int:
    """Partition and quantise the vectors, with several workers on the cluster; returns the number of partitions.

    Fewer rows than PQ_ROWS are one worker's for IVF_PQ. Every worker leaves a segment with all partitions. They stay
    apart, because each quantises within the bounds of its own vectors; a search looks into each: there should be few.
    """
    rows = GRAPH_ROWS if index_type == "IVF_HNSW_SQ" else ROWS_ON_DISK
    if index_type == "IVF_SQ" and workers == 1 and fits_memory(dataset):
        rows = ROWS_IN_MEMORY
    count, dimension = dataset.count_rows(), dataset.schema.field("embedding").type.list_size
    partitions, per_centroid = training_sample(count, dimension, rows)
    options: dict[str, Any] = {"metric": "cosine", "replace": True, "name": VECTORS}
    if index_type == "IVF_PQ":
        workers = workers if count >= PQ_ROWS else 1
        options["num_sub_vectors"] = _sub_vectors(dimension)
    if workers > 1:
        import lance_ray

        spread = {"scheduling_strategy": "SPREAD"}  # a worker uses all cores of its machine
        lance_ray.create_index(
            dataset.uri,
            "embedding",
            index_type,
            num_workers=workers,
            num_partitions=partitions,
            sample_rate=per_centroid,
            ray_remote_args=spread,
            storage_options=dataset.initial_storage_options,
            **options,
        )
        dataset.checkout_latest()
    else:
        if per_centroid < SAMPLED_ROWS:
            options["streaming_sample_rate"] = per_centroid
        # The size, not the number: Lance keeps it and holds to it when it takes in new rows.
        dataset.create_index("embedding", index_type, target_partition_size=max(rows, count // partitions), **options)
    return num_partitions(dataset)


def training_sample(count: int, dimension: int, rows: int) -> tuple[int, int]:
    """(partitions, rows that each centroid is learned from), of so many vectors and about `rows` in a partition.

    One process learns the centroids, so what it reads is bounded: of more vectors it reads a share, and at last there
    are fewer partitions.
    """
    most = TRAINING_BYTES // (4 * dimension)
    partitions = max(1, min(count // rows, most // LEAST_SAMPLED_ROWS))
    return partitions, min(SAMPLED_ROWS, most // partitions)


def fits_memory(dataset: lance.LanceDataset, limit: int = MEMORY_LIMIT) -> bool:
    """Whether the vectors, of at most `limit` bytes, are few enough for searches to hold them in memory."""
    return 4 * dataset.count_rows() * dataset.schema.field("embedding").type.list_size <= limit


def num_partitions(dataset: lance.LanceDataset) -> int:
    """Partitions of the vector index."""
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")  # they would come along otherwise
    return max(segment["num_partitions"] for segment in dataset.stats.index_stats(VECTORS)["segments"])


def centroids(dataset: lance.LanceDataset) -> np.ndarray:
    """The partitions' centroids, float32 [P, D]."""
    found = dataset.get_ivf_model(VECTORS).centroids
    return np.asarray(found.flatten(), np.float32).reshape(-1, found.type.list_size)


def _sub_vectors(dimension: int) -> int:
    """Product quantisation: sub-vectors of eight numbers, one byte each, or of the next size that divides D."""
    return dimension // next(size for size in (8, 4, 2, 1) if dimension % size == 0)
