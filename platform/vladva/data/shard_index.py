"""Shards: WebDataset tars, and the index beside them that makes single samples readable.

`scan` reads every shard once and leaves, in `_index/` beside the shards,

    SHARD.parquet       one row per good sample: id, where its bytes are, captions with their lengths in tokens, size
    quarantine.parquet  the others: id, reason, detail
    manifest.json       the shards with their sizes and numbers of samples; written last, so it stands for a whole index

Afterwards samples have numbers 0 .. N-1 in the order (shard, offset), `ShardIndex.samples` finds any run of them, and
`read_samples` fetches their bytes by ranged reads, each checked against the checksum that the scan saw.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.storage import ByteRange
from vladva.data.sidecar import SampleRef, read_ids, read_refs, sidecar_uri

# --- writing ---------------------------------------------------------------------------------------------------------


# --- scanning --------------------------------------------------------------------------------------------------------


# --- reading ---------------------------------------------------------------------------------------------------------


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
        data_uri, index_uri = _places(data_uri, index_uri)
        try:
            content = storage.read_bytes(_manifest_uri(index_uri))
        except FileNotFoundError:
            raise ValueError(f"{data_uri} has no complete index in {index_uri}: scan its shards first") from None
        manifest, version = json.loads(content), hashlib.blake2b(content, digest_size=8).hexdigest()
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
        return pq.read_metadata(pa.BufferReader(storage.read_bytes(_quarantine_uri(self.index_uri)))).num_rows

    def numbers_of(self, shard: str) -> dict[str, int]:
        """The number of each of a shard's samples, by its id; none of a shard that is not in the index."""
        where = self._where.get(shard)
        if where is None:
            return {}
        first = self.ends[where - 1] if where else 0
        return {name: first + i for i, name in enumerate(read_ids(sidecar_uri(self.index_uri, shard)))}

    @cached_property
    def _where(self) -> dict[str, int]:
        return {shard: number for number, shard in enumerate(self.shards)}

    def samples(self, first: int, count: int) -> list[SampleRef]:
        """Samples first .. first + count - 1. Raises IndexError."""
        if first < 0 or count < 0 or first + count > self.num_samples:
            raise IndexError(f"samples {first} to {first + count} of {self.num_samples}")
        refs: list[SampleRef] = []
        while len(refs) < count:
            number = first + len(refs)
            shard = bisect_right(self.ends, number)
            before = self.ends[shard - 1] if shard else 0
            sidecar = sidecar_uri(self.index_uri, self.shards[shard])
            refs += read_refs(sidecar, self.version, number - before, min(count - len(refs), self.ends[shard] - number))
        return refs


def read_samples(data_uri: str, refs: Sequence[SampleRef], in_flight: int = 8) -> list[bytes]:
    """The encoded images of `refs`: one request per run of neighbours, `in_flight` at a time.

    Of samples of text alone, their JSON. Raises ValueError when a shard is not the one that was scanned.
    """
    return read_mixed_samples([(data_uri, ref) for ref in refs], in_flight)


def read_mixed_samples(places: Sequence[tuple[str, SampleRef]], in_flight: int = 8) -> list[bytes]:
    """As `read_samples`, of (data set, sample) pairs."""
    ranges = [ByteRange(storage.join(data_uri, ref.shard), ref.offset, ref.length) for data_uri, ref in places]
    bodies = storage.read_ranges(ranges, in_flight)
    for (data_uri, ref), body in zip(places, bodies, strict=True):
        if zlib.crc32(body) != ref.crc32:
            raise ValueError(f"{ref.id} is not what the scan saw there: the shard has changed, scan {data_uri} again")
    return bodies


# --- files of the index ----------------------------------------------------------------------------------------------


def _places(data_uri: str, index_uri: str | None) -> tuple[str, str]:
    data_uri = storage.absolute(data_uri)
    return data_uri, storage.absolute(index_uri or storage.join(data_uri, "_index"))


def _quarantine_uri(index_uri: str) -> str:
    return storage.join(index_uri, "quarantine.parquet")


def _manifest_uri(index_uri: str) -> str:
    return storage.join(index_uri, "manifest.json")


def _read_manifest(index_uri: str) -> dict[str, Any] | None:
    try:
        return storage.read_json(_manifest_uri(index_uri))
    except FileNotFoundError:
        return None
