"""Image references: where the bytes of an image are, and the one function that fetches them.

A file as a whole, a range of bytes in one (a member of a tar), or a cell of a Parquet column: the scan's index, the
sources of `prepare`, corpora and benchmarks all say so with an `ImageRef`.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.object_store import TransientStorageError
from vladva.core.storage import ByteRange, RangedFile

FILES_IN_FLIGHT = 16  # whole files that are read at a time
ROWS_PER_BATCH = 64  # of a column of images, in memory together


class ImageRef(NamedTuple):
    """Where the bytes of one image are."""

    id: str  # names the image; in benchmarks also the version of its file, so that a changed file is a new image
    name: str  # what people call it: the name in annotations, or where it is in the source
    uri: str  # of the file that holds it, absolute
    offset: int = 0  # first byte; with `column`, the row
    length: int = -1  # bytes, -1 for all up to the end of the file; with `column` it means nothing
    column: str = ""  # of a Parquet file, whose cells hold bytes, a path, or Hugging Face's {bytes, path}
    crc32: int | None = None  # of the bytes, where a scan has seen them


def read_images(refs: Sequence[ImageRef], in_flight: int = 8) -> list[bytes]:
    """The encoded images, in order. Raises ValueError that names the first that cannot be read."""
    images = fetch_images(refs, in_flight=in_flight)
    for ref, image in zip(refs, images, strict=True):
        if isinstance(image, InvalidSampleError):
            raise ValueError(f"{ref.id}: {image.reason}: {image.detail}")
    return images  # type: ignore[return-value]  # the loop has seen that all are bytes


def fetch_images(
    refs: Sequence[ImageRef], *, folder_uri: str = "", in_flight: int = 8
) -> list[bytes | InvalidSampleError]:
    """The encoded images, in order, or what keeps each from being read; nothing is decoded.

    Ranges that are neighbours in one file cost one request, cells of one column are read together. A path in a cell
    is relative to `folder_uri`, or to the folder of its table. A storage that fails for the moment is no fault of an
    image: TransientStorageError is raised.
    """
    images: list[bytes | InvalidSampleError] = [b""] * len(refs)
    ranges = [i for i, ref in enumerate(refs) if not ref.column and ref.length >= 0]
    for i, data in zip(ranges, _fetch_ranges([refs[i] for i in ranges], in_flight), strict=True):
        images[i] = data

    files = {i: ref.uri for i, ref in enumerate(refs) if not ref.column and ref.length < 0}
    columns: dict[tuple[str, str], list[int]] = {}
    for i, ref in enumerate(refs):
        if ref.column:
            columns.setdefault((ref.uri, ref.column), []).append(i)
    for (uri, column), members in columns.items():
        members.sort(key=lambda i: refs[i].offset)
        for i, (cell, path) in zip(members, read_cells(uri, column, [refs[i].offset for i in members]), strict=True):
            if path and not cell:
                files[i] = storage.resolve(folder_uri or uri.rpartition("/")[0], path)
            else:
                images[i] = cell or b""

    with ThreadPoolExecutor(FILES_IN_FLIGHT) as pool:
        for i, data in zip(files, pool.map(read_file, files.values()), strict=True):
            images[i] = data
    return [_checked(ref, image) for ref, image in zip(refs, images, strict=True)]


def read_file(uri: str) -> bytes | InvalidSampleError:
    """A whole file, or what keeps it from being read. Raises TransientStorageError."""
    return _attempt(lambda: storage.read_bytes(uri))


def _fetch_ranges(refs: Sequence[ImageRef], in_flight: int) -> list[bytes] | list[bytes | InvalidSampleError]:
    ranges = [ByteRange(ref.uri, ref.offset, ref.length) for ref in refs]
    try:
        return storage.read_ranges(ranges, in_flight)
    except TransientStorageError:
        raise
    except (OSError, EOFError, ValueError):  # one of them: find out which
        return [_attempt(lambda part=part: storage.read_ranges([part])[0]) for part in ranges]  # type: ignore[misc]


def _attempt(read: Callable[[], bytes]) -> bytes | InvalidSampleError:
    try:
        return read()
    except TransientStorageError:
        raise
    except FileNotFoundError as error:
        return InvalidSampleError("missing file", str(error))
    except EOFError as error:
        return InvalidSampleError("truncated file", str(error))
    except (OSError, ValueError) as error:
        return InvalidSampleError("unreadable file", str(error))


def _checked(ref: ImageRef, image: bytes | InvalidSampleError) -> bytes | InvalidSampleError:
    if ref.crc32 is None or isinstance(image, InvalidSampleError) or zlib.crc32(image) == ref.crc32:
        return image
    return InvalidSampleError("changed file", f"not what the scan saw there: {ref.uri} has changed, scan it again")


# --- Parquet ---------------------------------------------------------------------------------------------------------


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
                yield _content(cell)
                found += 1
        except TransientStorageError:
            raise
        except (pa.ArrowInvalid, OSError) as error:
            problem = InvalidSampleError("unreadable Parquet", str(error))
            yield from ((problem, None) for _ in wanted[found:])
        first = end
    for row in rows:
        if row >= first:
            yield InvalidSampleError("unreadable Parquet", f"there is no row {row}; the file ends at {first}"), None


def _cells(table: pq.ParquetFile, group: int, column: str, rows: Sequence[int]) -> Iterator[Any]:
    """The values in these rows of a row group."""
    first, waiting = 0, deque(rows)
    for batch in table.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=[column]):
        while waiting and waiting[0] < first + len(batch):
            yield batch.column(0)[waiting.popleft() - first].as_py()
        if not waiting:
            return
        first += len(batch)


def _content(cell: Any) -> tuple[bytes | InvalidSampleError | None, str | None]:
    """Bytes and path of a cell."""
    data, path = (cell.get("bytes"), cell.get("path")) if isinstance(cell, dict) else (cell, None)
    if isinstance(data, str):
        data, path = None, data
    if isinstance(data, (bytes, type(None))) and isinstance(path, (str, type(None))):
        return data, path
    return InvalidSampleError("not an image", f"the cell holds {type(data).__name__}, not bytes or a path"), None
