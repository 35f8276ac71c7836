"""Joins: captions that another table has for the same images, found by id (data that was captioned again)."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.prepare.sources import Entry, Rejected, first_column, texts_of
from vladva.prepare.sources.parquet import caption_columns, one_text, plain_rows
from vladva.prepare.sources.table import cell_texts, read_table

FIELDS = ("id", "key", "path", "name", "stem")
ENDINGS = (".parquet", ".csv", ".tsv", ".jsonl")


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
        if not column or field not in FIELDS:
            raise ValueError(
                f"--join-on is {on!r}; give the column of {uri} that holds the samples' ids, or FIELD=COLUMN with "
                f"FIELD one of {', '.join(FIELDS)}"
            )
        if not uri.lower().endswith(ENDINGS):
            raise ValueError(f"--captions-from {uri}: its name must end in one of {', '.join(ENDINGS)}")
        return cls(storage.absolute(uri), column, field, tuple(captions))

    def key_of(self, entry: Entry) -> str:
        """What the table calls the sample."""
        path = entry.file
        if entry.offset >= 0 and self.field not in ("id", "key"):
            raise ValueError(f"--join-on {self.field}=...: {entry.place} is no file of its own, join on its id or key")
        return {
            "id": entry.id,
            "key": entry.id.rpartition("#")[2],
            "path": path,
            "name": PurePosixPath(path).name,
            "stem": PurePosixPath(path).stem,
        }[self.field]

    def rows(self) -> Iterator[tuple[str, str, list[str]] | Rejected]:
        """(key, place, captions) of every row of the table."""
        file = self.uri.rpartition("/")[2]
        read = {"parquet": _parquet, "jsonl": _json_lines}.get(file.lower().rpartition(".")[2], read_table)
        columns: list[str] = []
        for place, row in read(self.uri, file):
            if isinstance(row, InvalidSampleError):
                yield Rejected(place, place, row.reason, row.detail)
                continue
            if not columns:
                columns = list(row)
                first_column("ids", "--join-on", (), self.column, columns, file)
                captions = caption_columns(self.caption_columns, [c for c in columns if c != self.column], file)
                if not captions:
                    raise ValueError(f"{file}: name a column of captions with --join-caption-column; it has {columns}")
            try:
                cells = [row.get(name) for name in captions]
                texts = [text for cell in cells for text in (cell_texts(cell) if _is_csv(file) else texts_of(cell))]
                yield one_text(row.get(self.column)), place, texts
            except InvalidSampleError as problem:
                yield Rejected(place, place, problem.reason, problem.detail)


def _is_csv(file: str) -> bool:
    return file.lower().endswith((".csv", ".tsv"))


def _parquet(uri: str, file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    table = pq.ParquetFile(storage.RangedFile(uri))
    number = 0
    for group in range(table.num_row_groups):
        for row in plain_rows(table.read_row_group(group), table.metadata.row_group(group).num_rows):
            yield f"{file}, row {number}", row
            number += 1


def _json_lines(uri: str, file: str) -> Iterator[tuple[str, dict[str, Any] | InvalidSampleError]]:
    stream = io.TextIOWrapper(storage.open_stream(uri), "utf-8-sig", "surrogateescape")
    for number, line in enumerate(stream, start=1):
        place = f"{file}, line {number}"
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError as error:
            yield place, InvalidSampleError("broken JSON", str(error))
            continue
        if isinstance(row, dict):
            yield place, row
        elif row is not None:
            yield place, InvalidSampleError("broken row", "it is no object")
