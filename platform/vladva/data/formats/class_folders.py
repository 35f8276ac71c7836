"""Folders of images and nothing that describes them: the name of an image's folder is its caption."""

from __future__ import annotations

from collections.abc import Iterator

from vladva.core.images import IMAGE
from vladva.data.source import Entry, FileSet, LeftOut, Rejected, Source

TITLE = "folders of images without any text: the name of the folder is the caption"
PRIORITY = 7
OPTIONS: tuple[str, ...] = ()
FILES_PER_PART = 256


def match(files: FileSet) -> list[str]:
    """All files, if there is an image among them."""
    return list(files.infos) if files.images() else []


def split(source: Source) -> Iterator[Source]:
    """Some files at a time."""
    for first in range(0, len(source.files), FILES_PER_PART):
        yield source.part(first, first + FILES_PER_PART)


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry an image, with its size in `length`; other files are left out."""
    for name, info in zip(source.files, source.infos, strict=True):
        if IMAGE.search(name):
            yield Entry(name, name, name, class_name(name), length=info.size)
        else:
            yield LeftOut("not an image")


def class_name(name: str) -> list[str]:
    """The name of the folder that an image is in, as words; none at the top."""
    folder = name.rpartition("/")[0].rpartition("/")[2]
    return [folder.replace("_", " ")] if folder else []
