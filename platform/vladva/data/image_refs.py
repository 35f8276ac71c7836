"""Image references: where the bytes of an image are, and the bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core.errors import InvalidSampleError
from vladva.core.object_store import TransientStorageError
from vladva.core.storage import ByteRange, RangedFile, open_storage, read_ranges


class ImageRef(NamedTuple):
    """Where the bytes of one image are."""

    id: str  # names the image and the version of the file that holds it, so that a changed file is a new image
    name: str  # the name annotations use
    uri: str  # of the file that holds it, absolute
    offset: int  # first byte; with `column`, the row
    length: int  # bytes; with `column`, 0
    column: str = ""  # of a Parquet file whose cells hold bytes or a {bytes, path} struct


def read_images(refs: Sequence[ImageRef]) -> list[bytes]:
    """Encoded bytes of the images, in order; neighbours in one file cost one request."""
    files = [number for number, ref in enumerate(refs) if not ref.column]
    ranges = [ByteRange(refs[number].uri, refs[number].offset, refs[number].length) for number in files]
    bodies = dict(zip(files, read_ranges(ranges), strict=True))
    tables: dict[tuple[str, str], list[int]] = {}
    for number, ref in enumerate(refs):
        if ref.column:
            tables.setdefault((ref.uri, ref.column), []).append(number)
    for (uri, column), numbers in tables.items():
        bodies |= zip(numbers, _read_cells(uri, column, [refs[number].offset for number in numbers]), strict=True)
    return [bodies[number] for number in range(len(refs))]


def _read_cells(uri: str, column: str, rows: Sequence[int]) -> list[bytes]:
    """The cells of a Parquet column in those rows; only the row groups that hold them are read, each once."""
    filesystem, path = open_storage(uri)
    cells: dict[int, bytes | dict] = {}
    with filesystem.open_input_file(path) as file:
        parquet = pq.ParquetFile(file)
        first = 0
        for group in range(parquet.num_row_groups):
            after = first + parquet.metadata.row_group(group).num_rows
            wanted = [row for row in rows if first <= row < after]
            if wanted:
                values = parquet.read_row_group(group, columns=[column])[column]
                cells |= {row: values[row - first].as_py() for row in wanted}
            first = after
    found = [cells[row] for row in rows]
    return [cell["bytes"] if isinstance(cell, dict) else cell for cell in found]


ROWS_AT_ONCE = 64  # of a column of images


def read_cells(
    uri: str, column: str, rows: Sequence[int]
) -> Iterator[tuple[bytes | InvalidSampleError | None, str | None]]:
    """(bytes, path) in these rows (ascending) of a Parquet column, a few rows at a time in memory.

    The row groups that hold them are read up to the last of them.
    """
    table = pq.ParquetFile(RangedFile(uri), buffer_size=1 << 20, pre_buffer=False)
    first = 0
    for group in range(table.num_row_groups):
        end = first + table.metadata.row_group(group).num_rows
        wanted = [row - first for row in rows if first <= row < end]
        found = 0
        try:
            for cell in _cells(table, group, column, wanted) if wanted else ():
                yield (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
                found += 1
        except TransientStorageError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            problem = InvalidSampleError("unreadable Parquet", str(error))
            yield from ((problem, None) for _ in wanted[found:])
        first = end


def _cells(table: pq.ParquetFile, group: int, column: str, rows: Sequence[int]) -> Iterator[Any]:
    """The values in these rows of a row group."""
    first, waiting = 0, deque(rows)
    for batch in table.iter_batches(ROWS_AT_ONCE, row_groups=[group], columns=[column]):
        while waiting and waiting[0] < first + len(batch):
            yield batch.column(0)[waiting.popleft() - first].as_py()
        if not waiting:
            return
        first += len(batch)
