"""Annotation files: find the one that is there, read it, and know it again by its hash."""

import json
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from vladva.core.errors import InvalidSampleError
from vladva.core.storage import exists, join, read_bytes
from vladva.core.text import text_lines


class AnnotationFile(NamedTuple):
    """An annotation file as found."""

    path: str  # relative to the data folder
    data: bytes
    sha256: str


def read_first(data_uri: str, paths: Sequence[str], title: str) -> AnnotationFile:
    """Read the first of `paths` (relative to `data_uri`) that exists; FileNotFoundError naming all when none does."""
    for path in paths:
        if exists(join(data_uri, path)):
            data = read_bytes(join(data_uri, path))
            return AnnotationFile(path, data, sha256(data).hexdigest())
    raise FileNotFoundError(f"{title}: no annotations under {data_uri}; looked for {', '.join(paths)}")


def parse_json(path: str, data: bytes) -> Any:
    """The JSON document `data`; ValueError naming the file where it is none."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file ({error})") from error


def numbered_lines(path: str, data: bytes) -> Iterator[tuple[int, str]]:
    """The lines of a text file, from 1 on. Raises ValueError naming file and line where one is no UTF-8."""
    for number, line in enumerate(text_lines(data), start=1):
        if isinstance(line, InvalidSampleError):
            raise ValueError(f"{path}, line {number}: expected UTF-8 ({line.detail})")
        yield number, line


def check_hash(title: str, file: AnnotationFile, expected: str | None) -> None:
    """Raise ValueError unless the file's sha256 starts with `expected`; None expects nothing."""
    if expected and not file.sha256.startswith(expected):
        found = file.sha256[: len(expected)]
        raise ValueError(
            f"{title}: {file.path} is not the published file: expected sha256 {expected}..., found {found}..."
        )
