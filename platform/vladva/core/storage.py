"""Any URI -> bytes: the one door to local disks and S3, with retries, atomic writes and ranged reads.

A URI is `/path`, `relative/path`, `file:///path` or `s3://bucket/key`. S3 takes its keys, region and endpoint from the
standard AWS variables (AWS_ENDPOINT_URL for a server that is not Amazon's).

Every attempt that fails is logged, one by one, so that a log tells how often a storage failed. What is read is complete
or an error: the length is checked each time.
"""

from __future__ import annotations

import io
import json
import logging
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from vladva.core.object_store import S3, LocalDisk, Store, TransientStorageError

if TYPE_CHECKING:
    from pyarrow import fs

logger = logging.getLogger(__name__)

T = TypeVar("T")

ATTEMPTS = 7
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 10.0  # seconds; the pauses double in between
MAX_GAP = 64 << 10  # bytes; reading over a gap this small costs less than another request
MAX_SPAN = 16 << 20  # bytes in one request
AWS_VARIABLES = (
    *("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"),
    *("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"),
)


class ByteRange(NamedTuple):
    """`length` bytes from `offset` on of the object at `uri`."""

    uri: str
    offset: int
    length: int


class FileInfo(NamedTuple):
    """A file below a listed folder: its bytes, and when it was last changed in nanoseconds since 1970."""

    uri: str
    size: int
    changed: int


# --- URIs ------------------------------------------------------------------------------------------------------------


def open_storage(uri: str) -> tuple[fs.FileSystem, str]:
    """The filesystem, as pyarrow takes it, that holds `uri`, and the path in it, for other libraries."""
    store, path = _store(uri)
    return store.filesystem(), path


def join(uri: str, *parts: str) -> str:
    """`uri` with more path behind it."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def resolve(folder_uri: str, path: str) -> str:
    """URI of a file that is named relative to a folder, or absolutely."""
    return path if path.startswith("/") or "://" in path else join(folder_uri, path)


def absolute(uri: str) -> str:
    """`uri` as it reads from any working directory: a task on another node has one of its own."""
    store, path = _store(uri)
    return path if isinstance(store, LocalDisk) else f"s3://{path}"


def _store(uri: str) -> tuple[Store, str]:
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return LocalDisk(), os.path.abspath(uri)
    if scheme == "file" and rest.startswith("/"):
        return LocalDisk(), os.path.abspath(rest)
    if scheme == "s3" and rest.partition("/")[0]:
        return _s3(tuple(os.environ.get(name) for name in AWS_VARIABLES)), rest.rstrip("/")
    raise ValueError(f"{uri!r} cannot be opened: use /path, relative/path, file:///path or s3://bucket/key")


@lru_cache
def _s3(environment: tuple[str | None, ...]) -> S3:
    return S3(endpoint=environment[0] or environment[1])


# --- whole objects ---------------------------------------------------------------------------------------------------


def exists(uri: str) -> bool:
    """Whether there is a file or a folder at `uri`."""
    store, path = _store(uri)
    return _retry(uri, lambda: store.exists(path))


def list_files(uri: str, suffix: str = "", *, recursive: bool = True) -> list[str]:
    """URIs of the files anywhere below the folder `uri`, sorted; none where the folder does not exist.

    Not `recursive`: of the files in the folder itself.
    """
    return [info.uri for info in list_infos(uri, recursive=recursive) if info.uri.endswith(suffix)]


def list_infos(uri: str, *, recursive: bool = True) -> list[FileInfo]:
    """What is known of each file anywhere below the folder `uri` (or only in the folder itself), sorted by URI."""
    store, path = _store(uri)
    infos = _retry(uri, lambda: list(store.list(path, recursive=recursive)))
    return sorted(FileInfo(join(uri, below), size, changed) for below, size, changed in infos)


def file_info(uri: str) -> FileInfo:
    """What is known of the file at `uri`. Raises FileNotFoundError, for a folder too."""
    store, path = _store(uri)
    return FileInfo(uri, *_retry(uri, lambda: store.info(path)))


def read_bytes(uri: str) -> bytes:
    """The whole object at `uri`. Raises FileNotFoundError."""
    store, path = _store(uri)
    return _retry(uri, lambda: store.read(path))


def write_bytes_atomically(uri: str, data: bytes) -> None:
    """Write `uri` so that a reader sees the old content or the new, never a part; folders are made as needed."""
    store, path = _store(uri)
    _retry(uri, lambda: store.write(path, data))


def delete_folder(uri: str) -> None:
    """Remove every file below the folder `uri`, and on a disk the folder itself."""
    for file in list_files(uri):
        delete_file(file)
    store, path = _store(uri)
    if isinstance(store, LocalDisk):
        shutil.rmtree(path, ignore_errors=True)


def delete_file(uri: str) -> None:
    """Remove the file at `uri`."""
    store, path = _store(uri)
    _retry(uri, lambda: store.delete(path))


def read_json(uri: str) -> Any:
    """The JSON document at `uri`. Raises FileNotFoundError."""
    return json.loads(read_bytes(uri))


def write_json(uri: str, content: Any) -> None:
    """Write `content` as a JSON document, atomically."""
    write_bytes_atomically(uri, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


# --- parts of objects ------------------------------------------------------------------------------------------------


def read_ranges(ranges: Sequence[ByteRange], in_flight: int = 8) -> list[bytes]:
    """The bytes of every range, in the order given, with at most `in_flight` requests at a time.

    Neighbours are read by one request: ranges of one object with small gaps between them. Raises EOFError when an
    object ends before a range does, FileNotFoundError when there is none.
    """
    spans = _coalesce(ranges)
    parts: list[bytes] = [b""] * len(ranges)
    with ThreadPoolExecutor(max_workers=max(1, min(in_flight, len(spans)))) as pool:
        for (span, members), body in zip(spans, pool.map(_read_range, [span for span, _ in spans]), strict=True):
            for number in members:
                start = ranges[number].offset - span.offset
                parts[number] = body[start : start + ranges[number].length]
    return parts


def _coalesce(ranges: Sequence[ByteRange]) -> list[tuple[ByteRange, list[int]]]:
    """The requests that fetch `ranges`, each with the positions in `ranges` of those it covers."""
    spans: list[tuple[ByteRange, list[int]]] = []
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number]):
        uri, offset, length = ranges[number]
        if spans:
            (last_uri, start, last_length), members = spans[-1]
            end = max(start + last_length, offset + length)
            if uri == last_uri and offset - (start + last_length) <= MAX_GAP and end - start <= MAX_SPAN:
                members.append(number)
                spans[-1] = (ByteRange(uri, start, end - start), members)
                continue
        spans.append((ranges[number], [number]))
    return spans


def _read_range(part: ByteRange) -> bytes:
    store, path = _store(part.uri)
    return _retry(part.uri, lambda: store.read(path, part.offset, part.length)) if part.length else b""


def open_stream(uri: str, block_size: int = 8 << 20) -> io.BufferedReader:
    """The object at `uri` as a file to be read in order, in blocks of `block_size` bytes. Raises FileNotFoundError."""
    return io.BufferedReader(RangedFile(uri), block_size)


class RangedFile(io.RawIOBase):
    """An object as a seekable file. Every read is a ranged request of its own, so a fault costs no more than that one.

    size: of the object, where it is known. Raises FileNotFoundError.
    """

    def __init__(self, uri: str, size: int | None = None) -> None:
        store, path = _store(uri)
        self.uri = uri
        self.size = _retry(uri, lambda: store.size(path)) if size is None else size
        self.position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        length = max(0, min(len(buffer), self.size - self.position))
        buffer[:length] = _read_range(ByteRange(self.uri, self.position, length))
        self.position += length
        return length


def _retry(uri: str, operation: Callable[[], T]) -> T:
    """`operation()`, again while the fault is a passing one; the pauses grow and are random (full jitter)."""
    for attempt in range(1, ATTEMPTS):
        try:
            return operation()
        except TransientStorageError as error:
            pause = random.uniform(0, min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** (attempt - 1)))
            logger.warning("%s: attempt %d of %d failed, next in %.1f s: %s", uri, attempt, ATTEMPTS, pause, error)
            time.sleep(pause)
    return operation()
