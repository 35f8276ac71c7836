"""The plan: a source listed once, and cut into shard tasks; kept with what was refused in `_prepare/` of the output.

plan.json            source, options and counts; written when all tasks are, so it stands for a complete listing
rejected.parquet     what the listing refused
unmatched.parquet    samples that the captions' table does not know, and its rows that no sample has
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import chain, islice
from typing import Any, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.hashing import short_hash
from vladva.core.images import IMAGE
from vladva.core.progress import Progress
from vladva.data.source import Entry, LeftOut, Rejected, Source, ahead
from vladva.prepare.join import Join
from vladva.prepare.shard_tasks import write_task
from vladva.prepare.staging import Staging, Unmatched, readable

QUARANTINE_COLUMNS = ("id", "place", "reason", "detail")  # "place": the source location
UNMATCHED_COLUMNS = ("side", "id", "place")
ROWS_PER_WRITE = 10_000


class Plan(TypedDict):
    """The content of plan.json ("stamp", "lots": the words of earlier versions)."""

    stamp: dict[str, Any]  # the configuration: all that the shards depend on
    found: int
    samples: int
    merged: int
    left_out: dict[str, int]
    joined: dict[str, int]
    lots: int  # number of tasks


def plan_config(source: Source, join: Join | None, samples_per_shard: int) -> dict[str, Any]:
    """What the shards depend on. Images that a table or a JSON names are not looked at."""
    options = asdict(source.options) | {"format": source.format, "images": source.images_uri}
    config = {"version": 1, "source": source.uri, **options, "samples_per_shard": samples_per_shard}
    config["files"] = f"{len(source.files)} with digest {short_hash([list(info) for info in source.infos])}"
    config["captions_from"] = asdict(join) if join else {}
    if join:
        config["captions_file"] = list(storage.file_info(join.uri))
    return json.loads(json.dumps(config))


def open_plan(out_uri: str, config: dict[str, Any], overwrite: bool) -> Plan | None:
    """The plan to go on with, or None where there is none (any more). Raises ValueError for another one."""
    plan: Plan | None
    try:
        plan = storage.read_json(storage.join(out_uri, "_prepare/plan.json"))
    except FileNotFoundError:
        plan = None
    if plan and plan["stamp"] == config:
        return plan
    mine = [storage.join(out_uri, folder) + "/" for folder in ("_prepare", "_index")]
    written = [info.uri for info in storage.list_infos(out_uri)]
    shards = [uri for uri in written if uri.endswith(".tar") and not uri.startswith(tuple(mine))]
    if (plan or shards) and not overwrite:
        old, new = (plan["stamp"], config) if plan else ({}, {})
        changes = [f"{key} was {old.get(key)}, is {new[key]}" for key in new if new[key] != old.get(key)]
        what = f"shards of another source or other options ({'; '.join(changes)})" if plan else "shards of other origin"
        raise ValueError(f"{out_uri} holds {what}: choose another --out, or replace them with --overwrite")
    for uri in written:  # the plan first: what it stands for is about to go
        if uri in shards or uri.startswith(tuple(mine)):
            storage.delete_file(uri)
    return None


def make_plan(source: Source, out_uri: str, join: Join | None, samples_per_shard: int, config: dict[str, Any]) -> Plan:
    """List the source and cut it into tasks. Raises ValueError where there is nothing to write."""
    with tempfile.TemporaryDirectory() as folder:
        staging = Staging(os.path.join(folder, "staging.sqlite"))
        with Progress(f"listing {source.format}") as progress:
            for found in list_source(source):
                staging.add(found, join)
                progress.advance(1)
        bad_rows = staging.add_captions(join) if join else []
        staging.finish()
        counts = staging.counts
        if not counts["samples"]:
            raise ValueError(f"{source.uri}: none of the {counts['found']} entries of {source.format} can be used")
        if join:
            if not counts["joined_samples"]:
                raise ValueError(_nothing_joined(join, staging))
            broken = (Unmatched("table", f"({row.reason})", row.source_location) for row in bad_rows)
            write_plan_table(out_uri, "unmatched", UNMATCHED_COLUMNS, chain(staging.unmatched(), broken))
        tasks = enumerate(staging.tasks(samples_per_shard))
        num_tasks = sum(1 for _ in ahead(lambda numbered: write_task(out_uri, *numbered), tasks))
    write_rejected(out_uri, "rejected", staging.rejected)
    plan = Plan(
        stamp=config,
        found=counts["found"],
        samples=counts["samples"],
        merged=counts["merged"],
        left_out=dict(staging.left_out.most_common()),
        joined=_joined(counts, len(bad_rows)) if join else {},
        lots=num_tasks,
    )
    storage.write_json(storage.join(out_uri, "_prepare/plan.json"), plan)
    return plan


def list_source(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """The entries of a source, then the files that were given and not read."""
    images = {storage.join(source.uri, name) for name in source.others if IMAGE.search(name)}
    named = set()
    for found in source.entries():
        if images and isinstance(found, Entry) and found.column:
            images, named = set(), images  # cells may name images: only whoever reads them sees which
        if images and found.file:
            named.add(storage.resolve(source.images_uri, found.file))
        yield found
    yield from source.unused_files(named)


def _joined(counts: Counter[str], num_bad: int) -> dict[str, int]:
    return {
        "rows": counts["joined_rows"],
        "rows_without": counts["rows"] - counts["joined_rows"] - num_bad,
        "rows_rejected": num_bad,
        "samples": counts["joined_samples"],
        "samples_without": counts["samples"] - counts["joined_samples"],
    }


def _nothing_joined(join: Join, staging: Staging) -> str:
    samples = [row.id for row in islice(staging.unmatched(), 3)]
    rows = [row.id for row in staging.unmatched() if row.side == "table"][:3]
    return (
        f"--join-on: no row of {join.uri} has the {join.field} of a sample in its column {join.column!r}; the first "
        f"samples are {samples}, the first rows {rows}: join on another field (FIELD=COLUMN)"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def table_uri(out_uri: str, name: str) -> str:
    """A table in `_prepare/`."""
    return storage.join(out_uri, "_prepare", f"{name}.parquet")


def write_rejected(out_uri: str, name: str, rejected: Iterable[Rejected]) -> None:
    """Write a table of what was refused."""
    write_plan_table(out_uri, name, QUARANTINE_COLUMNS, (row[: len(QUARANTINE_COLUMNS)] for row in rejected))


def write_plan_table(out_uri: str, name: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Write one of the tables, whose columns hold text."""
    schema = pa.schema([(column, pa.string()) for column in columns])
    body, waiting = io.BytesIO(), iter(rows)
    with pq.ParquetWriter(body, schema) as table:
        while batch := list(islice(waiting, ROWS_PER_WRITE)):
            texts = [dict(zip(columns, map(readable, row), strict=True)) for row in batch]
            table.write_table(pa.Table.from_pylist(texts, schema))
    storage.write_bytes_atomically(table_uri(out_uri, name), body.getvalue())


def read_plan_table(out_uri: str, name: str) -> list[dict[str, str]]:
    """Read one of the tables."""
    return pq.read_table(storage.RangedFile(table_uri(out_uri, name))).to_pylist()


def read_rejected(out_uri: str) -> list[Rejected]:
    """What the listing refused."""
    return [Rejected(*(row[column] for column in QUARANTINE_COLUMNS)) for row in read_plan_table(out_uri, "rejected")]
