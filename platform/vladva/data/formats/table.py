"""CSV and TSV: a column with paths of images, one or several with captions. Rows of one path are one sample."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.prepare.sources import (
    PATH_COLUMNS,
    Entry,
    FileSet,
    LeftOut,
    Rejected,
    Source,
    first_column,
    refuse_urls,
    texts_of,
)
from vladva.prepare.sources.parquet import caption_columns, one_text

TITLE = "CSV or TSV with a header line, a column of paths and one or more of captions"
PRIORITY = 4
OPTIONS = ("images", "image_column", "caption_columns", "id_column")
ENDINGS = (".csv", ".tsv")


def match(files: FileSet) -> list[str]:
    """Tables at the top of the folder; elsewhere they belong to something else."""
    return [name for name in files.ending(*ENDINGS) if "/" not in name]


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry a line. Samples are called by their path, unless --id-column says what."""
    options = source.options
    for file in source.files:
        columns: list[str] = []
        for place, row in read_table(storage.join(source.uri, file), file):
            if isinstance(row, InvalidSampleError):
                yield Rejected(place, place, row.reason, row.detail)
                continue
            if not columns:
                columns = list(row)
                image = first_column("paths", "--image-column", PATH_COLUMNS, options.image_column, columns, file)
                captions = caption_columns(options.caption_columns, columns, file)
                name = first_column("ids", "--id-column", (), options.id_column or image, columns, file)
            try:
                path, called = one_text(row[image]), one_text(row[name])
                refuse_urls(path, file)
                texts = [text for column in captions for text in cell_texts(row[column])]
                yield Entry(called, place, path, texts)
            except InvalidSampleError as problem:
                yield Rejected(place, place, problem.reason, problem.detail)


def read_table(uri: str, file: str) -> Iterator[tuple[str, dict[str, str] | InvalidSampleError]]:
    """(place, row) of every line of a table, or what is wrong with it. Bytes that are no UTF-8 come as surrogates.

    Raises ValueError where there is no header.
    """
    stream = io.TextIOWrapper(storage.open_stream(uri), "utf-8-sig", "surrogateescape", newline="")
    lines = csv.reader(stream, delimiter="\t" if file.lower().endswith(".tsv") else ",")
    header = next(lines, None)
    if not header or len(set(header)) < len(header):
        raise ValueError(f"{file} begins with {header}; a header line with a name for every column is needed")
    while True:
        place = f"{file}, line {lines.line_num + 1}"
        try:
            row = next(lines)
        except StopIteration:
            return
        except csv.Error as error:
            yield place, InvalidSampleError("broken row", str(error))
            continue
        if len(row) == len(header):
            yield place, dict(zip(header, row, strict=True))
        elif row:
            yield place, InvalidSampleError("broken row", f"{len(row)} cells where the header has {len(header)}: {row}")


def cell_texts(cell: str) -> list[str]:
    """The captions in a cell: a text, or a list of texts in JSON. Raises InvalidSampleError."""
    values: Any = cell
    if cell.startswith("["):
        try:
            values = json.loads(cell)
        except ValueError:
            values = cell
        if not all(isinstance(value, str) for value in values):
            values = cell
    return texts_of(values)
