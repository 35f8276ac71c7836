"""Parts of a table that is being made: files that many processes write, of which any may die.

    <uri>/_parts/<lane>/<hash>.parquet      the embeddings of one batch, named after the ids in it
    <uri>/_repeats/<lane>/<hash>.parquet    items that another item's embedding will serve: their content is the same
    <uri>/_rejected/<lane>/<hash>.parquet   id, kind, content, reason of items that cannot be embedded

A file is complete or absent, and writing it twice leaves one; so whatever is killed, the parts say what is done. The
lane is the first digit of the hash: each of the sixteen can be listed by itself, by a task of its own. Parts that are
in `_parts/` itself are those of the first version.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from vladva.core import storage
from vladva.core.hashing import digest
from vladva.core.model_description import ModelDescription
from vladva.core.ray_tasks import cluster_cpus, collect, scatter, submit
from vladva.core.storage import join
from vladva.embed.stored_vectors import StoredAs, to_columns
from vladva.embed.table import CONTENT, keys_of, write_rows

GROUP_BYTES = 128 << 20  # of files on the disk that one task reads together
GROUP_FILES = 8192
LANES = "0123456789abcdef"
REJECTED_ROWS = pa.schema([("id", pa.string()), ("kind", pa.string()), ("content", CONTENT), ("reason", pa.string())])


def write_part(
    uri: str, items: pa.Table, embeddings_ND: np.ndarray, model: ModelDescription, stored_as: StoredAs = "float32"
) -> None:
    """Add the embeddings of `items` (id, kind, content, carried columns) to the table being made at `uri`."""
    rows = items
    for place, (name, values) in enumerate(to_columns(embeddings_ND, stored_as).items(), start=2):
        rows = rows.add_column(place, name, values)
    _write(uri, "_parts", rows.replace_schema_metadata({b"vladva": json.dumps(model).encode()}))


def write_repeats(uri: str, items: pa.Table) -> None:
    """Note items (id, kind, content, carried columns) that get the embedding of the item with the same content."""
    _write(uri, "_repeats", items)


def write_rejected_items(uri: str, items: Sequence[dict[str, Any]]) -> None:
    """Note items (id, kind, content, reason) that cannot be embedded."""
    _write(uri, "_rejected", pa.Table.from_pylist(list(items), REJECTED_ROWS))


def _write(uri: str, folder: str, rows: pa.Table) -> None:
    name = digest(*keys_of(rows)).hex()
    write_rows(join(uri, folder, name[0], f"{name}.parquet"), rows)


class FileGroup(NamedTuple):
    """Files that one task reads together: the listing that they are in, the number in it, and their bytes."""

    listing: Any  # list of groups: a reference, or the lists themselves
    number: int
    size: int


def list_groups(uri: str, folder: str) -> list[FileGroup]:
    """The files of `_parts`, `_repeats` or `_rejected` in groups; what a list holds stays with the tasks."""
    if not storage.exists(join(uri, folder)):
        return []
    lanes, tasks = ("", *LANES), max(1, min(len(LANES), cluster_cpus()))
    listings = [scatter(_list_lanes, 2, uri, folder, lanes[task::tasks]) for task in range(tasks)]
    sizes = collect([sizes for _, sizes in listings])
    return [
        FileGroup(listing, number, size)
        for (listing, _), lane in zip(listings, sizes, strict=True)
        for number, size in enumerate(lane)
    ]


def _list_lanes(uri: str, folder: str, lanes: Sequence[str]) -> tuple[list[list[str]], list[int]]:
    """The files of lanes in groups, and the bytes of each group."""
    groups: list[list[str]] = []
    sizes: list[int] = []
    for lane in lanes:
        for info in storage.list_infos(join(uri, folder, lane) if lane else join(uri, folder), recursive=False):
            if not info.uri.endswith(".parquet"):
                continue
            if not groups or sizes[-1] + info.size > GROUP_BYTES or len(groups[-1]) == GROUP_FILES:
                groups.append([])
                sizes.append(0)
            groups[-1].append(info.uri)
            sizes[-1] += info.size
    return groups, sizes


def delete_parts(uri: str, folder: str) -> None:
    """Remove the files of `_parts`, `_repeats` or `_rejected`."""
    collect([submit(_delete_group, group.listing, group.number) for group in list_groups(uri, folder)])


def _delete_group(listing: list[list[str]], number: int) -> None:
    for file in listing[number]:
        storage.delete_file(file)


def files_of(groups: Sequence[tuple[list[list[str]], int]]) -> Iterator[str]:
    """The files of groups, given as (listing, number)."""
    for listing, number in groups:
        yield from listing[number]
