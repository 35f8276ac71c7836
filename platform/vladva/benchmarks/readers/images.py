"""Where the pictures of a benchmark are, and their bytes.

A picture is a file in a folder, a member of a tar shard (found by the member's name), or a cell of a Parquet column.
In all three cases an `ImageRef` says where its bytes lie, so that a worker elsewhere can read just those.
"""

import io
import tarfile
from collections.abc import Iterable, Sequence
from hashlib import sha1
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow.parquet as pq

from vladva.storage import ByteRange, FileInfo, RangedFile, absolute, join, list_infos, open_storage, read_ranges

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
READ_AHEAD = 1 << 20  # bytes; headers of small tar members then cost one request for many


class ImageRef(NamedTuple):
    """Where the bytes of one picture are."""

    id: str  # names the picture and the version of the file that holds it, so that a changed file is a new picture
    name: str  # the name annotations use
    uri: str  # of the file that holds it, absolute
    offset: int  # first byte; with `column`, the row
    length: int  # bytes; with `column`, 0
    column: str = ""  # of a Parquet file whose cells hold bytes or a {bytes, path} struct


def find_images(data_uri: str, folders: Sequence[str]) -> dict[str, ImageRef]:
    """All pictures under the first of `folders` (relative to `data_uri`) that has any, files and tar members alike.

    Keys are paths relative to the folder (files) and member names (tars). Empty when no folder has pictures.
    """
    for folder in folders:
        base = join(absolute(data_uri), folder)
        found: dict[str, ImageRef] = {}
        for info in list_infos(base):
            path = PurePosixPath(info.uri[len(base) + 1 :])
            version = _version(info)
            if path.suffix.lower() in SUFFIXES:
                found[str(path)] = ImageRef(f"image/{folder}/{path}@{version}", str(path), info.uri, 0, info.size)
            elif path.suffix == ".tar":
                for name, offset, length in _members(info.uri):
                    found[name] = ImageRef(f"image/{folder}/{path}#{name}@{version}", name, info.uri, offset, length)
        if found:
            return found
    return {}


def pick_images(data_uri: str, folders: Sequence[str], wanted: Iterable[str], title: str) -> list[ImageRef]:
    """The pictures called `wanted`, in that order, found by whole path or else by file name alone.

    Raises ValueError with the number and the first names of those that are missing: leaving them out would change the
    denominators.
    """
    found = find_images(data_uri, folders)
    by_file_name = {PurePosixPath(name).name: ref for name, ref in found.items()}
    wanted = list(wanted)
    refs = [found.get(name) or by_file_name.get(PurePosixPath(name).name) for name in wanted]
    missing = [name for name, ref in zip(wanted, refs, strict=True) if ref is None]
    if missing:
        raise ValueError(
            f"{title}: expected {len(wanted)} pictures under {data_uri} (looked in {', '.join(folders)}), found "
            f"{len(wanted) - len(missing)}; missing {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return [ref._replace(name=name) for name, ref in zip(wanted, refs, strict=True) if ref is not None]


def parquet_images(data_uri: str, path: str, column: str, names: Sequence[str]) -> list[ImageRef]:
    """The pictures in a column of the Parquet file `path` below `data_uri`, one per row, to be called `names`."""
    file = join(absolute(data_uri), path)
    version = next(_version(info) for info in list_infos(file.rpartition("/")[0]) if info.uri == file)
    return [
        ImageRef(f"image/{path}#{column}/{row}@{version}", name, file, row, 0, column) for row, name in enumerate(names)
    ]


def read_images(refs: Sequence[ImageRef]) -> list[bytes]:
    """Encoded bytes of the pictures, in order; neighbours in one file cost one request."""
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


def _members(uri: str) -> list[tuple[str, int, int]]:
    """Name, offset and length of every picture in a tar."""
    with io.BufferedReader(RangedFile(uri), READ_AHEAD) as file, tarfile.open(fileobj=file) as tar:
        return [
            (member.name, member.offset_data, member.size)
            for member in tar
            if member.isfile() and PurePosixPath(member.name).suffix.lower() in SUFFIXES
        ]


def _version(info: FileInfo) -> str:
    return sha1(f"{info.size} {info.changed}".encode()).hexdigest()[:8]
