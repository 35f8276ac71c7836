"""Commit: the parts of a table -> few large files, by tasks over parts of the keys and of the rows.

    keys       the (id, kind) of every row, dealt to partitions by hash -> rows to drop: that are there already
    contents   the contents of rows, repeats and rejected items, dealt likewise -> the row that serves each repeat
    repeats    dealt to the tasks that read the rows that serve them
    write      parts -> files, without the rows to drop, with the repeats beside the rows that serve them

Rows, repeats and rejected items are numbered as (group, row): groups of files in this order, so that what has the lower
number goes before. The driver holds references and counts; no process holds all keys.

W write tasks, P partitions, R groups of repeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from vladva.core.hashing import digest
from vladva.core.ray_tasks import collect, scatter, submit
from vladva.core.storage import join
from vladva.embed.known_items import as_digests, partition_of, partitions_for
from vladva.embed.stored_vectors import SCALE
from vladva.embed.table import concat, keys_of, read_each, write_rows
from vladva.embed.table_parts import REJECTED_ROWS, FileGroup, list_groups

FILE_BYTES = 256 << 20  # of embeddings in one file of a complete table
MAX_WRITERS = 256
NOWHERE = -1  # group of what serves a repeat that nothing serves
LOST_TWIN = "an equal item was to be embedded for it and was not: run the job again"

ENTRY = np.dtype([("digest", "S16"), ("group", "<i4"), ("row", "<i8")])
ROW_PLACE = np.dtype([("group", "<i4"), ("row", "<i8")])
SERVED = np.dtype([("group", "<i4"), ("row", "<i8"), ("by_group", "<i4"), ("by_row", "<i8")])


class Committed(NamedTuple):
    """New files of a table with the number of their rows, and the items that could not be embedded."""

    files: list[str]
    num_rows: int
    num_rejected: int
    first_reason: str  # why one of them could not; empty where there is none


@dataclass(frozen=True)
class Numbering:
    """Where each kind of group begins: files that the table has, parts, repeats, rejected items."""

    parts: int
    repeats: int
    rejected: int


def merge_parts(uri: str, files: Sequence[str], num_rows: int, row_bytes: int) -> Committed:
    """Merge the parts at `uri` into new files, beside the `files` (of num_rows rows) that the table has already.

    Writes the files and `_quarantine.parquet`; parts, repeats and rejected items are left where they are.
    row_bytes: of an embedding.
    """
    existing = [FileGroup([[join(uri, file)]], 0, 0) for file in files]
    parts, repeats, rejected = (list_groups(uri, folder) for folder in ("_parts", "_repeats", "_rejected"))
    groups = [*existing, *parts, *repeats, *rejected]
    begin = Numbering(len(existing), len(existing) + len(parts), len(existing) + len(parts) + len(repeats))
    partitions = partitions_for(num_rows + sum(group.size for group in parts) // max(1, row_bytes))
    keys, contents = _dealt(groups, begin, partitions)
    writers = _writers(parts, existing if repeats else [], begin)
    writer_of = np.full(begin.repeats, -1, np.int64)
    for writer, numbers in enumerate(writers):
        writer_of[numbers] = writer
    # For each partition: the rows to drop, for each write task and then for each group of repeats.
    num_targets = len(writers) + len(repeats)
    dropped = [
        scatter(_duplicates, num_targets, begin, writer_of, num_targets, *of_keys) for of_keys in keys if num_targets
    ]
    served = [scatter(_owners, len(repeats), begin, *of_contents) for of_contents in contents if repeats]
    dealt = [
        scatter(
            _deal_repeats,
            len(writers) + 1,
            *(group.listing, group.number, begin, writer_of, len(writers), partitions),
            *(one[len(writers) + r] for one in dropped),
            *(one[r] for one in served),
        )
        for r, group in enumerate(repeats)
    ]
    written = [
        submit(
            _write_files,
            *(uri, row_bytes, [(number, groups[number].number, number >= begin.parts) for number in numbers]),
            *(partitions, len(repeats)),
            *(one[w] for one in dropped),
            *(one[w] for one in dealt),
            *(groups[number].listing for number in numbers),
        )
        for w, numbers in enumerate(writers)
    ]
    unserved = [one[-1] for one in dealt]
    quarantine = submit(
        _write_quarantine,
        *(uri, [group.number for group in rejected], begin.rejected, len(rejected)),
        *(group.listing for group in rejected),
        *unserved,
    )
    *new, (num_rejected, first_reason) = collect([*written, quarantine])
    counts = [count for one in new for _, count in one]
    return Committed([name for one in new for name, _ in one], sum(counts), num_rejected, first_reason)


def _dealt(groups: Sequence[FileGroup], begin: Numbering, partitions: int) -> tuple[list[list[Any]], list[list[Any]]]:
    """For each partition, references to the entries of all groups: by the (id, kind), and by the content.

    Rejected items have no key that counts, and contents matter only where there are repeats.
    """
    with_contents = begin.repeats < begin.rejected
    keys: list[list[Any]] = [[] for _ in range(partitions)]
    contents: list[list[Any]] = [[] for _ in range(partitions)]
    for number, group in enumerate(groups):
        is_rejected = number >= begin.rejected
        columns = [*(["key"] if not is_rejected else []), *(["content"] if with_contents else [])]
        if not columns:
            continue
        parts = scatter(_entries, len(columns) * partitions, group.listing, group.number, number, columns, partitions)
        for place, column in enumerate(columns):
            for partition in range(partitions):
                target = keys if column == "key" else contents
                target[partition].append(parts[place * partitions + partition])
    return keys, contents


def _entries(
    listing: list[list[str]], place: int, number: int, columns: Sequence[str], partitions: int
) -> list[np.ndarray]:
    """The entries of a group of files, numbered `number`: for each column ("key", "content") and partition an array."""
    found: dict[str, list[bytes | None]] = {column: [] for column in columns}
    for rows in read_each(listing[place], ["id", "kind", "content"]):
        if "key" in found:
            found["key"] += keys_of(rows)
        if "content" in found:
            found["content"] += rows["content"].to_pylist()
    dealt = []
    for column in columns:
        values = found[column]
        known = [row for row, value in enumerate(values) if value is not None]  # what is no image has no content
        entries = np.empty(len(known), ENTRY)
        entries["digest"] = as_digests([values[row] or b"" for row in known])
        entries["group"], entries["row"] = number, known
        partition_N = partition_of(entries["digest"], partitions)
        dealt += [entries[partition_N == partition] for partition in range(partitions)]
    return dealt


def _duplicates(begin: Numbering, writer_of: np.ndarray, num_targets: int, *entries: np.ndarray) -> list[np.ndarray]:
    """Rows whose (id, kind) a row before them has, for each write task, and for each group of repeats."""
    every = np.concatenate([np.empty(0, ENTRY), *entries])
    order = np.argsort(every["digest"], kind="stable")  # equal ones stay in the order of groups
    ordered = every[order]
    again = ordered[1:][ordered["digest"][1:] == ordered["digest"][:-1]]
    again = again[again["group"] >= begin.parts]
    places = np.empty(len(again), ROW_PLACE)
    places["group"], places["row"] = again["group"], again["row"]
    num_writers = num_targets - (begin.rejected - begin.repeats)
    is_repeat = places["group"] >= begin.repeats
    target = np.where(is_repeat, places["group"] - begin.repeats + num_writers, 0)
    target[~is_repeat] = writer_of[places["group"][~is_repeat]]
    return [places[target == one] for one in range(num_targets)]


def _owners(begin: Numbering, *entries: np.ndarray) -> list[np.ndarray]:
    """For each group of repeats, what serves each: a row, or a rejected item with the same content, or NOWHERE."""
    every = np.concatenate([np.empty(0, ENTRY), *entries])
    ordered = every[np.argsort(every["digest"], kind="stable")]
    digests = ordered["digest"]
    starts = np.flatnonzero(np.concatenate([[True], digests[1:] != digests[:-1]])) if len(ordered) else np.zeros(0, int)
    lengths = np.diff(np.concatenate([starts, [len(ordered)]]))
    # Of the entries with one content the first is a row, if any is, and the last a rejected item, if any is.
    first, last = np.repeat(ordered[starts], lengths), np.repeat(ordered[starts + lengths - 1], lengths)
    waiting = (ordered["group"] >= begin.repeats) & (ordered["group"] < begin.rejected)
    by = np.where(first["group"] < begin.repeats, first, last)
    served = np.empty(int(waiting.sum()), SERVED)
    served["group"], served["row"] = ordered["group"][waiting], ordered["row"][waiting]
    served["by_group"], served["by_row"] = by["group"][waiting], by["row"][waiting]
    nobody = (served["by_group"] >= begin.repeats) & (served["by_group"] < begin.rejected)
    served["by_group"][nobody] = NOWHERE
    return [served[served["group"] == group] for group in range(begin.repeats, begin.rejected)]


def _deal_repeats(
    listing: list[list[str]],
    place: int,
    begin: Numbering,
    writer_of: np.ndarray,
    num_writers: int,
    partitions: int,
    *dropped_and_served: np.ndarray,
) -> list[pa.Table]:
    """The repeats of a group, for the write task that reads what serves them; last those that nothing serves.

    They get the columns by_group and by_row.
    """
    rows = concat(list(read_each(listing[place])))
    dropped, served = dropped_and_served[:partitions], np.concatenate(dropped_and_served[partitions:])
    served = served[np.argsort(served["row"])]
    keep = np.ones(len(rows), bool)
    for places in dropped:
        keep[places["row"]] = False
    rows = rows.append_column("by_group", pa.array(served["by_group"]))
    rows = rows.append_column("by_row", pa.array(served["by_row"])).filter(pa.array(keep))
    by_group = served["by_group"][keep]
    is_row = (by_group >= 0) & (by_group < begin.repeats)
    target = np.full(len(rows), num_writers)
    target[is_row] = writer_of[by_group[is_row]]
    return [rows.filter(pa.array(target == writer)) for writer in range(num_writers + 1)]


def _writers(parts: Sequence[FileGroup], existing: Sequence[FileGroup], begin: Numbering) -> list[list[int]]:
    """Which groups each write task reads: parts of about FILE_BYTES together, and files of the table that serve."""
    bundles: list[list[int]] = []
    size = 0
    at_least = max(FILE_BYTES, sum(group.size for group in parts) // MAX_WRITERS)
    for number, group in enumerate(parts, start=begin.parts):
        if not bundles or size + group.size > at_least:
            bundles.append([])
            size = 0
        bundles[-1].append(number)
        size += group.size
    of_existing = -(-len(existing) // MAX_WRITERS) or 1
    return bundles + [
        list(range(first, min(first + of_existing, len(existing)))) for first in range(0, len(existing), of_existing)
    ]


def _write_files(
    uri: str,
    row_bytes: int,
    groups: Sequence[tuple[int, int, bool]],
    partitions: int,
    num_repeats: int,
    *references: Any,
) -> list[tuple[str, int]]:
    """Name and number of rows of the files that are made of groups, given as (number, place in its listing, is new).

    references: the rows to drop, from each partition; repeats, from each of their groups; each group's listing.
    """
    dropped = np.concatenate([np.empty(0, ROW_PLACE), *references[:partitions]])
    repeats = [rows for rows in references[partitions : partitions + num_repeats] if len(rows)]
    listings = references[partitions + num_repeats :]

    def pieces() -> Iterator[pa.Table]:
        for (number, place, is_new), listing in zip(groups, listings, strict=True):
            here = [waiting.filter(pa.compute.equal(waiting["by_group"], number)) for waiting in repeats]
            if not is_new and not any(map(len, here)):
                continue
            rows = concat(list(read_each(listing[place])))
            yield from (_served(rows, waiting) for waiting in here)
            if is_new:
                keep = np.ones(len(rows), bool)
                keep[dropped["row"][dropped["group"] == number]] = False
                yield rows.filter(pa.array(keep))

    written = []
    for rows in _in_files(pieces(), row_bytes):
        name = f"embeddings-{digest(*keys_of(rows)).hex()}.parquet"
        write_rows(join(uri, name), rows)
        written.append((name, len(rows)))
    return written


def _served(rows: pa.Table, waiting: pa.Table) -> pa.Table:
    """Repeats, each with the embedding of the row that serves it."""
    places, waiting = waiting["by_row"], waiting.drop_columns(["by_group", "by_row"])
    for place, name in enumerate(name for name in ("embedding", SCALE) if name in rows.column_names):
        waiting = waiting.add_column(2 + place, name, rows[name].take(places))
    return waiting.replace_schema_metadata(rows.schema.metadata)


def _in_files(pieces: Iterator[pa.Table], row_bytes: int) -> Iterator[pa.Table]:
    """The rows of all pieces, in tables of about FILE_BYTES of embeddings."""
    waiting: list[pa.Table] = []
    for rows in pieces:
        if len(rows):
            waiting.append(rows)
        if sum(map(len, waiting)) * row_bytes >= FILE_BYTES:
            yield concat(waiting)
            waiting = []
    if waiting:
        yield concat(waiting)


def _write_quarantine(
    uri: str, places: Sequence[int], first_group: int, num_listings: int, *references: Any
) -> tuple[int, str]:
    """Write `_quarantine.parquet`: rejected items, and the repeats of these for the same reason. Number, a reason."""
    listings, unserved = references[:num_listings], references[num_listings:]
    waiting = (
        pa.concat_tables([rows.select(["id", "kind", "content", "by_group", "by_row"]) for rows in unserved])
        if (unserved)
        else None
    )
    tables: list[pa.Table] = []
    for group, (listing, place) in enumerate(zip(listings, places, strict=True), start=first_group):
        rows = concat(list(read_each(listing[place])))
        tables.append(rows)
        if waiting is not None:
            tables.append(_rejected_like(rows["reason"], waiting, group))
    if waiting is not None:
        nobody = waiting.filter(pa.compute.equal(waiting["by_group"], NOWHERE))
        tables.append(_with_reasons(nobody, pa.array([LOST_TWIN] * len(nobody), pa.string())))
    whole = pa.concat_tables([REJECTED_ROWS.empty_table(), *(rows.cast(REJECTED_ROWS) for rows in tables)])
    # A task that was run again may have named an item twice.
    _, first = np.unique(as_digests(keys_of(whole)), return_index=True)
    whole = whole.take(pa.array(np.sort(first)))
    write_rows(join(uri, "_quarantine.parquet"), whole)
    return len(whole), whole["reason"][0].as_py() if len(whole) else ""


def _rejected_like(reasons: pa.ChunkedArray, waiting: pa.Table, group: int) -> pa.Table:
    waiting = waiting.filter(pa.compute.equal(waiting["by_group"], group))
    return _with_reasons(waiting, reasons.take(waiting["by_row"]))


def _with_reasons(rows: pa.Table, reasons: pa.Array | pa.ChunkedArray) -> pa.Table:
    return rows.select(["id", "kind", "content"]).append_column("reason", reasons)
