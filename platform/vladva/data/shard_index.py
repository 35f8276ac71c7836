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
import io
import json
import tarfile
import time
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vladva import storage
from vladva.progress import Progress
from vladva.sidecars import (
    MAX_PIXELS,
    CountTokens,
    SampleRef,
    Scanner,
    parquet_bytes,
    read_ids,
    read_refs,
    short_hash,
    sidecar_uri,
)
from vladva.storage import ByteRange
from vladva.tars import Quarantined

SHARD_ENDINGS = (".tar", ".tar.gz", ".tgz")  # the compressed ones only to be named in the quarantine table
# Two tokenizers that count the tokens of these alike are taken for the same one.
PROBE = [
    "A small red circle, left of 2 big blue squares.",
    "Zwölf Boxkämpfer jagen Viktor",
    "苹果 🍎",
    "antidisestablish",
]
QUARANTINE_SCHEMA = pa.schema({"id": pa.string(), "reason": pa.string(), "detail": pa.string()})


# --- writing ---------------------------------------------------------------------------------------------------------


class ShardWriter:
    """Writes samples as WebDataset tars `000000.tar`, `000001.tar`, ... in the folder `uri`.

    with ShardWriter("s3://bucket/train", samples_per_shard=1000) as shards:
        shards.write("000017", {"jpg": picture, "json": b'{"captions": ["a red circle"]}'})

    The bytes depend on the samples only. A shard appears when it is complete; after an exception the last one does not.
    """

    def __init__(self, uri: str, samples_per_shard: int) -> None:
        self.uri = uri
        self.samples_per_shard = samples_per_shard
        self.num_shards = 0
        self._start()

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: ending -> content. Raises ValueError for a key that would not come back as it is."""
        if "." in key.rpartition("/")[2] or not key:
            raise ValueError(f"key {key!r}: WebDataset cuts names at the first dot; use a key without one")
        for ending, content in members.items():
            header = tarfile.TarInfo(f"{key}.{ending}")  # time, owner and rights are constants
            header.size = len(content)
            self._tar.addfile(header, io.BytesIO(content))
        self._in_shard += 1
        if self._in_shard == self.samples_per_shard:
            self._finish()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None and self._in_shard:
            self._finish()

    def _start(self) -> None:
        self._in_shard = 0
        self._body = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._body, mode="w", encoding="utf-8")  # noqa: SIM115 (_finish closes it)

    def _finish(self) -> None:
        self._tar.close()
        storage.write_bytes_atomically(storage.join(self.uri, f"{self.num_shards:06d}.tar"), self._body.getvalue())
        self.num_shards += 1
        self._start()


# --- scanning --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScanSummary:
    """What is in a data set; `num_scanned` of its shards were new or had changed, the others were known."""

    num_shards: int
    num_scanned: int
    num_samples: int
    num_quarantined: int
    reasons: dict[str, int]
    fingerprint: str
    quarantine_uri: str
    seconds: float

    def __str__(self) -> str:
        found = f"{self.num_samples:,} samples in {self.num_shards:,} shards ({self.num_scanned:,} scanned now)"
        if not self.num_quarantined:
            return f"{found}, none quarantined"
        return f"{found}, {self.num_quarantined:,} quarantined ({_counted(self.reasons)}), see {self.quarantine_uri}"


def scan(
    data_uri: str,
    count_tokens: CountTokens,
    index_uri: str | None = None,
    *,
    verify: bool = True,
    max_pixels: int = MAX_PIXELS,
    max_bad_fraction: float = 0.05,
) -> ScanSummary:
    """Index the shards below `data_uri`, one Ray task each, and only those that are new or have changed.

    `verify` decodes every picture; without it only headers are read. `count_tokens` gives the length of each caption.
    Raises ValueError when there are no shards, and when more than `max_bad_fraction` of the samples or of the shards
    are bad, naming the worst; the work done is kept.
    """
    started = time.monotonic()
    data_uri, index_uri = _places(data_uri, index_uri)
    listed = _list_shards(data_uri)
    settings = {"version": 2, "verify": verify, "max_pixels": max_pixels, "probe": count_tokens(PROBE)}
    stamp = {"settings": settings, "listed": listed}
    manifest = _read_manifest(index_uri)
    if manifest and stamp.items() <= manifest.items():
        _check_fraction(manifest["shards"], manifest["reasons"], max_bad_fraction, data_uri, index_uri)
        return _summary(manifest, index_uri, 0, started)
    if manifest:
        storage.delete_file(_manifest_uri(index_uri))  # what it stands for is about to change

    facts = _run(Scanner(data_uri, index_uri, count_tokens, settings), listed)
    _remove_orphans(index_uri, listed)
    rows = [Quarantined(*row) for fact in facts for row in fact["quarantined"]]
    table = pa.Table.from_pylist([row._asdict() for row in rows], QUARANTINE_SCHEMA)
    storage.write_bytes_atomically(_quarantine_uri(index_uri), parquet_bytes(table))
    shards = [_shard_counts(fact) for fact in facts]
    reasons = dict(Counter(row.reason for row in rows).most_common())
    _check_fraction(shards, reasons, max_bad_fraction, data_uri, index_uri)
    fingerprint = short_hash([[fact["shard"], fact["digest"]] for fact in facts])
    manifest = {**stamp, "shards": shards, "reasons": reasons, "fingerprint": fingerprint}
    storage.write_json(_manifest_uri(index_uri), manifest)
    return _summary(manifest, index_uri, sum(fact["scanned"] for fact in facts), started)


def _list_shards(data_uri: str) -> list[list[Any]]:
    """[path below `data_uri`, bytes, time of change] of each shard."""
    start = len(data_uri.rstrip("/")) + 1
    infos = [(info.uri[start:], info.size, info.changed) for info in storage.list_infos(data_uri)]
    listed = [[path, *rest] for path, *rest in infos if path.endswith(SHARD_ENDINGS) and not path.startswith("_")]
    if not listed:
        raise ValueError(f"{data_uri} holds no .tar shards: check the path, it must be the folder above the shards")
    return listed


def _run(scanner: Scanner, listed: list[list[Any]]) -> list[dict[str, Any]]:
    """The facts about every shard, in the order listed; one Ray task per shard."""
    import ray.data

    rows = [{"shard": shard, "size": size, "changed": changed} for shard, size, changed in listed]
    scanned = ray.data.from_items(rows, override_num_blocks=len(rows)).map(scanner)
    facts = {}
    with Progress("scanning shards", len(rows)) as progress:
        for fact in (json.loads(row["facts"]) for row in scanned.iter_rows()):
            facts[fact["shard"]] = fact
            progress.advance(1)
    return [facts[shard] for shard, _, _ in listed]


def _remove_orphans(index_uri: str, listed: list[list[Any]]) -> None:
    """Remove the sidecars of shards that are gone."""
    wanted = {sidecar_uri(index_uri, shard) for shard, _, _ in listed} | {_quarantine_uri(index_uri)}
    for uri in storage.list_files(index_uri, ".parquet"):
        if uri not in wanted:
            storage.delete_file(uri)


def _shard_counts(fact: dict[str, Any]) -> dict[str, Any]:
    """One row of the manifest; `damaged` when something is wrong with the shard as a whole."""
    ids = [row[0] for row in fact["quarantined"]]
    num_bad = sum(name != fact["shard"] for name in ids)
    names = {"shard": fact["shard"], "num_samples": fact["num_samples"]}
    return {**names, "num_bad": num_bad, "damaged": num_bad < len(ids)}


def _check_fraction(
    shards: list[dict[str, Any]], reasons: dict[str, int], allowed: float, data_uri: str, index_uri: str
) -> None:
    bad_samples = sum(shard["num_bad"] for shard in shards)
    samples = bad_samples + sum(shard["num_samples"] for shard in shards)
    bad_shards = sum(shard["damaged"] for shard in shards)
    if bad_samples > allowed * samples or bad_shards > allowed * len(shards):
        worst = sorted(shards, key=lambda shard: (shard["damaged"], shard["num_bad"]), reverse=True)[:5]
        named = [
            f"{shard['shard']} ({shard['num_bad']} of {shard['num_bad'] + shard['num_samples']} samples"
            f"{', damaged' if shard['damaged'] else ''})"
            for shard in worst
            if shard["damaged"] or shard["num_bad"]
        ]
        raise ValueError(
            f"{data_uri}: {bad_samples} of {samples} samples and {bad_shards} of {len(shards)} shards are bad, more "
            f"than max_bad_fraction = {allowed:g} allows: {_counted(reasons)}. The worst: {', '.join(named)}. "
            f"Repair or remove what {_quarantine_uri(index_uri)} lists, or raise max_bad_fraction"
        )
    if samples == bad_samples:
        raise ValueError(f"{data_uri}: the data set is empty, none of its {len(shards)} shards holds a good sample")


def _summary(manifest: dict[str, Any], index_uri: str, num_scanned: int, started: float) -> ScanSummary:
    return ScanSummary(
        num_shards=len(manifest["shards"]),
        num_scanned=num_scanned,
        num_samples=sum(shard["num_samples"] for shard in manifest["shards"]),
        num_quarantined=sum(manifest["reasons"].values()),
        reasons=manifest["reasons"],
        fingerprint=manifest["fingerprint"],
        quarantine_uri=_quarantine_uri(index_uri),
        seconds=time.monotonic() - started,
    )


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


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
    """The encoded pictures of `refs`: one request per run of neighbours, `in_flight` at a time.

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
