"""Karpathy's split files (dataset_coco.json, dataset_flickr30k.json) beside a folder of images."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.prepare.sources import Entry, FileSet, LeftOut, Rejected, Source, texts_of

TITLE = "Karpathy JSON (dataset_coco.json) and the folder of its images; --split picks"
PRIORITY = 2
OPTIONS = ("images", "id_column", "splits")


def match(files: FileSet) -> list[str]:
    """JSON files at the top whose images have sentences."""
    return [name for name in files.ending(".json") if "/" not in name and b'"sentids"' in files.head(name)]


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """One entry an image; those of other splits are left out."""
    options = source.options
    for file in source.files:
        known = set()
        for number, image in enumerate(read_document(source, file, "images")["images"]):
            split = image.get("split")
            known.add(split)
            if options.splits and split not in options.splits:
                yield LeftOut(f"split {split}")
            else:
                sentences = [sentence.get("raw") for sentence in image.get("sentences", [])]
                path = "/".join(part for part in (image.get("filepath"), image.get("filename")) if part)
                yield entry_of(source, f"{file}, image {number}", image, path, sentences)
        if missing := set(options.splits) - known:
            raise ValueError(f"--split {', '.join(sorted(missing))}: {file} has only {', '.join(map(str, known))}")


def entry_of(source: Source, place: str, image: dict[str, Any], path: str, captions: list[Any]) -> Entry | Rejected:
    """The entry of an image of a JSON document, called by its path or by the field that --id-column names."""
    column = source.options.id_column
    if column and column not in image:
        raise ValueError(f"{place} has no field {column}, which --id-column names; it has {sorted(image)}")
    called = str(image[column]) if column else path
    if not path:
        return Rejected(called or place, place, "no id or path")
    try:
        return Entry(called, place, path, texts_of([text for text in captions if text is not None]))
    except InvalidSampleError as problem:
        return Rejected(called, place, problem.reason, problem.detail)


def read_document(source: Source, file: str, *lists: str) -> dict[str, Any]:
    """A JSON document that holds these lists of objects. Raises ValueError naming what is missing."""
    try:
        content = json.loads(storage.read_bytes(storage.join(source.uri, file)))
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    for name in lists:
        values = content.get(name) if isinstance(content, dict) else None
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise ValueError(f"{file} holds no list of objects {name!r}, which the format {source.format} needs")
    return content
