"""Listing: a source listed once, and cut into lots; kept with what was refused in `_prepare/` of the output.

plan.json            source, options and counts; written when all lots are, so it stands for a complete listing
rejected.parquet     what the listing refused
unmatched.parquet    samples that the captions' table does not know, and its rows that no sample has
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from itertools import chain, islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.hashing import short_hash
from vladva.core.progress import Progress
from vladva.data.sidecar import parquet_bytes
from vladva.prepare.join import Join
from vladva.prepare.shard_tasks import LOT, lot_uri
from vladva.prepare.sources import Rejected, Source, ahead
from vladva.prepare.staging import Staging, readable

QUARANTINE = pa.schema([(name, pa.string()) for name in Rejected._fields])
ROWS_AT_ONCE = 10_000
UNMATCHED = pa.schema([(name, pa.string()) for name in ("side", "id", "place")])


def stamp_of(source: Source, join: Join | None, samples_per_shard: int) -> dict[str, Any]:
    """What the shards depend on. Images that a table or a JSON names are not looked at."""
    options = asdict(source.options) | {"format": source.format, "images": source.images_uri}
    stamp = {"version": 1, "source": source.uri, **options, "samples_per_shard": samples_per_shard}
    stamp["files"] = f"{len(source.files)} with digest {short_hash([list(info) for info in source.infos])}"
    stamp["captions_from"] = asdict(join) if join else {}
    if join:
        stamp["captions_file"] = list(storage.file_info(join.uri))
    return json.loads(json.dumps(stamp))


def open_plan(out_uri: str, stamp: dict[str, Any], overwrite: bool) -> dict[str, Any] | None:
    """The plan to go on with, or None where there is none (any more). Raises ValueError for another one."""
    try:
        plan = storage.read_json(storage.join(out_uri, "_prepare/plan.json"))
    except FileNotFoundError:
        plan = None
    if plan and plan["stamp"] == stamp:
        return plan
    mine = [storage.join(out_uri, folder) + "/" for folder in ("_prepare", "_index")]
    written = [info.uri for info in storage.list_infos(out_uri)]
    shards = [uri for uri in written if uri.endswith(".tar") and not uri.startswith(tuple(mine))]
    if (plan or shards) and not overwrite:
        old, new = (plan["stamp"], stamp) if plan else ({}, {})
        changes = [f"{key} was {old.get(key)}, is {new[key]}" for key in new if new[key] != old.get(key)]
        what = f"shards of another source or other options ({'; '.join(changes)})" if plan else "shards of other origin"
        raise ValueError(f"{out_uri} holds {what}: choose another --out, or replace them with --overwrite")
    for uri in written:  # the plan first: what it stands for is about to go
        if uri in shards or uri.startswith(tuple(mine)):
            storage.delete_file(uri)
    return None


def make_plan(
    source: Source, out_uri: str, join: Join | None, samples_per_shard: int, stamp: dict[str, Any]
) -> dict[str, Any]:
    """List the source and cut it into lots. Raises ValueError where there is nothing to write."""
    with tempfile.TemporaryDirectory() as folder:
        catalog = Staging(os.path.join(folder, "catalog.sqlite"))
        with Progress(f"listing {source.format}") as progress:
            for found in source.entries():
                catalog.add(found, join)
                progress.advance(1)
        bad_rows = catalog.add_captions(join) if join else []
        catalog.finish()
        counts = catalog.counts
        if not counts["samples"]:
            raise ValueError(f"{source.uri}: none of the {counts['found']} entries of {source.format} can be used")
        if join:
            if not counts["joined_samples"]:
                raise ValueError(_nothing_joined(join, catalog))
            broken = ({"side": "table", "id": f"({row.reason})", "place": row.place} for row in bad_rows)
            write_table(out_uri, "unmatched", UNMATCHED, chain(catalog.unmatched(), broken))
        lots = enumerate(catalog.lots(samples_per_shard))
        num_lots = sum(1 for _ in ahead(lambda numbered: write_lot(out_uri, *numbered), lots))
    write_table(out_uri, "rejected", QUARANTINE, (row._asdict() for row in catalog.rejected))
    plan = {
        "stamp": stamp,
        "found": counts["found"],
        "samples": counts["samples"],
        "merged": counts["merged"],
        "left_out": dict(catalog.left_out.most_common()),
        "joined": _joined(counts, len(bad_rows)) if join else {},
        "lots": num_lots,
    }
    storage.write_json(storage.join(out_uri, "_prepare/plan.json"), plan)
    return plan


def write_lot(out_uri: str, number: int, samples: list[dict[str, Any]]) -> None:
    """Write a lot where its task looks for it."""
    storage.write_bytes_atomically(lot_uri(out_uri, number), parquet_bytes(pa.Table.from_pylist(samples, LOT)))


def _joined(counts: Counter[str], num_bad: int) -> dict[str, int]:
    return {
        "rows": counts["joined_rows"],
        "rows_without": counts["rows"] - counts["joined_rows"] - num_bad,
        "rows_rejected": num_bad,
        "samples": counts["joined_samples"],
        "samples_without": counts["samples"] - counts["joined_samples"],
    }


def _nothing_joined(join: Join, catalog: Staging) -> str:
    samples = [row["id"] for row in islice(catalog.unmatched(), 3)]
    rows = [row["id"] for row in catalog.unmatched() if row["side"] == "table"][:3]
    return (
        f"--join-on: no row of {join.uri} has the {join.field} of a sample in its column {join.column!r}; the first "
        f"samples are {samples}, the first rows {rows}: join on another field (FIELD=COLUMN)"
    )


# --- tables -----------------------------------------------------------------------------------------------------------


def table_uri(out_uri: str, name: str) -> str:
    """A table in `_prepare/`."""
    return storage.join(out_uri, "_prepare", f"{name}.parquet")


def write_table(out_uri: str, name: str, schema: pa.Schema, rows: Iterable[dict[str, str]]) -> None:
    """Write one of the tables."""
    body, waiting = io.BytesIO(), iter(rows)
    with pq.ParquetWriter(body, schema) as table:
        while batch := list(islice(waiting, ROWS_AT_ONCE)):
            clean = [{column: readable(text) for column, text in row.items()} for row in batch]
            table.write_table(pa.Table.from_pylist(clean, schema))
    storage.write_bytes_atomically(table_uri(out_uri, name), body.getvalue())


def read_table(out_uri: str, name: str) -> list[dict[str, str]]:
    """Read one of the tables."""
    return pq.read_table(storage.RangedFile(table_uri(out_uri, name))).to_pylist()
