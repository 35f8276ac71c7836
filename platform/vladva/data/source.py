"""Sources: the forms in which people have images and captions, one file each.

The folder listing is the menu: every module here is a format and is found by its file name. It has

    TITLE             one line, for people
    OPTIONS           the fields of `SourceOptions` that mean something for it
    PRIORITY          where several formats recognise a folder, the lowest number has it
    match(files)      the names of those files that make up a source of this format; none where it is another one
    entries(source)   what is in them, in order, without the images: `Entry`, `Rejected` or `LeftOut` per row

Entries say where an image's bytes lie and never carry them, so that a source of any size is listed in little memory.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol, TypeVar

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.storage import FileInfo

PATH_COLUMNS = ("path", "filepath", "file_path", "image_path", "file_name", "filename", "file", "image", "img")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentence", "raw")
READS_AHEAD = 8

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

    @property
    def images_uri(self) -> str:
        """Where relative paths of images start."""
        return storage.absolute(self.options.images) if self.options.images else self.uri

    def entries(self) -> Iterator[Entry | Rejected | LeftOut]:
        """Everything that is in the source, in order."""
        return find(self.format).entries(self)


class Entry(NamedTuple):
    """An image with captions. `file` holds it: as a whole, from byte `offset` on, or in row `offset` of `column`."""

    id: str  # what the source calls it
    place: str  # in the source, for people
    file: str  # relative to where images are, or an absolute URI
    captions: Sequence[str] = ()
    offset: int = -1
    length: int = -1
    column: str = ""
    beside: str = ""  # text file with one caption a line
    negatives: Sequence[str] = ()


class Rejected(NamedTuple):
    """What cannot be used: a line of the quarantine table."""

    id: str
    place: str
    reason: str
    detail: str = ""


class LeftOut(NamedTuple):
    """What is not asked for, or is no sample; only counted."""

    reason: str


class Format(Protocol):
    """What the module of a format has."""

    TITLE: str
    OPTIONS: tuple[str, ...]
    PRIORITY: int

    def match(self, files: FileSet) -> list[str]:
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

    def ending(self, *endings: str) -> list[str]:
        """Names with one of these endings, whatever the case."""
        return [name for name in self.infos if name.lower().endswith(endings)]

    def head(self, name: str, count: int = 1 << 16) -> bytes:
        """The first `count` bytes of a file, or all there are."""
        length = min(count, self.infos[name].size)
        return storage.read_ranges([storage.ByteRange(storage.join(self.uri, name), 0, length)])[0]


def names() -> list[str]:
    """Names of all formats; the one that goes first in doubt first."""
    found = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(found, key=lambda name: (find(name).PRIORITY, name))


def find(name: str) -> Format:
    """The format in `sources/<name>.py`."""
    return importlib.import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def open_source(uri: str, options: SourceOptions, work_uri: str = "") -> Source:
    """The folder or file at `uri`, with its format found out. Raises FileNotFoundError, ValueError with the fix."""
    if options.format and options.format not in names():
        raise ValueError(f"--format {options.format!r} is unknown; there are {', '.join(names())}")
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise FileNotFoundError(f"{uri}: no such file or folder")
    try:
        infos = [storage.file_info(uri)]
        uri = uri.rpartition("/")[0]
    except FileNotFoundError:
        infos = storage.list_infos(uri)
    below = {info.uri[len(uri) + 1 :]: info for info in infos}
    files = FileSet(uri, {name: info for name, info in below.items() if not re.search(r"(^|/)[._]", name)})
    for name in [options.format] if options.format else names():
        if matched := find(name).match(files):
            check_options(name, options)
            infos = [files.infos[file] for file in matched]
            return Source(uri, name, tuple(matched), tuple(infos), options, work_uri)
    kinds = "; ".join(f"{name} ({find(name).TITLE})" for name in names())
    what = f"nothing of the format {options.format}" if options.format else "nothing of a known format"
    raise ValueError(f"{uri} holds {what}. There are: {kinds}")


def check_options(name: str, options: SourceOptions) -> None:
    """Raise ValueError for an option that the format would not heed."""
    known = find(name).OPTIONS
    for field in fields(options):
        if field.name != "format" and getattr(options, field.name) and field.name not in known:
            option = "--" + field.name.replace("columns", "column").replace("splits", "split").replace("_", "-")
            raise ValueError(f"{option} means nothing for the format {name}: leave it out, or name the --format")


# --- what several formats share --------------------------------------------------------------------------------------


def texts_of(value: Any) -> list[str]:
    """A cell with a caption or a list of them, as text or UTF-8. Raises InvalidSampleError."""
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    texts = []
    for text in values:
        if not isinstance(text, (str, bytes)):
            raise InvalidSampleError("caption is not text", repr(text))
        try:
            # Halves of characters stand for bytes that are no UTF-8 (CSV), or are spelled out in JSON.
            texts.append((text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text).decode())
        except UnicodeError as error:
            raise InvalidSampleError("caption is not UTF-8", str(error)) from None
    return clean(texts)


def clean(captions: Iterable[str]) -> list[str]:
    """Captions without the space around them, without empty ones, each once."""
    return list(dict.fromkeys(text.strip() for text in captions if text.strip()))


def first_column(kind: str, option: str, known: Sequence[str], given: str, columns: Sequence[str], file: str) -> str:
    """The column that the user named, or the first of the known ones. Raises ValueError listing what there is."""
    wanted = [given] if given else known
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        looked = given or f"any of {', '.join(known)}"
        raise ValueError(
            f"{file} has no column {looked} for the {kind}: name one with {option}; it has {list(columns)}"
        )
    return found


def refuse_urls(path: str, file: str) -> None:
    """Raise ValueError for a link: nothing is downloaded."""
    if path.startswith(("http://", "https://")):
        raise ValueError(
            f"{file} holds links ({path}), and this job downloads nothing: fetch the images with img2dataset "
            f"(--output_format webdataset), then prepare the folder it has written"
        )


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
