"""Where the images of a benchmark are, and their bytes.

An image is a file in a folder, a member of a tar shard (found by the member's name), or a cell of a Parquet column.
In all three cases an `ImageRef` says where its bytes lie, so that a worker elsewhere can read just those.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha1
from pathlib import PurePosixPath
from typing import IO

from vladva.core.errors import InvalidSampleError
from vladva.core.images import IMAGE
from vladva.core.storage import FileInfo, absolute, join, list_infos, open_stream
from vladva.data.image_refs import ImageRef
from vladva.data.tar_members import TarMember, tar_members

READ_AHEAD = 1 << 20  # bytes; headers of small tar members then cost one request for many


def find_images(data_uri: str, folders: Sequence[str]) -> list[ImageRef]:
    """All images under the first of `folders` (relative to `data_uri`) that has any, files and tar members alike.

    They are called by their path relative to the folder (files) or their member's name (tars). Empty when no folder
    has images.
    """
    for folder in folders:
        base = join(absolute(data_uri), folder)
        found: list[ImageRef] = []
        for info in list_infos(base):
            path = PurePosixPath(info.uri[len(base) + 1 :])
            version = file_version(info)
            if IMAGE.search(path.name):
                found.append(ImageRef(f"image/{folder}/{path}@{version}", str(path), info.uri, 0, info.size))
            elif path.suffix == ".tar":
                found += [
                    ImageRef(f"image/{folder}/{path}#{name}@{version}", name, info.uri, offset, length)
                    for name, offset, length in _members(info.uri)
                ]
        if found:
            return found
    return []


def pick_images(data_uri: str, folders: Sequence[str], wanted: Iterable[str], title: str) -> list[ImageRef]:
    """The images called `wanted`, in that order, found by whole path or else by file name alone.

    Raises ValueError with the number and the first names of those that are missing (leaving them out would change the
    denominators), and for a name that several images have.
    """
    by_path: dict[str, list[ImageRef]] = {}
    by_file_name: dict[str, list[ImageRef]] = {}
    for ref in find_images(data_uri, folders):
        by_path.setdefault(ref.name, []).append(ref)
        by_file_name.setdefault(PurePosixPath(ref.name).name, []).append(ref)
    wanted = list(wanted)
    refs, missing = [], []
    for name in wanted:
        candidates = by_path.get(name) or by_file_name.get(PurePosixPath(name).name, [])
        if len(candidates) > 1:
            places = ", ".join(ref.id.removeprefix("image/").rpartition("@")[0] for ref in candidates[:3])
            raise ValueError(
                f"{title}: {name} stands for {len(candidates)} images ({places}): name it with its folder in the "
                "annotations, or leave only the right ones there"
            )
        if candidates:
            refs.append(candidates[0]._replace(name=name))
        else:
            missing.append(name)
    if missing:
        raise ValueError(
            f"{title}: expected {len(wanted)} images under {data_uri} (looked in {', '.join(folders)}), found "
            f"{len(refs)}; missing {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}"
        )
    return refs


def parquet_images(data_uri: str, path: str, column: str, names: Sequence[str]) -> list[ImageRef]:
    """The images in a column of the Parquet file `path` below `data_uri`, one per row, to be called `names`."""
    file = join(absolute(data_uri), path)
    version = next(file_version(info) for info in list_infos(file.rpartition("/")[0]) if info.uri == file)
    return [
        ImageRef(f"image/{path}#{column}/{row}@{version}", name, file, row, 0, column) for row, name in enumerate(names)
    ]


def _members(uri: str) -> list[tuple[str, int, int]]:
    """Name, offset and length of every image in a tar. Raises ValueError where one cannot be read."""
    with open_stream(uri, READ_AHEAD) as file:
        return [(member.name, member.offset, member.length) for member in whole_members(file, uri, IMAGE)]


def whole_members(file: IO[bytes], uri: str, wanted: re.Pattern[str]) -> Iterator[TarMember]:
    """The members of a tar whose name has what is wanted. Raises ValueError for a damaged tar, or a broken link."""
    try:
        for member in tar_members(file):
            if wanted.search(member.name):
                if member.problem:
                    raise ValueError(f"{uri}#{member.name}: {member.problem}")
                yield member
    except InvalidSampleError as problem:
        raise ValueError(f"{uri}: {problem}") from None


def file_version(info: FileInfo) -> str:
    """A few letters that change when the file does."""
    return sha1(f"{info.size} {info.changed}".encode()).hexdigest()[:8]
