"""Scan: every shard is read once, by Ray tasks, into a sidecar index and a quarantine table."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

import pyarrow as pa

from vladva.core import storage
from vladva.core.hashing import short_hash
from vladva.core.images import MAX_PIXELS
from vladva.core.progress import Progress
from vladva.data.shard_index import index_uris, manifest_uri, quarantine_uri, read_manifest
from vladva.data.sidecar import (
    CountTokens,
    ListedShard,
    Scanner,
    ScanSettings,
    ShardFacts,
    parquet_bytes,
    sidecar_uri,
)
from vladva.data.tar_reader import Quarantined

VERSION = 4  # of what a scan finds in the same shards
SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz")  # the compressed ones only to be named in the quarantine table


# Two tokenizers that count the tokens of these alike are taken for the same one.
PROBE = [
    "A small red circle, left of 2 big blue squares.",
    "Zwölf Boxkämpfer jagen Viktor",
    "苹果 🍎",
    "antidisestablish",
]


QUARANTINE_SCHEMA = pa.schema({"id": pa.string(), "reason": pa.string(), "detail": pa.string()})


@dataclass(frozen=True)
class ScanSummary:
    """What is in a data set; `num_scanned` of its shards were new or had changed, the others were known."""

    num_shards: int
    num_scanned: int
    num_samples: int
    num_quarantined: int
    reasons: dict[str, int]
    notes: dict[str, int]  # what was passed over or done to samples, and how often
    fingerprint: str
    quarantine_uri: str
    seconds: float

    def __str__(self) -> str:
        found = f"{self.num_samples:,} samples in {self.num_shards:,} shards ({self.num_scanned:,} scanned now)"
        if self.num_quarantined:
            bad = f"{self.num_quarantined:,} quarantined ({_counted(self.reasons)}), see {self.quarantine_uri}"
        else:
            bad = "none quarantined"
        return f"{found}, {bad}" + (f"; {_counted(self.notes)}" if self.notes else "")


class ShardCounts(TypedDict):
    """A shard in the manifest; `damaged` when something is wrong with it as a whole."""

    shard: str
    num_samples: int
    num_bad: int
    damaged: bool


class Manifest(TypedDict):
    """What stands for a complete index."""

    settings: ScanSettings
    listed: list[list[Any]]  # [path, bytes, time of change] of each shard
    shards: list[ShardCounts]
    reasons: dict[str, int]
    notes: dict[str, int]
    fingerprint: str


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

    `verify` decodes every image; without it only headers are read. `count_tokens` gives the length of each caption.
    Raises ValueError when there are no shards, and when more than `max_bad_fraction` of the samples or of the shards
    are bad, naming the worst; the work done is kept.
    """
    started = time.monotonic()
    data_uri, index_uri = index_uris(data_uri, index_uri)
    listed = _list_shards(data_uri)
    settings = ScanSettings(version=VERSION, verify=verify, max_pixels=max_pixels, probe=count_tokens(PROBE))
    known: Manifest | None = read_manifest(index_uri)  # type: ignore[assignment]
    if known and (known["settings"], known["listed"]) == (settings, [list(shard.values()) for shard in listed]):
        _check_fraction(known, max_bad_fraction, data_uri, index_uri)
        return _summary(known, index_uri, 0, started)
    if known:
        storage.delete_file(manifest_uri(index_uri))  # what it stands for is about to change

    facts = _run(Scanner(data_uri, index_uri, count_tokens, settings), listed)
    _remove_orphans(index_uri, listed)
    rows = [Quarantined(*row) for fact in facts for row in fact["quarantined"]]
    table = pa.Table.from_pylist([row._asdict() for row in rows], QUARANTINE_SCHEMA)
    storage.write_bytes_atomically(quarantine_uri(index_uri), parquet_bytes(table))
    notes: Counter[str] = sum((Counter(fact["notes"]) for fact in facts), Counter())
    manifest = Manifest(
        settings=settings,
        listed=[list(shard.values()) for shard in listed],
        shards=[_shard_counts(fact) for fact in facts],
        reasons=dict(Counter(row.reason for row in rows).most_common()),
        notes=dict(notes.most_common()),
        fingerprint=short_hash([[fact["shard"], fact["digest"]] for fact in facts]),
    )
    _check_fraction(manifest, max_bad_fraction, data_uri, index_uri)
    storage.write_json(manifest_uri(index_uri), manifest)
    return _summary(manifest, index_uri, sum(fact["scanned"] for fact in facts), started)


def _list_shards(data_uri: str) -> list[ListedShard]:
    start = len(data_uri.rstrip("/")) + 1
    listed = [
        ListedShard(shard=info.uri[start:], size=info.size, changed=info.changed)
        for info in storage.list_infos(data_uri)
        if info.uri.endswith(SHARD_SUFFIXES) and not info.uri[start:].startswith("_")
    ]
    if not listed:
        raise ValueError(f"{data_uri} holds no .tar shards: check the path, it must be the folder above the shards")
    return listed


def _run(scanner: Scanner, listed: list[ListedShard]) -> list[ShardFacts]:
    """The facts about every shard, in the order listed; one Ray task per shard."""
    import ray.data

    scanned = ray.data.from_items(listed, override_num_blocks=len(listed)).map(scanner)  # type: ignore[arg-type]
    facts: dict[str, ShardFacts] = {}
    with Progress("scanning shards", len(listed)) as progress:
        for row in scanned.iter_rows():
            fact: ShardFacts = json.loads(row["facts"])
            facts[fact["shard"]] = fact
            progress.advance(1)
    return [facts[shard["shard"]] for shard in listed]


def _remove_orphans(index_uri: str, listed: list[ListedShard]) -> None:
    """Remove the sidecars of shards that are gone."""
    wanted = {sidecar_uri(index_uri, shard["shard"]) for shard in listed} | {quarantine_uri(index_uri)}
    for uri in storage.list_files(index_uri, ".parquet"):
        if uri not in wanted:
            storage.delete_file(uri)


def _shard_counts(fact: ShardFacts) -> ShardCounts:
    ids = [name for name, _, _ in fact["quarantined"]]
    num_bad = sum(name != fact["shard"] for name in ids)
    return ShardCounts(
        shard=fact["shard"], num_samples=fact["num_samples"], num_bad=num_bad, damaged=num_bad < len(ids)
    )


def _check_fraction(manifest: Manifest, allowed: float, data_uri: str, index_uri: str) -> None:
    shards = manifest["shards"]
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
            f"than max_bad_fraction = {allowed:g} allows: {_counted(manifest['reasons'])}. The worst: "
            f"{', '.join(named)}. Repair or remove what {quarantine_uri(index_uri)} lists, or raise max_bad_fraction"
        )
    if samples == bad_samples:
        raise ValueError(f"{data_uri}: the data set is empty, none of its {len(shards)} shards holds a good sample")


def _summary(manifest: Manifest, index_uri: str, num_scanned: int, started: float) -> ScanSummary:
    return ScanSummary(
        num_shards=len(manifest["shards"]),
        num_scanned=num_scanned,
        num_samples=sum(shard["num_samples"] for shard in manifest["shards"]),
        num_quarantined=sum(manifest["reasons"].values()),
        reasons=manifest["reasons"],
        notes=manifest["notes"],
        fingerprint=manifest["fingerprint"],
        quarantine_uri=quarantine_uri(index_uri),
        seconds=time.monotonic() - started,
    )


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
