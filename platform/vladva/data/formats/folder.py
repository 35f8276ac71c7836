"""Folders of images: KEY.txt beside KEY.jpg holds its captions, one a line; else its folder's name is its class."""

from __future__ import annotations

from collections.abc import Iterator

from vladva.core.images import IMAGE
from vladva.prepare.sources import Entry, FileSet, LeftOut, Rejected, Source

TITLE = "folders of images: the folder's name is the caption, or KEY.txt beside KEY.jpg holds them"
PRIORITY = 5
OPTIONS: tuple[str, ...] = ()
BELONGS = (".txt", ".json")  # img2dataset's plain files, beside the image that they describe


def match(files: FileSet) -> list[str]:
    """All files, if there is an image among them."""
    return list(files.infos) if any(IMAGE.search(name) for name in files.infos) else []


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry an image; other files are left out, except those that describe one."""
    files = set(source.files)
    stems = {IMAGE.sub("", name) for name in source.files if IMAGE.search(name)}
    for name in source.files:
        if IMAGE.search(name):
            beside = IMAGE.sub("", name) + ".txt"
            if beside in files:
                yield Entry(name, name, name, beside=beside)
            else:
                yield Entry(name, name, name, class_name(name))
        elif not (name.endswith(BELONGS) and name.rpartition(".")[0] in stems):
            yield LeftOut("not an image")


def class_name(name: str) -> list[str]:
    """The name of the folder that an image is in, as words; none at the top."""
    folder = name.rpartition("/")[0].rpartition("/")[2]
    return [folder.replace("_", " ")] if folder else []
