"""CSV, TSV and JSON lines: a column with paths of images, one or several with captions.

Rows of one path are one sample. A JSON document that is a list of objects (BLIP's annotations) is such a table too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.text import decode_json
from vladva.data.columns import (
    PATH_COLUMNS,
    choose_caption_columns,
    choose_column,
    choose_image_column,
    refuse_urls,
    to_name,
    to_texts,
)
from vladva.data.delimited import TABLE_SUFFIXES, read_rows_of_text
from vladva.data.source import Entry, FileSet, LeftOut, Rejected, Source, SourceOptions, file_by_file

TITLE = "CSV, TSV (quoted or not) or JSON lines with a column of paths and one or more of captions"
PRIORITY = 5
OPTIONS = ("images", "image_column", "caption_columns", "id_column")
LIST = re.compile(rb"^(\xef\xbb\xbf)?\s*\[\s*\{")


def match(files: FileSet) -> list[str]:
    """Tables at the top of the folder; elsewhere they belong to something else."""
    found = [name for name in files.with_suffix(*TABLE_SUFFIXES) if "/" not in name]
    lists = [name for name in files.with_suffix(".json") if "/" not in name and LIST.match(files.head(name, 100))]
    return found or lists


split = file_by_file


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry a row. Samples are called by their path, unless --id-column says what."""
    for file in source.files:
        yield from table_entries(source, file, source.options)


def table_entries(
    source: Source, file: str, options: SourceOptions, folder: str = ""
) -> Iterator[Entry | Rejected | LeftOut]:
    """The entries of one table, whose paths are relative to `folder` of where images are."""
    columns = TableColumns("", [])
    header: list[str] = []
    unit = "row" if file.lower().endswith(".json") else "line"
    for number, row in read_table_rows(storage.join(source.uri, file), file):
        location, row_id = f"{file}, {unit} {number}", f"{file}#{number}"
        if isinstance(row, InvalidSampleError):
            yield Rejected(location, location, row.reason, row.detail)
            continue
        path = ""
        try:
            if list(row) != header:  # rows of JSON need not have the same fields
                columns = _find_columns(source, options, list(row), file, is_first=not header)
                header = list(row)
            path = to_name(row[columns.image]) if columns.image else ""
            refuse_urls(path, file)
            path = path if not folder or "://" in path else storage.join(folder, path)
            name = to_name(row[options.id_column]) if options.id_column else path or row_id
            texts = [text for column in columns.captions for text in to_texts(row[column])]
            yield Entry(name, location, path, texts, row_id=row_id)
        except InvalidSampleError as problem:
            yield Rejected(location, location, problem.reason, problem.detail, path)


class TableColumns(NamedTuple):
    """What is where in a row; `image` is empty where there is no column of paths, and none is needed."""

    image: str
    captions: list[str]


def _find_columns(
    source: Source, options: SourceOptions, columns: list[str], file: str, *, is_first: bool
) -> TableColumns:
    """Raises ValueError for the first row, which stands for the table, InvalidSampleError for another."""
    try:
        image = choose_image_column(
            PATH_COLUMNS,
            options.image_column,
            columns,
            file,
            required=source.needs_images or bool(options.image_column),
        )
        captions = choose_caption_columns(options.caption_columns, [name for name in columns if name != image], file)
        if not image and not captions:
            choose_image_column(PATH_COLUMNS, "", columns, file)  # says what there is
        if options.id_column:
            choose_column("ids", "--id-column", (), options.id_column, columns, file)
    except ValueError as error:
        if is_first:
            raise
        raise InvalidSampleError("broken row", str(error)) from None
    return TableColumns(image, captions)


def read_table_rows(uri: str, file: str) -> Iterator[tuple[int, dict[str, Any] | InvalidSampleError]]:
    """(number, row) of every row of a table in text, or what is wrong with it: lines count from 1, objects from 0.

    Raises ValueError where it has no header, or is no list of objects.
    """
    if not file.lower().endswith(".json"):
        yield from read_rows_of_text(uri, file)
        return
    try:
        rows = decode_json(storage.read_bytes(uri))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(rows, list):
        raise ValueError(f"{file} is no list of objects with a path and a caption")
    for number, row in enumerate(rows):
        yield number, row if isinstance(row, dict) else InvalidSampleError("broken row", "it is no object")
