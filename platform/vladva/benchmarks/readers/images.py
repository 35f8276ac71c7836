"""Where the images of a benchmark are, and their bytes.

An image is a file in a folder, a member of a tar shard (found by the member's name), or a cell of a Parquet column.
In all three cases an `ImageRef` says where its bytes lie, so that a worker elsewhere can read just those.
"""

import io
import tarfile
from collections.abc import Iterable, Sequence
from hashlib import sha1
from pathlib import PurePosixPath

from vladva.core.storage import FileInfo, RangedFile, absolute, join, list_infos
from vladva.data.image_refs import ImageRef

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif"}
READ_AHEAD = 1 << 20  # bytes; headers of small tar members then cost one request for many


def find_images(data_uri: str, folders: Sequence[str]) -> dict[str, ImageRef]:
    """All images under the first of `folders` (relative to `data_uri`) that has any, files and tar members alike.

    Keys are paths relative to the folder (files) and member names (tars). Empty when no folder has images.
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
    """The images called `wanted`, in that order, found by whole path or else by file name alone.

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
            f"{title}: expected {len(wanted)} images under {data_uri} (looked in {', '.join(folders)}), found "
            f"{len(wanted) - len(missing)}; missing {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return [ref._replace(name=name) for name, ref in zip(wanted, refs, strict=True) if ref is not None]


def parquet_images(data_uri: str, path: str, column: str, names: Sequence[str]) -> list[ImageRef]:
    """The images in a column of the Parquet file `path` below `data_uri`, one per row, to be called `names`."""
    file = join(absolute(data_uri), path)
    version = next(_version(info) for info in list_infos(file.rpartition("/")[0]) if info.uri == file)
    return [
        ImageRef(f"image/{path}#{column}/{row}@{version}", name, file, row, 0, column) for row, name in enumerate(names)
    ]


def _members(uri: str) -> list[tuple[str, int, int]]:
    """Name, offset and length of every image in a tar."""
    with io.BufferedReader(RangedFile(uri), READ_AHEAD) as file, tarfile.open(fileobj=file) as tar:
        return [
            (member.name, member.offset_data, member.size)
            for member in tar
            if member.isfile() and PurePosixPath(member.name).suffix.lower() in SUFFIXES
        ]


def _version(info: FileInfo) -> str:
    return sha1(f"{info.size} {info.changed}".encode()).hexdigest()[:8]
