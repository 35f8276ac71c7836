"""Lines of text -> rows of a table (CSV, TSV), whether or not its cells are quoted, and JSON lines.

CSV has quotes as RFC 4180 says. Of TSV there are two kinds: with those quotes, as spreadsheets and pandas write it, and
without any, as img2dataset reads it, where a quotation mark is one like any other character. Which one a line is of is
seen from the line: it is read as quoted where that gives as many cells as the header has, else as it stands. A quote
that is opened and not closed so costs its own line at most, never the lines that follow.
"""

from __future__ import annotations

import csv
import io
import json
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.images import IMAGE
from vladva.core.text import UTF_16

DELIMITERS = {".csv": ",", ".tsv": "\t"}
TABLE_SUFFIXES = (*DELIMITERS, ".jsonl")
MOST_LINES = 1000  # that one quoted cell may go over


class Line(NamedTuple):
    """A line of a file, without its end, and its number from 1 on."""

    number: int
    text: str


def read_rows_of_text(uri: str, file: str) -> Iterator[tuple[int, dict[str, Any] | InvalidSampleError]]:
    """(line number, row) of every row of a .csv, .tsv or .jsonl, or what is wrong with it; empty lines are skipped.

    In UTF-8, or UTF-16 with its byte order mark, as spreadsheets save "Unicode text"; bytes that are neither come as
    surrogates. Raises ValueError where a table has no header.
    """
    body = storage.open_stream(uri)
    encoding = "utf-16" if body.peek(2).startswith(UTF_16) else "utf-8-sig"
    stream = io.TextIOWrapper(body, encoding, "surrogateescape", newline="\n")
    lines = (Line(number, text.rstrip("\n").removesuffix("\r")) for number, text in enumerate(stream, start=1))
    if file.lower().endswith(".jsonl"):
        return _json_rows(lines)
    return _delimited_rows(lines, DELIMITERS[file[-4:].lower()], file)


def _json_rows(lines: Iterator[Line]) -> Iterator[tuple[int, dict[str, Any] | InvalidSampleError]]:
    for number, text in lines:
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            yield number, InvalidSampleError("broken JSON", str(error))
            continue
        yield number, row if isinstance(row, dict) else InvalidSampleError("broken row", "it is no object")


def _delimited_rows(
    lines: Iterator[Line], delimiter: str, file: str
) -> Iterator[tuple[int, dict[str, str] | InvalidSampleError]]:
    first = next(lines, Line(1, ""))
    header = _parse_quoted([first], delimiter)[0] or first.text.split(delimiter)
    if not first.text.strip() or len(set(header)) < len(header):
        raise ValueError(f"{file} begins with {first.text!r}; a header line with a name for every column is needed")
    # Of a table with quotes around every cell, and of CSV, quotes around a cell are never part of it.
    reader = RecordReader(lines, len(header), delimiter, always_quoted=delimiter == "," or first.text.startswith('"'))
    for number, cells in reader.records():
        row = cells if isinstance(cells, InvalidSampleError) else dict(zip(header, cells, strict=True))
        yield number, row


class RecordReader:
    """Lines -> records of `width` cells."""

    def __init__(self, lines: Iterator[Line], width: int, delimiter: str, *, always_quoted: bool) -> None:
        self.lines = lines
        self.width = width
        self.delimiter = delimiter
        self.always_quoted = always_quoted
        self.waiting: deque[Line] = deque()  # lines that were looked at and belong to later records

    def records(self) -> Iterator[tuple[int, list[str] | InvalidSampleError]]:
        """(number of its first line, cells or what is wrong) of every record."""
        while (line := self._next()) is not None:
            if line.text.strip():
                yield line.number, self._record(line)

    def _next(self) -> Line | None:
        return self.waiting.popleft() if self.waiting else next(self.lines, None)

    def _record(self, line: Line) -> list[str] | InvalidSampleError:
        if '"' not in line.text:
            return self._checked(line.text.split(self.delimiter), line)
        record = [line]
        cells, is_open = _parse_quoted(record, self.delimiter)
        while is_open and len(record) < MOST_LINES and (more := self._next()) is not None:
            record.append(more)
            if '"' in more.text:  # no other line can close the cell
                cells, is_open = _parse_quoted(record, self.delimiter)
        if cells is not None and len(cells) == self.width and not self._reads_better_plain(record):
            return cells
        self.waiting.extendleft(reversed(record[1:]))
        return self._checked(line.text.split(self.delimiter), line)

    def _reads_better_plain(self, record: list[Line]) -> bool:
        """Whether the quotes of a record that could be quoted are characters of its text."""
        if self.always_quoted and len(record) == 1:
            return False
        rows = [line.text.split(self.delimiter) for line in record]
        if any(len(cells) != self.width for cells in rows):
            return False
        if len(rows) == 1:  # a quote inside a quoted cell is doubled, and only such cells need quotes
            return '""' not in record[0].text
        return not self.always_quoted or all(any(IMAGE.search(cell.strip('"')) for cell in cells) for cells in rows)

    def _checked(self, cells: list[str], line: Line) -> list[str] | InvalidSampleError:
        if len(cells) == self.width:
            return cells
        told = f"{len(cells)} cells where the header has {self.width}: {line.text}"
        return InvalidSampleError("broken row", told)


def _parse_quoted(record: list[Line], delimiter: str) -> tuple[list[str] | None, bool]:
    """The cells of a record by RFC 4180 (None where it is none), and whether further lines may complete it."""
    try:
        text = record[0].text if len(record) == 1 else "\n".join(line.text for line in record)
        rows = list(csv.reader((text,), delimiter=delimiter, strict=True))
    except csv.Error as error:
        return None, "unexpected end of data" in str(error)
    return (rows[0] if len(rows) == 1 else None), False
