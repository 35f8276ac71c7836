"""Pictures: the bytes that a source's entries point at, or what keeps them from being read.

A picture is a file, a range of bytes in one, or a cell of a Parquet column.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vladva import storage
from vladva.storage import ByteRange, RangedFile
from vladva.stores import PassingFaultError
from vladva.tars import BadDataError

ROWS_AT_ONCE = 64  # of a column of pictures
READS = 16  # of whole files at a time


def read_pictures(images_uri: str, samples: list[dict[str, Any]]) -> list[bytes | BadDataError]:
    """The bytes of every picture, or what keeps them from being read."""
    pictures: list[bytes | BadDataError] = [b""] * len(samples)
    columns: dict[tuple[str, str], list[int]] = {}
    parts, files = [], []
    for place, sample in enumerate(samples):
        if sample["column"]:
            columns.setdefault((sample["file"], sample["column"]), []).append(place)
        else:
            (parts if sample["offset"] >= 0 else files).append(place)
    ranges = [
        ByteRange(place_of(images_uri, samples[place]["file"]), samples[place]["offset"], samples[place]["length"])
        for place in parts
    ]
    for place, data in zip(parts, storage.read_ranges(ranges), strict=True):
        pictures[place] = data
    for (file, column), places in columns.items():
        rows = [samples[place]["offset"] for place in places]
        for place, (data, path) in zip(places, read_cells(file, column, rows), strict=True):
            pictures[place] = data or b""
            if not data and path:  # Hugging Face's way of leaving a picture where it is
                samples[place]["file"] = path
                files.append(place)
    with ThreadPoolExecutor(READS) as pool:
        uris = [place_of(images_uri, samples[place]["file"]) for place in files]
        for place, data in zip(files, pool.map(read_file, uris), strict=True):
            pictures[place] = data
    return pictures


def place_of(folder_uri: str, file: str) -> str:
    """URI of a file that is named relative to a folder, or absolutely."""
    return file if file.startswith("/") or "://" in file else storage.join(folder_uri, file)


def read_file(uri: str) -> bytes | BadDataError:
    """A whole file, or what keeps it from being read."""
    return fetch(lambda: storage.read_bytes(uri))


def fetch(read: Callable[[], bytes]) -> bytes | BadDataError:
    """What `read` gives; a storage that fails for the moment is no fault of the sample and is raised."""
    try:
        return read()
    except PassingFaultError:
        raise
    except FileNotFoundError as error:
        return BadDataError("missing file", str(error))
    except (OSError, ValueError) as error:
        return BadDataError("unreadable file", str(error))


def read_cells(uri: str, column: str, rows: Sequence[int]) -> Iterator[tuple[bytes | BadDataError | None, str | None]]:
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
        except PassingFaultError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            problem = BadDataError("unreadable Parquet", str(error))
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
