"""Parquet: images as bytes, as Hugging Face's {bytes, path}, or as paths; captions in one column or several."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.object_store import TransientStorageError
from vladva.data.columns import (
    IMAGE_COLUMNS,
    choose_caption_columns,
    choose_column,
    choose_image_column,
    refuse_urls,
    to_name,
    to_texts,
)
from vladva.data.parquet_cells import is_text_type, plain_rows
from vladva.data.source import Entry, FileSet, LeftOut, Rejected, Source, ahead

TITLE = "Parquet with a column of images (bytes or {bytes, path}) or of their paths"
PRIORITY = 2
OPTIONS = ("images", "image_column", "caption_columns", "id_column")


def match(files: FileSet) -> list[str]:
    """Every Parquet file."""
    return files.with_suffix(".parquet")


def split(source: Source) -> Iterator[Source]:
    """The row groups of every file; a file that cannot be opened is one part, and says so."""
    for number, file in enumerate(source.files):
        part = source.part(number, number + 1)
        footer = _footer(source, file)
        groups = [-1] if isinstance(footer, Rejected) else range(footer.num_row_groups)
        for group in groups:
            yield replace(part, row_group=group)


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry a row, read by row groups, the images' column only where it holds paths.

    Rows with bytes are called FILE#ROW, unless --id-column says what; rows with the same path are one sample.
    """
    for found in ahead(_read_group, _groups(source)):
        yield from found


def _groups(source: Source) -> Iterator[tuple[Source, str, int, pq.FileMetaData | Rejected]]:
    """The row groups of every file, each with the file's footer, so that it is read once."""
    for file in source.files:
        footer = _footer(source, file)
        groups = [-1] if isinstance(footer, Rejected) else range(footer.num_row_groups)
        for group in groups:
            if source.row_group in (-1, group):
                yield source, file, group, footer


def _footer(source: Source, file: str) -> pq.FileMetaData | Rejected:
    try:
        return pq.ParquetFile(storage.RangedFile(storage.join(source.uri, file))).metadata
    except pa.ArrowInvalid as error:
        return Rejected(file, file, "unreadable Parquet", str(error)[:200])


def _read_group(piece: tuple[Source, str, int, pq.FileMetaData | Rejected]) -> list[Entry | Rejected]:
    source, file, group, footer = piece
    if isinstance(footer, Rejected):
        return [footer]
    table = pq.ParquetFile(storage.RangedFile(storage.join(source.uri, file)), metadata=footer)
    columns = find_columns(source, table.schema_arrow, file)
    first = sum(table.metadata.row_group(number).num_rows for number in range(group))
    numbers = range(first, first + table.metadata.row_group(group).num_rows)
    try:
        rows = plain_rows(table.read_row_group(group, sorted(columns.read())), len(numbers))
    except TransientStorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        return [Rejected(f"{file}#{n}", f"{file}, row {n}", "unreadable Parquet", str(error)[:200]) for n in numbers]
    return [_entry(source, columns, file, number, row) for number, row in zip(numbers, rows, strict=True)]


def _entry(source: Source, columns: ParquetColumns, file: str, number: int, row: dict[str, Any]) -> Entry | Rejected:
    location, row_id = f"{file}, row {number}", f"{file}#{number}"
    name, path = row_id, ""
    try:
        if columns.id:
            name = to_name(row[columns.id])
        if columns.by_path:
            path = to_name(row[columns.image])
            refuse_urls(path, file)
        texts = [text for column in columns.captions for text in to_texts(row[column])]
        if columns.by_path:
            return Entry(name if columns.id else path, location, path, texts, row_id=row_id)
        if not columns.image:
            return Entry(name, location, "", texts, row_id=row_id)
        uri = storage.join(source.uri, file)
        return Entry(name, location, uri, texts, offset=number, column=columns.image, row_id=row_id)
    except InvalidSampleError as problem:
        return Rejected(name, location, problem.reason, problem.detail, path)


class ParquetColumns(NamedTuple):
    """What is where in a file; `by_path`: the images' column holds paths."""

    image: str
    by_path: bool
    captions: list[str]
    id: str

    def read(self) -> set[str]:
        """The columns that a listing needs."""
        return {*self.captions, *([self.id] if self.id else []), *([self.image] if self.by_path else [])}


def find_columns(source: Source, schema: pa.Schema, file: str) -> ParquetColumns:
    """The columns of a file that the options name, or that have a known name. Raises ValueError with the fix."""
    options, names = source.options, schema.names
    image = choose_image_column(IMAGE_COLUMNS, options.image_column, names, file, required=source.needs_images)
    if options.id_column:
        choose_column("ids", "--id-column", (), options.id_column, names, file)
    by_path = bool(image) and is_path_column(schema, image, file)
    captions = choose_caption_columns(options.caption_columns, [name for name in names if name != image], file)
    if not image and not captions:
        choose_image_column(IMAGE_COLUMNS, "", names, file)  # says what there is
    return ParquetColumns(image, by_path, captions, options.id_column)


def is_path_column(schema: pa.Schema, column: str, file: str) -> bool:
    """Whether a column of images holds paths, and not bytes. Raises ValueError where it holds neither."""
    kind = schema.field(column).type
    if is_text_type(kind):
        return True
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_fixed_size_binary)
    has_bytes = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not has_bytes and not any(is_binary(kind) for is_binary in binary):
        raise ValueError(f"{file}: the column {column} is of type {kind}; bytes, {{bytes, path}} or paths are needed")
    return False
