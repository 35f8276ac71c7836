"""Prepare: from what people have to scanned shards.

    source --plan--> shard tasks --one Ray task each--> shards and results --scan--> index --check--> Prepared

Tars that exist are scanned where they are. Everything else is written as tars below `out_uri`, where `_prepare/` keeps

    plan.json, lots/     what is meant for each shard (`plan.py`)
    receipts/            what became of it (`shard_tasks.py`)
    quarantine.parquet   everything that was refused, by listing, writing or scan, with its location in the source

Every entry of the source is in the index, or further captions of one that is, or left out, or in the quarantine table;
the numbers are checked at the end, and so is every image's checksum.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from functools import partial

from vladva.core import ray_tasks, storage
from vladva.core.hashing import short_hash
from vladva.core.progress import Progress
from vladva.core.shared_path import check_paths
from vladva.data.scan import scan
from vladva.data.sidecar import CountTokens
from vladva.data.source import Rejected, Source, SourceOptions, open_source
from vladva.prepare.join import Join
from vladva.prepare.plan import Plan, make_plan, open_plan, plan_config, read_rejected, table_uri, write_rejected
from vladva.prepare.shard_tasks import ShardResult, ShardTask, shard_name, verify_shard
from vladva.prepare.staging import readable


@dataclass(frozen=True)
class Prepared:
    """What has become of a source: `found` = samples + merged + left out + quarantined."""

    uri: str
    format: str
    found: int
    samples: int
    merged: int  # rows that gave further captions to a sample
    left_out: dict[str, int]
    quarantined: dict[str, int]  # by reason
    notes: dict[str, int]  # what was done to images and captions, or passed over, and how often
    quarantine_uri: str
    shards: int
    written: int  # of the shards, in this run
    scanned: int
    joined: dict[str, int]  # rows and samples of a join, with and without a partner; empty without one
    unmatched_uri: str
    seconds: float

    def __str__(self) -> str:
        quarantined = sum(self.quarantined.values())
        merged = f", {self.merged:,} rows with more captions of the same" if self.merged else ""
        left_out = "".join(f", {count:,} left out ({reason})" for reason, count in self.left_out.items())
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.quarantined.items())
        refused = f", {quarantined:,} quarantined ({reasons}), see {self.quarantine_uri}" if quarantined else ""
        lines = [f"{self.found:,} found: {self.samples:,} samples{merged}{left_out}{refused or ', none quarantined'}"]
        if self.notes:
            lines.append(", ".join(f"{count:,} {note}" for note, count in self.notes.items()))
        if self.joined:
            lines.append(
                "captions joined: {rows:,} rows for {samples:,} samples; {rows_without:,} rows without a sample, "
                "{samples_without:,} samples without a row, {rows_rejected:,} rows that cannot be read; see ".format(
                    **self.joined
                )
                + self.unmatched_uri
            )
        now = f"{self.written:,} written and {self.scanned:,} scanned now, {self.seconds:.0f} s"
        return "\n".join([*lines, f"{self.uri}: {self.shards:,} shards, {now}"])


def scan_in_place(source: Source, count_tokens: CountTokens, *, verify: bool, max_bad_fraction: float) -> Prepared:
    """Scan tars where they are. Raises ValueError as `scan` does."""
    left_out = Counter(unused.reason for unused in source.unused_files(set()))
    summary = scan(source.uri, count_tokens, verify=verify, max_bad_fraction=max_bad_fraction)
    return Prepared(
        uri=source.uri,
        format=source.format,
        found=summary.num_samples + summary.num_quarantined + left_out.total(),
        samples=summary.num_samples,
        merged=0,
        left_out=dict(left_out.most_common()),
        quarantined=summary.reasons,
        notes=summary.notes,
        quarantine_uri=summary.quarantine_uri,
        shards=summary.num_shards,
        written=0,
        scanned=summary.num_scanned,
        joined={},
        unmatched_uri="",
        seconds=summary.seconds,
    )


def prepare(
    source_uri: str,
    out_uri: str,
    count_tokens: CountTokens,
    options: SourceOptions | None = None,
    *,
    join: Join | None = None,
    samples_per_shard: int = 1000,
    verify: bool = True,
    max_bad_fraction: float = 0.05,
    overwrite: bool = False,
) -> Prepared:
    """Write and scan shards below `out_uri`, or scan tars below the source where that is empty, on Ray.

    Goes on where an earlier call with the same arguments was. Raises ValueError, with the fix, for a source that cannot
    be used, for shards of another source or of other options, and for more than `max_bad_fraction` bad samples.
    """
    started = time.monotonic()
    out_uri = storage.absolute(out_uri) if out_uri else ""
    source = open_source(source_uri, options or SourceOptions(), storage.join(out_uri, "_prepare"))
    check_uris(source, storage.absolute(source_uri), out_uri, join)
    ray_tasks.connect()  # not before: mistakes in a name are told at once
    check_paths(reads=[("SOURCE", source_uri)], writes=[("--out", out_uri)])
    if not out_uri:
        return scan_in_place(source, count_tokens, verify=verify, max_bad_fraction=max_bad_fraction)
    config = plan_config(source, join, samples_per_shard)
    plan = open_plan(out_uri, config, overwrite) or make_plan(source, out_uri, join, samples_per_shard, config)
    refused = read_rejected(out_uri)
    check_fraction(refused, plan, max_bad_fraction, out_uri)

    results = write_shards(source, out_uri, plan)
    refused += [Rejected(*row) for result in results for row in result["rejected"]]
    write_rejected(out_uri, "quarantine", refused)
    check_fraction(refused, plan, max_bad_fraction, out_uri)

    summary = scan(out_uri, count_tokens, verify=verify, max_bad_fraction=1.0)
    full = [result["lot"] for result in results if result["bytes"]]
    if summary.num_shards != len(full):
        raise ValueError(f"{out_uri} holds {summary.num_shards} shards, {len(full)} of them written by this job")
    refused += verify_shards(out_uri, full)
    write_rejected(out_uri, "quarantine", refused)
    check_fraction(refused, plan, max_bad_fraction, out_uri)
    notes = sum((Counter(result["notes"]) for result in results), Counter(summary.notes))
    prepared = Prepared(
        uri=out_uri,
        format=source.format,
        found=plan["found"],
        samples=summary.num_samples,
        merged=plan["merged"],
        left_out=plan["left_out"],
        quarantined=dict(Counter(row.reason for row in refused).most_common()),
        notes=dict(notes.most_common()),
        quarantine_uri=table_uri(out_uri, "quarantine"),
        shards=summary.num_shards,
        written=sum(result["written"] for result in results if result["bytes"]),
        scanned=summary.num_scanned,
        joined=plan["joined"],
        unmatched_uri=table_uri(out_uri, "unmatched"),
        seconds=time.monotonic() - started,
    )
    accounted = prepared.samples + prepared.merged + sum(prepared.left_out.values()) + len(refused)
    assert accounted == prepared.found, f"{prepared.found} found, {accounted} accounted for: {prepared}"
    return prepared


def check_uris(source: Source, named_uri: str, out_uri: str, join: Join | None) -> None:
    """Raise ValueError where the source and --out do not go together."""
    tars = source.format == "webdataset"
    if tars and out_uri and join is None:
        raise ValueError(
            f"{source.uri} holds tar shards, which are used as they are: leave --out away to scan them where they are "
            f"(they are rewritten only to join captions, with --captions-from)"
        )
    if not out_uri and (join or not tars):
        what = "to join captions shards are written" if tars else f"{source.format} is written as shards"
        raise ValueError(f"{source.uri}: {what}, name their folder with --out")
    if out_uri and f"{out_uri}/".startswith(f"{named_uri}/"):  # the next time it would be taken for the source
        raise ValueError(f"--out {out_uri} is inside the source {named_uri}: choose a folder outside it")


# --- the work --------------------------------------------------------------------------------------------------------


def write_shards(source: Source, out_uri: str, plan: Plan) -> list[ShardResult]:
    """Write the shards that are not there yet; the results of all, by number."""
    task = ShardTask(out_uri, source.images_uri, short_hash(plan["stamp"]))
    results: list[ShardResult] = []
    with Progress("writing shards", plan["samples"]) as progress:
        for result in ray_tasks.each(task, range(plan["lots"])):
            results.append(result)
            progress.advance(result["samples"])
    return sorted(results, key=lambda result: result["lot"])


def verify_shards(out_uri: str, numbers: list[int]) -> list[Rejected]:
    """What the scan has put into quarantine. Raises ValueError where a shard is not what was written."""
    verify = partial(verify_shard, out_uri, storage.join(out_uri, "_index"))
    refused: list[Rejected] = []
    with Progress("checking shards", len(numbers)) as progress:
        for found in ray_tasks.each(verify, numbers):
            if found["wrong"]:
                raise ValueError(
                    f"{storage.join(out_uri, shard_name(found['lot']))} does not hold what was written into it "
                    f"({len(found['wrong'])} samples differ, {', '.join(found['wrong'][:3])}): delete it and run again"
                )
            refused += [Rejected(*row) for row in found["rejected"]]
            progress.advance(1)
    return sorted(refused)


def check_fraction(refused: list[Rejected], plan: Plan, allowed: float, out_uri: str) -> None:
    """Raise ValueError if too much was refused, or all of it; the work done is kept."""
    total = plan["found"] - plan["merged"] - sum(plan["left_out"].values())
    if len(refused) <= allowed * total and len(refused) < total:
        return
    write_rejected(out_uri, "quarantine", refused)
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in Counter(r.reason for r in refused).most_common())
    named = "; ".join(f"{row.source_location}: {row.reason} {row.detail}".strip() for row in refused[:3])
    raise ValueError(
        f"{len(refused):,} of {total:,} samples are bad, more than --max-bad-fraction {allowed:g} allows: {reasons}. "
        f"The first: {readable(named)}. {table_uri(out_uri, 'quarantine')} lists them; mend the source, or raise the "
        f"fraction; images that were mended where they are count again with --overwrite"
    )
