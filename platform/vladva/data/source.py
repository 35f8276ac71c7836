"""Sources: images and captions in any of the forms people have them in, read alike by every job.

    open_source(uri, options) -> Source -> entries(), or split() into parts that are read elsewhere

The folder `formats/` is the menu: every module there is a format and is found by its file name. It has

    TITLE             one line, for people
    OPTIONS           the fields of `SourceOptions` that mean something for it
    PRIORITY          where several formats recognise a folder, the lowest number has it
    match(files)      the names of those files that make up a source of this format; none where it is another one
    split(source)     parts of the source, in order, that can be read without each other
    entries(source)   what is in them, in order, without the images: `Entry`, `Rejected` or `LeftOut` per row

Entries say where an image's bytes are and never carry them, so that a source of any size is listed in little memory.
Captions are given as written; who uses them removes the space around them.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

from vladva.core import storage
from vladva.core.images import IMAGE
from vladva.core.storage import FileInfo
from vladva.data.image_refs import ImageRef

READS_AHEAD = 8
DESCRIBES = re.compile(
    r"(_stats)?\.(json|parquet|idx)$"
)  # 00000_stats.json, 00000.parquet beside img2dataset's 00000.tar
HIDDEN = re.compile(r"(^|/)[._]")
OURS = re.compile(r"(^|/)(_index|_prepare)/")  # what jobs of this project leave beside data

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class SourceOptions:
    """What a user says about a source; what is left empty is found out."""

    format: str = ""
    images: str = ""  # folder that relative paths start from
    image_column: str = ""
    caption_columns: tuple[str, ...] = ()
    id_column: str = ""
    splits: tuple[str, ...] = ()


@dataclass(frozen=True)
class Source:
    """A folder (for a single file, the one that it is in), the files of it that count, and the options."""

    uri: str
    format: str
    files: tuple[str, ...]  # relative to `uri`
    infos: tuple[FileInfo, ...]  # of the same files
    options: SourceOptions
    work_uri: str = ""  # where a format may leave what it found out
    others: tuple[str, ...] = ()  # files that the format does not read
    row_group: int = -1  # of a single Parquet file; -1 for all of them
    needs_images: bool = True  # False: rows of captions alone are entries too, with an empty `file`

    @property
    def images_uri(self) -> str:
        """Where relative paths of images start."""
        return storage.absolute(self.options.images) if self.options.images else self.uri

    def entries(self) -> Iterator[Entry | Rejected | LeftOut]:
        """Everything that is in the files of the source, in order."""
        return find_format(self.format).entries(self)

    def split(self) -> Iterator[Source]:
        """Parts that together have the same entries in the same order."""
        return find_format(self.format).split(self)

    def part(self, first: int, after: int) -> Source:
        """The files from number `first` to before `after`."""
        return replace(self, files=self.files[first:after], infos=self.infos[first:after], others=())

    def unused_files(self, named: set[str]) -> Iterator[LeftOut]:
        """The files beside those of the format, but for the images whose URIs are `named`: rows refer to them."""
        for name in self.others:
            if HIDDEN.search(name):
                yield LeftOut("file whose name, or folder's name, begins with . or _")
            elif not IMAGE.search(name) or self.format == "webdataset":
                yield LeftOut(f"file that the format {self.format} does not read")
            elif storage.join(self.uri, name) not in named:
                yield LeftOut("image that no row names")


class Entry(NamedTuple):
    """An image with captions. `file` holds it: as a whole, from byte `offset` on, or in row `offset` of `column`."""

    id: str  # what the source calls it
    source_location: str  # in the source, for people
    file: str  # relative to where images are, or an absolute URI; empty where a row has no image
    captions: Sequence[str] = ()
    offset: int = -1
    length: int = -1
    column: str = ""
    caption_files: Sequence[str] = ()  # beside the image, with one caption a line
    hard_negatives: Sequence[str] = ()
    row_id: str = ""  # unique in the source, where `id` may repeat (rows of a table); empty: `id` is unique
    group: str = ""  # the part of a benchmark that the image is in (nocaps' domains)

    def image_ref(self, images_uri: str) -> ImageRef:
        """Where the image is, for `fetch_images`."""
        uri = storage.resolve(images_uri, self.file)
        if self.column:
            return ImageRef(self.id, self.source_location, uri, self.offset, column=self.column)
        if self.offset < 0:
            return ImageRef(self.id, self.source_location, uri)
        return ImageRef(self.id, self.source_location, uri, self.offset, self.length)


class Rejected(NamedTuple):
    """What cannot be used: a line of the quarantine table."""

    id: str
    source_location: str
    reason: str
    detail: str = ""
    file: str = ""  # the image, where the rest of the row is what cannot be used


class LeftOut(NamedTuple):
    """What is not asked for, or is no sample; only counted."""

    reason: str
    file: str = ""  # the image, where there is one


class Format(Protocol):
    """What the module of a format has."""

    TITLE: str
    OPTIONS: tuple[str, ...]
    PRIORITY: int

    def match(self, files: FileSet) -> list[str]:
        """See the module docstring."""
        ...

    def split(self, source: Source) -> Iterator[Source]:
        """See the module docstring."""
        ...

    def entries(self, source: Source) -> Iterator[Entry | Rejected | LeftOut]:
        """See the module docstring. Raises ValueError for what makes the whole source unusable, naming the fix."""
        ...


class FileSet:
    """The files of a source, by name; `head` reads the first bytes of one."""

    def __init__(self, uri: str, infos: dict[str, FileInfo]) -> None:
        self.uri = uri
        self.infos = infos

    def with_suffix(self, *suffixes: str) -> list[str]:
        """Names with one of these suffixes, whatever the case."""
        return [name for name in self.infos if name.lower().endswith(suffixes)]

    def images(self) -> list[str]:
        """Names of images."""
        return [name for name in self.infos if IMAGE.search(name)]

    def head(self, name: str, count: int = 1 << 16) -> bytes:
        """The first `count` bytes of a file, or all there are."""
        length = min(count, self.infos[name].size)
        return storage.read_ranges([storage.ByteRange(storage.join(self.uri, name), 0, length)])[0]


def format_names() -> list[str]:
    """Names of all formats; the one that goes first in doubt first."""
    found = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "formats")])]
    return sorted(found, key=lambda name: (find_format(name).PRIORITY, name))


def find_format(name: str) -> Format:
    """The format in `formats/<name>.py`."""
    return importlib.import_module(f"vladva.data.formats.{name}")


def open_source(uri: str, options: SourceOptions, work_uri: str = "", *, needs_images: bool = True) -> Source:
    """The folder or file at `uri`, with its format found out. Raises FileNotFoundError, ValueError with the fix."""
    if options.format and options.format not in format_names():
        raise ValueError(f"--format {options.format!r} is unknown; there are {', '.join(format_names())}")
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise FileNotFoundError(f"{uri}: no such file or folder")
    try:
        infos = [storage.file_info(uri)]
        uri = uri.rpartition("/")[0]
    except FileNotFoundError:
        infos = storage.list_infos(uri)
    below = {info.uri[len(uri) + 1 :]: info for info in infos}
    below = {name: info for name, info in below.items() if not OURS.search(name)}
    files = FileSet(uri, {name: info for name, info in below.items() if not HIDDEN.search(name)})
    for name in [options.format] if options.format else format_names():
        if matched := find_format(name).match(files):
            check_options(name, options)
            described = {file.rpartition(".")[0] for file in matched}
            others = tuple(
                sorted(file for file in below.keys() - set(matched) if DESCRIBES.sub("", file) not in described)
            )
            infos = [files.infos[file] for file in matched]
            return Source(uri, name, tuple(matched), tuple(infos), options, work_uri, others, needs_images=needs_images)
    formats = "; ".join(f"{name} ({find_format(name).TITLE})" for name in format_names())
    what = f"nothing of the format {options.format}" if options.format else "nothing of a known format"
    hidden = sum(1 for name in below if HIDDEN.search(name))
    ignored = f" ({hidden} files whose name, or folder's name, begins with . or _ are not read)" if hidden else ""
    raise ValueError(f"{uri} holds {what}{ignored}. There are: {formats}")


def check_options(name: str, options: SourceOptions) -> None:
    """Raise ValueError for an option that the format would not heed."""
    known = find_format(name).OPTIONS
    for field in fields(options):
        if field.name != "format" and getattr(options, field.name) and field.name not in known:
            option = "--" + field.name.replace("columns", "column").replace("splits", "split").replace("_", "-")
            raise ValueError(f"{option} means nothing for the format {name}: leave it out, or name the --format")


def file_by_file(source: Source) -> Iterator[Source]:
    """The parts of a source whose files have nothing to do with each other."""
    return (source.part(number, number + 1) for number in range(len(source.files)))


def ahead(function: Callable[[T], R], items: Iterable[T], count: int = READS_AHEAD) -> Iterator[R]:
    """`map` in threads: results in order, at most `count` of them waiting."""
    with ThreadPoolExecutor(count) as pool:
        waiting: deque[Future[R]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) == count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
