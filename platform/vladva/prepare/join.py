"""Joins: captions that another table has for the same images, found by id (data that was captioned again)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.data.columns import choose_caption_columns, choose_column, to_name, to_texts
from vladva.data.delimited import TABLE_SUFFIXES, read_rows_of_text
from vladva.data.parquet_cells import plain_rows
from vladva.data.source import Entry, Rejected

JOIN_FIELDS = ("id", "key", "path", "name", "stem")
JOIN_SUFFIXES = (".parquet", *TABLE_SUFFIXES)


@dataclass(frozen=True)
class Join:
    """Which table, and which of its columns is which field of a sample.

    `field`: "id" (what the source calls it), "key" (of a tar's sample, without the shard), "path" (of its image),
    "name" (of the image's file) or "stem" (that name without its ending).
    """

    uri: str
    column: str
    field: str = "id"
    caption_columns: tuple[str, ...] = ()

    @classmethod
    def parse(cls, uri: str, on: str, captions: Sequence[str] = ()) -> Join:
        """`on` is COLUMN or FIELD=COLUMN. Raises ValueError with the fix."""
        field, equals, column = on.partition("=")
        field, column = (field, column) if equals else ("id", on)
        if not column or field not in JOIN_FIELDS:
            raise ValueError(
                f"--join-on is {on!r}; give the column of {uri} that holds the samples' ids, or FIELD=COLUMN with "
                f"FIELD one of {', '.join(JOIN_FIELDS)}"
            )
        if not uri.lower().endswith(JOIN_SUFFIXES):
            raise ValueError(f"--captions-from {uri}: its name must end in one of {', '.join(JOIN_SUFFIXES)}")
        return cls(storage.absolute(uri), column, field, tuple(captions))

    def key_of(self, entry: Entry) -> str:
        """What the table calls the sample."""
        path = entry.file
        if entry.offset >= 0 and self.field not in ("id", "key"):
            raise ValueError(
                f"--join-on {self.field}=...: {entry.source_location} is no file of its own, join on its id or key"
            )
        return {
            "id": entry.id,
            "key": entry.id.rpartition("#")[2],
            "path": path,
            "name": PurePosixPath(path).name,
            "stem": PurePosixPath(path).stem,
        }[self.field]

    def rows(self) -> Iterator[tuple[str, str, list[str]] | Rejected]:
        """(key, source location, captions) of every row of the table."""
        file = self.uri.rpartition("/")[2]
        columns: list[str] = []
        captions: list[str] = []
        for location, row in _rows(self.uri, file):
            if isinstance(row, InvalidSampleError):
                yield Rejected(location, location, row.reason, row.detail)
                continue
            if not columns:
                columns = list(row)
                choose_column("ids", "--join-on", (), self.column, columns, file)
            try:
                if not captions or list(row) != columns:  # rows of JSON need not have the same fields
                    captions = self._captions(row, file, required=not captions)
                texts = [text for name in captions for text in to_texts(row.get(name))]
                yield to_name(row.get(self.column)), location, texts
            except InvalidSampleError as problem:
                yield Rejected(location, location, problem.reason, problem.detail)

    def _captions(self, row: dict[str, Any], file: str, *, required: bool) -> list[str]:
        columns = [name for name in row if name != self.column]
        try:
            captions = choose_caption_columns(self.caption_columns, columns, file)
        except ValueError as error:
            if required:
                raise
            raise InvalidSampleError("broken row", str(error)) from None
        if required and not captions:
            raise ValueError(f"{file}: name a column of captions with --join-caption-column; it has {list(row)}")
        return captions


def _rows(uri: str, file: str) -> Iterator[tuple[str, dict[str, Any] | InvalidSampleError]]:
    """(source location, row) of every row of a table in any of the forms."""
    if not file.lower().endswith(".parquet"):
        for number, found in read_rows_of_text(uri, file):
            yield f"{file}, line {number}", found
        return
    table = pq.ParquetFile(storage.RangedFile(uri))
    number = 0
    for group in range(table.num_row_groups):
        for row in plain_rows(table.read_row_group(group), table.metadata.row_group(group).num_rows):
            yield f"{file}, row {number}", row
            number += 1
