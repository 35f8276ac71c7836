"""A package of pictures or of names, as `npm pack` leaves it (.tgz), or unpacked: its files."""

from __future__ import annotations

import json
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

CODE = re.compile(r"[0-9a-f]{4,6}(-[0-9a-f]{4,6})*")
PICTURES = (".png", ".webp")
NAMES = "en/data.json"


def code_points(text: str) -> str:
    """Code points in lower case with `-` between, without FE0F, which only asks for colours: vendors leave it out."""
    return "-".join(point for point in text.lower().split("-") if point != "fe0f")


def package_files(package: Path, wanted: Callable[[PurePosixPath], bool]) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Path and content of the files whose path is wanted, in the order of their paths.

    Raises FileNotFoundError, and ValueError for what is neither a folder nor a .tgz.
    """
    if package.is_dir():
        for file in sorted(file for file in package.rglob("*") if file.is_file()):
            path = PurePosixPath(file.relative_to(package))
            if wanted(path):
                yield path, file.read_bytes()
        return
    if not package.exists():
        raise FileNotFoundError(f"{package} is not there: `npm pack NAME@VERSION` writes such a file here")
    found = {}
    try:
        with tarfile.open(package, "r:gz") as packed:
            for member in packed:
                path = PurePosixPath(member.name)
                if member.isfile() and wanted(path):
                    content = packed.extractfile(member)
                    assert content is not None  # it is a file
                    found[path] = content.read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{package} is no whole .tgz ({error}): pack it again with `npm pack NAME@VERSION`") from None
    yield from sorted(found.items())


def read_pictures(package: Path) -> dict[str, bytes]:
    """Code -> PNG or WebP, of the files that are called by their code points.

    Raises ValueError where there are none, or two of one emoji.
    """
    pictures: dict[str, bytes] = {}
    paths: dict[str, PurePosixPath] = {}
    for path, content in package_files(package, _is_picture):
        code = code_points(path.stem)
        if code in paths:
            # One picture may have a name with FE0F and one without: the same to whoever looks at it.
            if paths[code].parent == path.parent:
                continue
            raise ValueError(f"{package} has {paths[code]} and {path}: unpack it, and give the folder of one of them")
        paths[code], pictures[code] = path, content
    if not pictures:
        raise ValueError(
            f"{package} has no picture that is called by its code points, as 1f600.png or 1f600.webp: give a package "
            "that has (SVG must be drawn as PNG before)"
        )
    return pictures


def read_names(package: Path) -> list[dict[str, Any]]:
    """The emoji of emojibase-data: code, label and tags in English, in CLDR's order. Raises ValueError."""
    for _, content in package_files(package, lambda path: path.match(f"*/{NAMES}") or str(path) == NAMES):
        names: list[dict[str, Any]] = json.loads(content)
        return names
    raise ValueError(f"--names {package} has no {NAMES}: give the package emojibase-data")


def _is_picture(path: PurePosixPath) -> bool:
    return path.suffix.lower() in PICTURES and CODE.fullmatch(path.stem.lower()) is not None
