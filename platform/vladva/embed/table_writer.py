"""Parts: an embeddings table that is being made, by many processes of which any may die.

    <uri>/_parts/<hash>.parquet       the embeddings of one batch, named after the ids in it
    <uri>/_repeats/<hash>.parquet     items that another item's embedding will serve, because their content is the same

A part is complete or absent, and writing it twice leaves one; so whatever is killed, the parts say what is done.
`commit` merges parts and repeats into few files and lists these in `_table.json`: that one write completes the table.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa

from vladva.core import storage
from vladva.core.errors import FingerprintMismatch
from vladva.core.hashing import digest
from vladva.core.model_description import ModelDescription
from vladva.core.storage import join
from vladva.embed.table import CONTENT, TableManifest, concat, find_manifest, keys_of, read_each, write_rows

FILE_BYTES = 256 << 20  # of embeddings in one file of a complete table
BAD = pa.schema([("id", pa.string()), ("kind", pa.string()), ("content", CONTENT), ("reason", pa.string())])


def write_part(uri: str, items: pa.Table, embeddings_ND: np.ndarray, model: ModelDescription) -> None:
    """Add the embeddings of `items` (id, kind, content, carried columns) to the table being made at `uri`."""
    values = pa.array(np.ascontiguousarray(embeddings_ND, np.float32).ravel())
    embedding = pa.FixedSizeListArray.from_arrays(values, embeddings_ND.shape[1])
    rows = items.add_column(2, "embedding", embedding)
    rows = rows.replace_schema_metadata({b"vladva": json.dumps(model).encode()})
    write_rows(join(uri, "_parts", f"{digest(*keys_of(items)).hex()}.parquet"), rows)


def write_repeats(uri: str, items: pa.Table) -> None:
    """Note items (id, kind, content, carried columns) that get the embedding of the item with the same content."""
    write_rows(join(uri, "_repeats", f"{digest(*keys_of(items)).hex()}.parquet"), items)


def contains(ordered: np.ndarray, digests: Sequence[bytes]) -> np.ndarray:
    """Which of the digests are in an ordered array of digests, bool [N]."""
    wanted = np.array(digests, "S16")
    places = np.searchsorted(ordered, wanted)
    found = np.zeros(len(wanted), bool)
    inside = places < len(ordered)
    found[inside] = ordered[places[inside]] == wanted[inside]
    return found


class TableWriter:
    """A table that one model makes, or goes on with."""

    def __init__(self, uri: str, model: ModelDescription, corpus: str) -> None:
        """Start, or go on. Raises FingerprintMismatch where another model has made the table."""
        self.uri = uri
        manifest = find_manifest(uri)
        if manifest is not None and manifest.fingerprint != model["fingerprint"]:
            hint = "write to another place, or delete it"
            raise FingerprintMismatch(f"the table {uri}", manifest.fingerprint, model["fingerprint"], hint)
        self.begun = manifest is not None
        self.manifest = manifest or TableManifest(model, corpus, complete=False, num_rows=0, files=[])
        listed = set(self._files())
        unlisted = [file for file in storage.list_files(uri) if "/embeddings-" in file and file not in listed]
        # What a commit that was cut short has left, and the repeats: both are made again from what is kept.
        for file in [*unlisted, *storage.list_files(join(uri, "_repeats"))]:
            storage.delete_file(file)
        if not self.begun:
            self._write_manifest()

    def done(self) -> tuple[np.ndarray, np.ndarray]:
        """Ordered digests of the (id, kind) that have an embedding, and of the contents that have one."""
        keys, contents = [np.zeros(0, "S16")], [np.zeros(0, "S16")]
        for rows in read_each([*self._files(), *self._parts()], ["id", "kind", "content"]):
            keys.append(np.array(keys_of(rows), "S16"))
            contents.append(np.array(rows["content"].to_pylist(), "S16"))
        return np.unique(np.concatenate(keys)), np.unique(np.concatenate(contents))

    def commit(self, quarantine: list[dict[str, Any]]) -> tuple[int, list[dict[str, Any]]]:
        """Complete the table: each (id, kind) once, repeats served, bad items noted.

        Returns the number of rows, and the quarantine with those items added whose content is that of a bad one.
        """
        parts = self._parts()
        repeats = Repeats(list(read_each(storage.list_files(join(self.uri, "_repeats"), ".parquet"))))
        seen = {key for rows in read_each(self._files(), ["id", "kind"]) for key in keys_of(rows)}
        files = list(self.manifest.files)
        for rows in self._merged(parts, repeats, seen):
            files.append(f"embeddings-{digest(*keys_of(rows)).hex()}.parquet")
            write_rows(join(self.uri, files[-1]), rows)
        quarantine = [*quarantine, *repeats.unserved(quarantine)]
        write_rows(join(self.uri, "_quarantine.parquet"), pa.Table.from_pylist(quarantine, BAD))
        self.manifest = TableManifest(
            self.manifest.model, self.manifest.corpus, complete=True, num_rows=len(seen), files=files
        )
        self._write_manifest()
        for file in [*parts, *storage.list_files(join(self.uri, "_repeats"))]:
            storage.delete_file(file)
        return len(seen), quarantine

    def _merged(self, parts: list[str], repeats: Repeats, seen: set[bytes]) -> Iterator[pa.Table]:
        """New rows, in tables of about FILE_BYTES; keys that were seen are left out."""
        group: list[pa.Table] = []
        for rows in self._rows(parts, repeats):
            group.append(rows.filter(pa.array(_first_seen(keys_of(rows), seen), pa.bool_())))
            if sum(map(len, group)) * self.manifest.dimension * 4 >= FILE_BYTES:
                yield concat(group)
                group = []
        if sum(map(len, group)):
            yield concat(group)

    def _rows(self, parts: list[str], repeats: Repeats) -> Iterator[pa.Table]:
        """The rows of the parts, and the repeats of any row."""
        for rows in read_each(parts):
            yield rows
            yield from repeats.served_by(rows)
        if repeats.waiting:
            for rows in read_each(self._files()):
                yield from repeats.served_by(rows)

    def _files(self) -> list[str]:
        return [join(self.uri, file) for file in self.manifest.files]

    def _parts(self) -> list[str]:
        return storage.list_files(join(self.uri, "_parts"), ".parquet")

    def _write_manifest(self) -> None:
        storage.write_json(join(self.uri, "_table.json"), asdict(self.manifest))


class Repeats:
    """Items that wait for the embedding of an item with the same content."""

    def __init__(self, tables: list[pa.Table]) -> None:
        self.items = concat(tables) if tables else BAD.empty_table()
        self.waiting: dict[bytes, list[int]] = {}
        for row, content in enumerate(self.items["content"].to_pylist()):
            self.waiting.setdefault(content, []).append(row)

    def served_by(self, rows: pa.Table) -> list[pa.Table]:
        """The waiting items whose content is in `rows`, with its embedding, if there are any; they wait no longer."""
        pairs = [
            (waiting, row)
            for row, content in enumerate(rows["content"].to_pylist())
            for waiting in self.waiting.pop(content, [])
        ]
        if not pairs:
            return []
        items = self.items.take([waiting for waiting, _ in pairs])
        embedding = rows["embedding"].take(pa.array([row for _, row in pairs]))
        return [items.add_column(2, "embedding", embedding).replace_schema_metadata(rows.schema.metadata)]

    def unserved(self, quarantine: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """The items still waiting: what they wait for is in quarantine, and they go there for the same reason."""
        reasons = {bad["content"]: bad["reason"] for bad in quarantine}
        rows = pa.array([row for rows in self.waiting.values() for row in rows], pa.int64())
        items = self.items.select(["id", "kind", "content"]).take(rows).to_pylist()
        return [{**item, "reason": reasons[item["content"]]} for item in items]


def _first_seen(keys: list[bytes], seen: set[bytes]) -> list[bool]:
    """Which keys are new; they are added to `seen`."""
    new = []
    for key in keys:
        new.append(key not in seen)
        seen.add(key)
    return new
