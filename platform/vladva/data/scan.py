"""Scan: every shard is read once, by Ray tasks, into a sidecar index and a quarantine table."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from vladva.core import storage
from vladva.core.hashing import short_hash
from vladva.core.images import MAX_PIXELS
from vladva.core.progress import Progress
from vladva.data.shard_index import index_uris, manifest_uri, quarantine_uri, read_manifest
from vladva.data.sidecar import CountTokens, Scanner, parquet_bytes, sidecar_uri
from vladva.data.tar_reader import Quarantined

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

    `verify` decodes every image; without it only headers are read. `count_tokens` gives the length of each caption.
    Raises ValueError when there are no shards, and when more than `max_bad_fraction` of the samples or of the shards
    are bad, naming the worst; the work done is kept.
    """
    started = time.monotonic()
    data_uri, index_uri = index_uris(data_uri, index_uri)
    listed = _list_shards(data_uri)
    settings = {"version": 2, "verify": verify, "max_pixels": max_pixels, "probe": count_tokens(PROBE)}
    stamp = {"settings": settings, "listed": listed}
    manifest = read_manifest(index_uri)
    if manifest and stamp.items() <= manifest.items():
        _check_fraction(manifest["shards"], manifest["reasons"], max_bad_fraction, data_uri, index_uri)
        return _summary(manifest, index_uri, 0, started)
    if manifest:
        storage.delete_file(manifest_uri(index_uri))  # what it stands for is about to change

    facts = _run(Scanner(data_uri, index_uri, count_tokens, settings), listed)
    _remove_orphans(index_uri, listed)
    rows = [Quarantined(*row) for fact in facts for row in fact["quarantined"]]
    table = pa.Table.from_pylist([row._asdict() for row in rows], QUARANTINE_SCHEMA)
    storage.write_bytes_atomically(quarantine_uri(index_uri), parquet_bytes(table))
    shards = [_shard_counts(fact) for fact in facts]
    reasons = dict(Counter(row.reason for row in rows).most_common())
    _check_fraction(shards, reasons, max_bad_fraction, data_uri, index_uri)
    fingerprint = short_hash([[fact["shard"], fact["digest"]] for fact in facts])
    manifest = {**stamp, "shards": shards, "reasons": reasons, "fingerprint": fingerprint}
    storage.write_json(manifest_uri(index_uri), manifest)
    return _summary(manifest, index_uri, sum(fact["scanned"] for fact in facts), started)


def _list_shards(data_uri: str) -> list[list[Any]]:
    """[path below `data_uri`, bytes, time of change] of each shard."""
    start = len(data_uri.rstrip("/")) + 1
    infos = [(info.uri[start:], info.size, info.changed) for info in storage.list_infos(data_uri)]
    listed = [[path, *rest] for path, *rest in infos if path.endswith(SHARD_SUFFIXES) and not path.startswith("_")]
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
    wanted = {sidecar_uri(index_uri, shard) for shard, _, _ in listed} | {quarantine_uri(index_uri)}
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
            f"Repair or remove what {quarantine_uri(index_uri)} lists, or raise max_bad_fraction"
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
        quarantine_uri=quarantine_uri(index_uri),
        seconds=time.monotonic() - started,
    )


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())
