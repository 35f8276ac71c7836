"""Folders of images with text files beside them: KEY.txt or KEY.caption beside KEY.jpg, a caption a line."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

from vladva.core.images import IMAGE
from vladva.data.source import Entry, FileSet, LeftOut, Rejected, Source

TITLE = "folders of images with KEY.txt or KEY.caption beside KEY.jpg, one caption a line"
PRIORITY = 6
OPTIONS: tuple[str, ...] = ()
CAPTION_SUFFIXES = (".txt", ".caption")
IMAGES_PER_PART = 256


def match(files: FileSet) -> list[str]:
    """All files, if there is an image among them that has a text beside it."""
    texts = caption_files(list(files.infos))
    return list(files.infos) if any(IMAGE.sub("", name) in texts for name in files.images()) else []


def caption_files(names: Sequence[str]) -> dict[str, list[str]]:
    """Name without suffix -> the text files of that name."""
    found: dict[str, list[str]] = defaultdict(list)
    for name in names:
        if name.lower().endswith(CAPTION_SUFFIXES):
            found[name.rpartition(".")[0]].append(name)
    return {stem: sorted(texts, key=lambda name: name.lower().endswith(".caption")) for stem, texts in found.items()}


def split(source: Source) -> Iterator[Source]:
    """Some images at a time, each with what is beside it; last the files that are beside none."""
    texts = caption_files(source.files)
    images = [name for name in source.files if IMAGE.search(name)]
    info = dict(zip(source.files, source.infos, strict=True))
    rest = set(source.files)
    for first in range(0, len(images), IMAGES_PER_PART):
        chosen = images[first : first + IMAGES_PER_PART]
        files = [name for image in chosen for name in (image, *texts.get(IMAGE.sub("", image), ()))]
        files = list(dict.fromkeys(files))
        rest -= set(files)
        yield Source(source.uri, source.format, tuple(files), tuple(info[name] for name in files), source.options)
    if rest:
        files = [name for name in source.files if name in rest]
        yield Source(source.uri, source.format, tuple(files), tuple(info[name] for name in files), source.options)


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry an image, with its size in `length`; other files are left out, except those that describe one."""
    texts = caption_files(source.files)
    stems = {IMAGE.sub("", name) for name in source.files if IMAGE.search(name)}
    for name, info in zip(source.files, source.infos, strict=True):
        if IMAGE.search(name):
            yield Entry(name, name, name, length=info.size, caption_files=texts.get(IMAGE.sub("", name), ()))
        elif name.rpartition(".")[0] not in stems or not name.lower().endswith(CAPTION_SUFFIXES):
            is_text = name.lower().endswith(CAPTION_SUFFIXES)
            beside = name.lower().endswith(".json") and name.rpartition(".")[0] in stems
            yield LeftOut("text without an image" if is_text else "JSON beside an image" if beside else "not an image")
