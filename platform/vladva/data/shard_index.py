"""Shard index: the table beside the WebDataset tars of a data set that makes single samples readable.

`scan.py` reads every shard once and leaves, in `_index/` beside the shards,

    SHARD.parquet       one row per good sample: id, where its bytes are, captions with their lengths in tokens, size
    quarantine.parquet  the others: id, reason, detail
    manifest.json       the shards with their sizes and numbers of samples; written last, so it stands for a whole index

Afterwards samples have numbers 0 .. N-1 in the order (shard, offset), `ShardIndex.samples` finds any run of them, and
`read_samples` fetches their bytes by ranged reads, each checked against the checksum that the scan saw.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.hashing import digest
from vladva.data.image_refs import read_images
from vladva.data.sidecar import SampleRef, read_ids, read_refs, sidecar_uri


@dataclass(frozen=True)
class ShardIndex:
    """The index of a scanned data set. Holds a few bytes per shard; sample rows are read where they are asked for."""

    data_uri: str
    index_uri: str
    fingerprint: str
    version: str  # changes with every change of the index
    shards: tuple[str, ...]
    ends: tuple[int, ...]  # number of the first sample after each shard

    @classmethod
    def open(cls, data_uri: str, index_uri: str | None = None) -> ShardIndex:
        """Open the index that a scan has completed. Raises ValueError when there is none."""
        data_uri, index_uri = index_uris(data_uri, index_uri)
        try:
            content = storage.read_bytes(manifest_uri(index_uri))
        except FileNotFoundError:
            raise ValueError(f"{data_uri} has no complete index in {index_uri}: scan its shards first") from None
        manifest, version = json.loads(content), digest(content).hex()
        shards = tuple(shard["shard"] for shard in manifest["shards"])
        ends = tuple(accumulate(shard["num_samples"] for shard in manifest["shards"]))
        return cls(data_uri, index_uri, manifest["fingerprint"], version, shards, ends)

    @property
    def num_samples(self) -> int:
        """Samples are numbered from 0 up to here."""
        return self.ends[-1]

    @property
    def num_quarantined(self) -> int:
        """Rows of the quarantine table."""
        return pq.read_metadata(pa.BufferReader(storage.read_bytes(quarantine_uri(self.index_uri)))).num_rows

    def locate(self, number: int) -> tuple[int, int]:
        """Which shard a sample is in, and which of its samples it is."""
        shard = bisect_right(self.ends, number)
        return shard, number - (self.ends[shard - 1] if shard else 0)

    def numbers_of(self, shard: str) -> dict[str, int]:
        """The number of each of a shard's samples, by its id; none of a shard that is not in the index."""
        number = self._numbers.get(shard)
        if number is None:
            return {}
        first = self.ends[number - 1] if number else 0
        return {name: first + i for i, name in enumerate(read_ids(sidecar_uri(self.index_uri, shard)))}

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {shard: number for number, shard in enumerate(self.shards)}

    def samples(self, first: int, count: int) -> list[SampleRef]:
        """Samples first .. first + count - 1. Raises IndexError."""
        if first < 0 or count < 0 or first + count > self.num_samples:
            raise IndexError(f"samples {first} to {first + count} of {self.num_samples}")
        refs: list[SampleRef] = []
        while len(refs) < count:
            number = first + len(refs)
            shard, row = self.locate(number)
            sidecar = sidecar_uri(self.index_uri, self.shards[shard])
            refs += read_refs(sidecar, self.version, row, min(count - len(refs), self.ends[shard] - number))
        return refs


def read_samples(data_uri: str, refs: Sequence[SampleRef], in_flight: int = 8) -> list[bytes]:
    """The encoded images of `refs`: one request per run of neighbours, `in_flight` at a time.

    Of samples of text alone, their JSON. Raises ValueError when a shard is not the one that was scanned.
    """
    return read_mixed_samples([(data_uri, ref) for ref in refs], in_flight)


def read_mixed_samples(samples: Sequence[tuple[str, SampleRef]], in_flight: int = 8) -> list[bytes]:
    """As `read_samples`, of (data set, sample) pairs."""
    return read_images([ref.image(data_uri) for data_uri, ref in samples], in_flight)


# --- files of the index ----------------------------------------------------------------------------------------------


def index_uris(data_uri: str, index_uri: str | None) -> tuple[str, str]:
    """Both absolute; the index is beside the shards where no other folder is named."""
    data_uri = storage.absolute(data_uri)
    return data_uri, storage.absolute(index_uri or storage.join(data_uri, "_index"))


def quarantine_uri(index_uri: str) -> str:
    """The table of what is not used."""
    return storage.join(index_uri, "quarantine.parquet")


def manifest_uri(index_uri: str) -> str:
    """What is written last."""
    return storage.join(index_uri, "manifest.json")


def read_manifest(index_uri: str) -> dict[str, Any] | None:
    """The manifest; None where the index is not complete."""
    try:
        return storage.read_json(manifest_uri(index_uri))
    except FileNotFoundError:
        return None
