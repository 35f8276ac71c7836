"""Parquet: images as bytes, as Hugging Face's {bytes, path}, or as paths; captions in one column or several."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.object_store import TransientStorageError
from vladva.prepare.sources import (
    CAPTION_COLUMNS,
    PATH_COLUMNS,
    Entry,
    FileSet,
    LeftOut,
    Rejected,
    Source,
    ahead,
    first_column,
    refuse_urls,
    texts_of,
)

TITLE = "Parquet with a column of images (bytes or {bytes, path}) or of their paths"
PRIORITY = 1
OPTIONS = ("images", "image_column", "caption_columns", "id_column")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", *PATH_COLUMNS)


def match(files: FileSet) -> list[str]:
    """Every Parquet file."""
    return files.ending(".parquet")


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry a row, read by row groups, the images' column only where it holds paths.

    Rows with bytes are called FILE#ROW, unless --id-column says what; rows with the same path are one sample.
    """
    groups = ((source, file, *group) for file in source.files for group in _groups(source, file))
    for found in ahead(_read_group, groups):
        yield from found


def _groups(source: Source, file: str) -> list[tuple[int | Rejected, pq.FileMetaData | None]]:
    """The row groups of a file, each with the file's footer, so that it is read once."""
    try:
        footer = pq.ParquetFile(storage.RangedFile(storage.join(source.uri, file))).metadata
        return [(group, footer) for group in range(footer.num_row_groups)]
    except pa.ArrowInvalid as error:
        return [(Rejected(file, file, "unreadable Parquet", str(error)[:200]), None)]


def _read_group(piece: tuple[Source, str, int | Rejected, pq.FileMetaData | None]) -> list[Entry | Rejected]:
    source, file, group, footer = piece
    if isinstance(group, Rejected):
        return [group]
    table = pq.ParquetFile(storage.RangedFile(storage.join(source.uri, file)), metadata=footer)
    columns = _columns(source, table.schema_arrow, file)
    first = sum(table.metadata.row_group(number).num_rows for number in range(group))
    numbers = range(first, first + table.metadata.row_group(group).num_rows)
    try:
        rows = plain_rows(table.read_row_group(group, sorted(columns.read())), len(numbers))
    except TransientStorageError:
        raise
    except (pa.ArrowInvalid, OSError) as error:
        return [Rejected(f"{file}#{n}", f"{file}, row {n}", "unreadable Parquet", str(error)[:200]) for n in numbers]
    return [_entry(source, columns, file, number, row) for number, row in zip(numbers, rows, strict=True)]


def _entry(source: Source, columns: Columns, file: str, number: int, row: dict[str, Any]) -> Entry | Rejected:
    place = f"{file}, row {number}"
    name = f"{file}#{number}"
    try:
        if columns.id:
            name = one_text(row[columns.id])
        texts = [text for column in columns.captions for text in texts_of(row[column])]
        if columns.by_path:
            path = one_text(row[columns.image])
            refuse_urls(path, file)
            return Entry(name if columns.id else path, place, path, texts)
        return Entry(name, place, storage.join(source.uri, file), texts, offset=number, column=columns.image)
    except InvalidSampleError as problem:
        return Rejected(name, place, problem.reason, problem.detail)


class Columns(NamedTuple):
    """What is where in a file; `by_path`: the images' column holds paths."""

    image: str
    by_path: bool
    captions: list[str]
    id: str

    def read(self) -> set[str]:
        """The columns that a listing needs."""
        return {*self.captions, *([self.id] if self.id else []), *([self.image] if self.by_path else [])}


def _columns(source: Source, schema: pa.Schema, file: str) -> Columns:
    options, names = source.options, schema.names
    image = first_column("pictures", "--image-column", IMAGE_COLUMNS, options.image_column, names, file)
    if options.id_column:
        first_column("ids", "--id-column", (), options.id_column, names, file)
    kind = schema.field(image).type
    holds_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    holds_struct = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    if not (is_text(kind) or holds_bytes or holds_struct):
        raise ValueError(f"{file}: the column {image} is of type {kind}; bytes, {{bytes, path}} or paths are needed")
    return Columns(image, is_text(kind), caption_columns(options.caption_columns, names, file), options.id_column)


def caption_columns(given: tuple[str, ...], columns: list[str], file: str) -> list[str]:
    """The columns asked for, or the first of the known ones; none is no mistake, captions may be joined."""
    if given:
        return [first_column("captions", "--caption-column", (), name, columns, file) for name in given]
    return [name for name in CAPTION_COLUMNS if name in columns][:1]


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text."""
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def plain_rows(table: pa.Table, num_rows: int) -> Iterator[dict[str, Any]]:
    """Rows with text as bytes: of text that is no UTF-8, one bad cell would make the others unreadable."""
    columns = {name: _as_bytes(table[name]).to_pylist() for name in table.column_names}
    return ({name: column[number] for name, column in columns.items()} for number in range(num_rows))


def one_text(value: Any) -> str:
    """The text or number in a cell. Raises InvalidSampleError."""
    # Bytes that are no UTF-8 are for the catalog to refuse, as in the names of files.
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    if isinstance(text, int):
        text = str(text)
    if not isinstance(text, str) or not text.strip():
        raise InvalidSampleError("no id or path", repr(value))
    return text.strip()


def _as_bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.cast(kind.value_type)
    if is_text(kind):
        return column.cast(pa.large_binary())
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type):
        return column.cast(pa.large_list(pa.large_binary()))
    return column
