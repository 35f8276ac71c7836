"""Table writer: an embeddings table that is being made, from its first batch to the manifest that completes it.

What is done is in parts that many processes write (`table_parts.py`). `commit` merges them into few files (`commit.py`)
and lists these in `_table.json`: that one write completes the table.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import NamedTuple

import numpy as np

from vladva.core import storage
from vladva.core.errors import FingerprintMismatch
from vladva.core.model_description import ModelDescription
from vladva.core.storage import join
from vladva.embed.commit import Committed, merge_parts
from vladva.embed.stored_vectors import StoredAs
from vladva.embed.table import TableManifest, find_manifest
from vladva.embed.table_parts import FileGroup, delete_parts, list_groups


class TableTarget(NamedTuple):
    """What those who write parts need to know of a table."""

    uri: str
    model: ModelDescription
    stored_as: StoredAs = "float32"


class TableWriter:
    """A table that one model makes, or goes on with."""

    def __init__(self, uri: str, model: ModelDescription, corpus: str, stored_as: StoredAs | None = None) -> None:
        """Start, or go on. Raises FingerprintMismatch where another model has made the table.

        stored_as: of a new table float32 by default; of one that is there what it is stored in. Raises ValueError for
            another.
        """
        self.uri = uri
        manifest = find_manifest(uri)
        if manifest is not None and manifest.fingerprint != model["fingerprint"]:
            hint = "write to another place, or delete it"
            raise FingerprintMismatch(f"the table {uri}", manifest.fingerprint, model["fingerprint"], hint)
        if manifest is not None and stored_as not in (None, manifest.stored_as):
            raise ValueError(
                f"stored_as is {stored_as}, and the table {uri} is stored as {manifest.stored_as}: leave it out, or "
                "write to another place"
            )
        self.begun = manifest is not None
        self.manifest = manifest or TableManifest(
            model, corpus, complete=False, num_rows=0, files=[], stored_as=stored_as or "float32"
        )
        listed = set(self._files())
        # What a commit that was cut short has left; repeats and rejected items: they are found again.
        for file in storage.list_files(uri, ".parquet", recursive=False):
            if "/embeddings-" in file and file not in listed:
                storage.delete_file(file)
        for folder in ("_repeats", "_rejected"):
            delete_parts(uri, folder)
        if not self.begun:
            self._write_manifest()

    @property
    def target(self) -> TableTarget:
        """For those who write parts."""
        return TableTarget(self.uri, self.manifest.model, self.manifest.stored_as)

    def groups(self) -> list[FileGroup]:
        """The files that hold what the table has, parts included, in groups for tasks."""
        existing = [FileGroup([[file]], 0, 0) for file in self._files()]
        return [*existing, *list_groups(self.uri, "_parts")]

    def commit(self) -> Committed:
        """Complete the table: each (id, kind) once, repeats served, rejected items in `_quarantine.parquet`."""
        manifest = self.manifest
        row_bytes = manifest.dimension * np.dtype(manifest.stored_as).itemsize
        merged = merge_parts(self.uri, manifest.files, manifest.num_rows, row_bytes)
        self.manifest = replace(
            manifest,
            complete=True,
            num_rows=manifest.num_rows + merged.num_rows,
            files=[*manifest.files, *merged.files],
        )
        self._write_manifest()
        for folder in ("_parts", "_repeats", "_rejected"):
            delete_parts(self.uri, folder)
        for file in storage.list_files(join(self.uri, "_device_failures")):
            storage.delete_file(file)
        return merged

    def _files(self) -> list[str]:
        return [join(self.uri, file) for file in self.manifest.files]

    def _write_manifest(self) -> None:
        storage.write_json(join(self.uri, "_table.json"), asdict(self.manifest))
