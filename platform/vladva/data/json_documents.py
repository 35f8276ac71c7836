"""JSON documents that describe images (Karpathy's, COCO's): a document read and checked, and an image of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.text import decode_json
from vladva.data.columns import to_texts
from vladva.data.source import Entry, Rejected, Source


def read_document(source: Source, file: str, *lists: str) -> dict[str, Any]:
    """A JSON document that holds these lists of objects. Raises ValueError naming what is missing."""
    try:
        content = decode_json(storage.read_bytes(storage.join(source.uri, file)))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    for name in lists:
        values = content.get(name) if isinstance(content, dict) else None
        if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
            raise ValueError(f"{file} holds no list of objects {name!r}, which the format {source.format} needs")
    return content


def to_entries(
    source: Source, source_location: str, image: dict[str, Any], path: Any, captions: list[Any], what: str
) -> Iterator[Entry | Rejected]:
    """The entry of an image of a document, called by its path or by the field that --id-column names.

    Captions that are no text are named on their own, by their number, as a `what`.
    """
    column = source.options.id_column
    if column and column not in image:
        raise ValueError(f"{source_location} has no field {column}, which --id-column names; it has {sorted(image)}")
    name = str(image[column]) if column else str(path)
    if not path or not isinstance(path, str):
        yield Rejected(name or source_location, source_location, "no id or path")
        return
    texts: list[str] = []
    for number, caption in enumerate(captions):
        try:
            texts += one_caption(caption)
        except InvalidSampleError as problem:
            yield Rejected(name, f"{source_location}, {what} {number}", problem.reason, problem.detail)
    file, _, number_of_image = source_location.rpartition(", image ")
    group = str(image.get("domain") or "")
    yield Entry(name, source_location, path, texts, row_id=f"{file}#{number_of_image}", group=group)


def one_caption(value: Any) -> list[str]:
    """A caption of a document. Raises InvalidSampleError where it is none."""
    if not isinstance(value, str):
        raise InvalidSampleError("no caption" if value is None else "caption is not text", repr(value))
    return to_texts([value])
