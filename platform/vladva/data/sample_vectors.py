"""Sample vectors: what a teacher makes of the captions of each sample, in the order of the shard index.

    <uri>/SHARD.parquet    a row for each sample of the shard: the vectors of its short captions, in whole numbers
    <uri>/_vectors.json    the fingerprints of the data set and of the teacher; written last

A sample's number finds its vectors, as it finds the sample: one row group is read, no table is searched, and nobody
holds all of them. `mine/teacher.py` writes them, from an embeddings table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vladva.config import RunConfig
from vladva.core import storage
from vladva.core.storage import RangedFile
from vladva.data.shard_index import ShardIndex

ROWS_AT_ONCE = 64  # of a file, in a row group: the samples of a chunk are from many places
VECTORS_SCHEMA = pa.schema({"vectors": pa.list_(pa.list_(pa.int16()))})
MANIFEST = "_vectors.json"


@dataclass(frozen=True)
class VectorsManifest:
    """Whose vectors they are, by fingerprints, and how long they are."""

    data: str
    teacher: str
    dimension: int


@dataclass(frozen=True)
class SampleVectors:
    """The vectors of a data set's captions."""

    uri: str
    index: ShardIndex
    dimension: int

    @classmethod
    def open(cls, uri: str, index: ShardIndex) -> SampleVectors:
        """Raises ValueError where there are none, or those of other samples."""
        manifest = find_vectors(uri)
        if manifest is None:
            raise ValueError(f"{uri} holds no teacher's vectors: start the run with jobs/train.py, which makes them")
        if manifest.data != index.fingerprint:
            raise ValueError(
                f"{uri} holds a teacher's vectors of other samples than {index.data_uri} has now; delete the folder"
            )
        return cls(uri, index, manifest.dimension)

    def __call__(self, number: int, caption: int | None) -> np.ndarray:
        """The vector int16 [E] of a caption of sample `number`; zeros, similar to nothing, where there is none."""
        shard, row = self.index.locate(number)
        found = _vectors(vectors_uri(self.uri, self.index.shards[shard]), row // ROWS_AT_ONCE)[row % ROWS_AT_ONCE]
        vector = None if caption is None else found.values[caption].values
        return np.zeros(self.dimension, np.int16) if vector is None or not len(vector) else vector.to_numpy()


def open_teachers(config: RunConfig, indexes: Sequence[ShardIndex]) -> list[SampleVectors]:
    """The teacher's vectors for each data set of a run; none where the run asks for none. Raises ValueError."""
    if config.loss.false_negatives_above is None:
        return []
    return [SampleVectors.open(teacher_uri(config, source), index) for source, index in enumerate(indexes)]


def teacher_uri(config: RunConfig, source: int) -> str:
    """Where a run keeps its teacher's vectors of one of its data sets."""
    return storage.join(config.uri, "teacher", str(source))


def vectors_uri(uri: str, shard: str) -> str:
    """The vectors of a shard."""
    return storage.join(uri, f"{shard}.parquet")


def find_vectors(uri: str) -> VectorsManifest | None:
    """The manifest, which stands for all vectors; None where they are not complete."""
    file = storage.join(uri, MANIFEST)
    return VectorsManifest(**storage.read_json(file)) if storage.exists(file) else None


def write_vectors(uri: str, shard: str, vectors: Sequence[Sequence[np.ndarray | None]]) -> None:
    """Write the vectors of a shard's samples: one for each caption, None for those that have none."""
    rows: list[list[Any]] = [[[] if vector is None else vector for vector in of_sample] for of_sample in vectors]
    body = pa.BufferOutputStream()
    pq.write_table(pa.table({"vectors": rows}, VECTORS_SCHEMA), body, row_group_size=ROWS_AT_ONCE)
    storage.write_bytes_atomically(vectors_uri(uri, shard), body.getvalue().to_pybytes())


def complete_vectors(uri: str, manifest: VectorsManifest) -> None:
    """Say that all shards' vectors are there."""
    storage.write_json(storage.join(uri, MANIFEST), asdict(manifest))


@lru_cache(maxsize=64)
def _vectors(uri: str, group: int) -> pa.ChunkedArray:
    return _file(uri).read_row_group(group)["vectors"]


@lru_cache(maxsize=128)
def _file(uri: str) -> pq.ParquetFile:
    return pq.ParquetFile(RangedFile(uri))
