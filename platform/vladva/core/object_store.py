"""The two kinds of storage, local disk and S3: one attempt each, complete or an error (`storage.py` tries again).

S3 is spoken to by botocore and not by pyarrow, which fills the end of a body that came too short with whatever was in
memory (seen in 26.0), so that no test of the length can find it. Libraries that read and write by themselves get s3fs
for a filesystem: pyarrow's own forgets how often it is to try when it is sent to another process, as Ray Train does.
"""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, Protocol

from pyarrow import fs

from vladva.core.errors import refused

REQUEST_TIMEOUT_S = 10.0  # seconds without a byte after which a request is given up
CONNECTIONS = 64  # kept open per process
SDK_ATTEMPTS = 7  # of s3fs


class TransientStorageError(OSError):
    """The storage failed in a way that asking again may cure: throttled, reset, cut off, stalled."""


OUTDATED = {"ExpiredToken", "ExpiredTokenException", "InvalidToken", "RequestExpired"}  # keys; told with status 400


class Store(Protocol):
    """What both kinds can do. `path` is without scheme: `/folder/file` or `bucket/key`."""

    def filesystem(self) -> fs.FileSystem:
        """A filesystem as pyarrow takes it, for the same paths."""
        ...

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder."""
        ...

    def list(self, path: str, *, recursive: bool = True) -> Iterator[tuple[str, int, int]]:
        """(path below `path`, bytes, time of the last change in ns) of every file below a folder, in any order.

        Not `recursive`: of the files that are in the folder itself.
        """
        ...

    def size(self, path: str) -> int:
        """Bytes of a file."""
        ...

    def info(self, path: str) -> tuple[int, int]:
        """Bytes of a file, and time of its last change in ns. Raises FileNotFoundError for a folder too."""
        ...

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        """Exactly `length` bytes, or all up to the end. Raises EOFError when the file ends before that."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """Replace a file as a whole; readers see the old content or the new."""
        ...

    def delete(self, path: str) -> None:
        """Remove a file."""
        ...


class LocalDisk:
    """Files of this machine, or of a network disk that it has mounted."""

    def filesystem(self) -> fs.FileSystem:
        return fs.LocalFileSystem()

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def list(self, path: str, *, recursive: bool = True) -> Iterator[tuple[str, int, int]]:
        for info in self.filesystem().get_file_info(fs.FileSelector(path, recursive=recursive, allow_not_found=True)):
            if info.is_file:
                yield os.path.relpath(info.path, path), info.size, info.mtime_ns

    def size(self, path: str) -> int:
        return os.path.getsize(path)

    def info(self, path: str) -> tuple[int, int]:
        found = os.stat(path)
        if stat.S_ISDIR(found.st_mode):
            raise FileNotFoundError(errno.ENOENT, "a folder and not a file", path)
        return found.st_size, found.st_mtime_ns

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(length)
        if length is not None and len(data) != length:
            raise _ends_early(path, offset, length, os.path.getsize(path))
        return data

    def write(self, path: str, data: bytes) -> None:
        folder, name = os.path.split(path)
        unfinished = os.path.join(folder, f".{name}.{secrets.token_hex(4)}.part")
        try:
            os.makedirs(folder, exist_ok=True)
            with open(unfinished, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())  # else a power cut may leave the new name with no content
            os.replace(unfinished, path)
        except BaseException as error:
            if os.path.exists(unfinished):
                os.remove(unfinished)
            if isinstance(error, OSError) and (refusal := refused(error, path)):  # a full disk names no file
                raise refusal from error
            raise

    def delete(self, path: str) -> None:
        os.remove(path)


class S3:
    """Any server that speaks S3. Keys and region come from the standard AWS variables, files or instance roles."""

    def __init__(self, endpoint: str | None) -> None:
        import botocore.session
        from botocore.config import Config

        self.endpoint = endpoint
        self.client = botocore.session.get_session().create_client(
            "s3",
            endpoint_url=endpoint,
            config=Config(
                retries={"total_max_attempts": 1},
                connect_timeout=REQUEST_TIMEOUT_S,
                read_timeout=REQUEST_TIMEOUT_S,
                max_pool_connections=CONNECTIONS,
                s3={"addressing_style": "path" if endpoint else "auto"},
            ),
        )

    def filesystem(self) -> fs.FileSystem:
        import s3fs

        timeouts = {"read_timeout": REQUEST_TIMEOUT_S, "connect_timeout": REQUEST_TIMEOUT_S}
        retries = {"mode": "standard", "total_max_attempts": SDK_ATTEMPTS}
        path_style = {"s3": {"addressing_style": "path"}} if self.endpoint else {}
        config = timeouts | {"retries": retries} | path_style
        return fs.PyFileSystem(
            fs.FSSpecHandler(
                s3fs.S3FileSystem(endpoint_url=self.endpoint, config_kwargs=config, use_listings_cache=False)
            )
        )

    def exists(self, path: str) -> bool:
        if any(self.list(path, limit=1)):
            return True
        try:
            return "/" in path and self.size(path) >= 0
        except FileNotFoundError:
            return False

    def list(self, path: str, *, recursive: bool = True, limit: int = 1000) -> Iterator[tuple[str, int, int]]:
        bucket, _, folder = path.partition("/")
        prefix = f"{folder}/" if folder else ""
        query: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix, "MaxKeys": limit}
        if not recursive:
            query["Delimiter"] = "/"
        while True:
            with _faults(path):
                page = self.client.list_objects_v2(**query)
            for entry in page.get("Contents", []):
                if not entry["Key"].endswith("/"):  # some tools keep an empty object for a folder
                    yield entry["Key"][len(prefix) :], entry["Size"], _nanoseconds(entry["LastModified"])
            if not page["IsTruncated"]:
                return
            query["ContinuationToken"] = page["NextContinuationToken"]

    def size(self, path: str) -> int:
        bucket, _, key = path.partition("/")
        with _faults(path):
            return self.client.head_object(Bucket=bucket, Key=key)["ContentLength"]

    def info(self, path: str) -> tuple[int, int]:
        bucket, _, key = path.partition("/")
        if not key:
            raise FileNotFoundError(errno.ENOENT, f"s3://{path} is a bucket")
        with _faults(path):
            found = self.client.head_object(Bucket=bucket, Key=key)
        return found["ContentLength"], _nanoseconds(found["LastModified"])

    def read(self, path: str, offset: int = 0, length: int | None = None) -> bytes:
        bucket, _, key = path.partition("/")
        last = "" if length is None else offset + length - 1
        try:
            # A range is asked for even when all is wanted: only then the answer says how long the object is.
            with _faults(path):
                answer = self.client.get_object(Bucket=bucket, Key=key, Range=f"bytes={offset}-{last}")
                data = answer["Body"].read()
        except EOFError:
            if length is None:
                return b""
            raise
        size = int(answer["ContentRange"].rpartition("/")[2])
        expected = size - offset if length is None else length
        if offset + expected > size:
            raise _ends_early(path, offset, expected, size)
        if len(data) != expected:
            raise TransientStorageError(f"{len(data)} bytes came back where {expected} were asked for")
        return data

    def write(self, path: str, data: bytes) -> None:
        bucket, _, key = path.partition("/")
        with _faults(path):
            self.client.put_object(Bucket=bucket, Key=key, Body=data)

    def delete(self, path: str) -> None:
        bucket, _, key = path.partition("/")
        with _faults(path):
            self.client.delete_object(Bucket=bucket, Key=key)


def _nanoseconds(changed: datetime) -> int:
    return int(changed.timestamp() * 1000) * 1_000_000


def _ends_early(path: str, offset: int, length: int, size: int) -> EOFError:
    return EOFError(f"bytes {offset} to {offset + length} of {path} were asked for; it ends at {size}")


@contextmanager
def _faults(path: str) -> Iterator[None]:
    """Give botocore's errors the names that Python has for them."""
    import urllib3
    from botocore import exceptions, parsers

    # botocore lets through what happens to the body of an answer that is no object: a list, or an error.
    passing = exceptions.HTTPClientError, exceptions.IncompleteReadError, urllib3.exceptions.HTTPError
    try:
        yield
    except (*passing, parsers.ResponseParserError) as error:
        raise TransientStorageError(str(error)) from None
    except exceptions.ClientError as error:
        status = error.response["ResponseMetadata"]["HTTPStatusCode"]
        if status in (408, 429) or status >= 500:
            raise TransientStorageError(f"status {status}: {error}") from None
        if status == 404:
            raise FileNotFoundError(errno.ENOENT, f"s3://{path} does not exist ({error})") from None
        if status == 416:
            raise EOFError(f"s3://{path} ends before the bytes that were asked for ({error})") from None
        if status in (401, 403) or error.response["Error"]["Code"] in OUTDATED:
            raise PermissionError(errno.EACCES, f"s3://{path} is not open to these keys ({error})") from None
        raise OSError(f"s3://{path}: {error}") from None
    except exceptions.BotoCoreError as error:  # no keys, no region, a bucket's name that is none
        raise ValueError(f"s3://{path}: {error}; check the AWS_* variables") from None
