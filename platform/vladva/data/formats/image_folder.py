"""Hugging Face's ImageFolder: metadata.csv or metadata.jsonl in a folder names its images in the column file_name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from vladva.core.images import IMAGE
from vladva.data.formats.table import table_entries
from vladva.data.source import Entry, FileSet, LeftOut, Rejected, Source

TITLE = "folders of images with metadata.csv or metadata.jsonl (Hugging Face ImageFolder)"
PRIORITY = 1
OPTIONS = ("caption_columns", "id_column")
METADATA_FILES = ("metadata.csv", "metadata.jsonl")


def match(files: FileSet) -> list[str]:
    """The metadata and the images, where there are both."""
    metadata = [name for name in files.infos if is_metadata(name) and b"file_name" in files.head(name)]
    images = files.images()
    return [*metadata, *images] if metadata and images else []


def is_metadata(name: str) -> bool:
    """Whether a file says what is on the images of its folder."""
    return name.rpartition("/")[2] in METADATA_FILES


def split(source: Source) -> Iterator[Source]:
    """The whole: images that no metadata names are seen only with all of it read."""
    yield source


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry a row of metadata, then the images without one. Paths are relative to the metadata's folder."""
    named = set()
    options = replace(source.options, image_column="file_name")
    for file in source.files:
        if is_metadata(file):
            for found in table_entries(source, file, options, file.rpartition("/")[0]):
                named.add(found.file)
                yield found
    for file in source.files:
        if IMAGE.search(file) and file not in named:
            yield Rejected(file, file, "no metadata", "no row of metadata.csv or metadata.jsonl names it")
