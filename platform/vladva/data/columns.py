"""Columns and cells of tables: by which names images, captions and ids go, and how a cell becomes text.

Every reader of a table (preparing, embedding, benchmarks) takes the names from here.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vladva.core.errors import InvalidSampleError
from vladva.core.text import decode_text

PATH_COLUMNS = ("path", "filepath", "file_path", "image_path", "file_name", "filename", "file", "image", "img")
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes", *PATH_COLUMNS)
CAPTION_COLUMNS = ("captions", "caption", "text", "txt", "sentence", "raw", "annotations_captions")
ID_COLUMNS = ("id", "key", "__key__")


def choose_column(what: str, option: str, known: Sequence[str], given: str, columns: Sequence[str], file: str) -> str:
    """The column that the user named, or the first of the known ones. Raises ValueError listing what there is."""
    wanted = [given] if given else known
    found = next((name for name in wanted if name in columns), None)
    if found is None:
        looked = given or f"any of {', '.join(known)}"
        raise ValueError(
            f"{file} has no column {looked} for the {what}: name one with {option}; it has {list(columns)}"
        )
    return found


def choose_image_column(
    known: Sequence[str], given: str, columns: Sequence[str], file: str, *, required: bool = True
) -> str:
    """The column of images or their paths; "" where there is none and none is required."""
    if not required and not given and not any(name in columns for name in known):
        return ""
    return choose_column("images", "--image-column", known, given, columns, file)


def choose_caption_columns(given: tuple[str, ...], columns: Sequence[str], file: str) -> list[str]:
    """The columns asked for, or the first of the known ones; none is no mistake, captions may be joined."""
    if given:
        return [choose_column("captions", "--caption-column", (), name, columns, file) for name in given]
    return [name for name in CAPTION_COLUMNS if name in columns][:1]


def to_texts(value: Any) -> list[str]:
    """A cell with a caption or a list of them, as text or UTF-8, as written; null is none. Raises InvalidSampleError.

    A text that begins as a JSON list of texts does is that list: so tables without lists hold several captions.
    """
    values = list(value) if isinstance(value, (list, tuple)) else [] if value is None else [value]
    texts = [_to_text(text) for text in values if text is not None]
    if not isinstance(value, (list, tuple)) and texts and texts[0].lstrip().startswith("["):
        return _json_texts(texts[0])
    return texts


def _to_text(text: Any) -> str:
    if not isinstance(text, (str, bytes)):
        raise InvalidSampleError("caption is not text", repr(text))
    if isinstance(text, bytes):
        return decode_text(text)
    try:
        text.encode()  # halves of characters stand for bytes that are no UTF-8 (CSV), or are spelled out in JSON
        return text
    except UnicodeError as error:
        raise InvalidSampleError("caption is not UTF-8", str(error)) from None


def _json_texts(text: str) -> list[str]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        return [text]
    return [_to_text(value) for value in values] if all(isinstance(value, str) for value in values) else [text]


def to_name(value: Any) -> str:
    """The text or number in a cell of ids or paths. Raises InvalidSampleError."""
    # Bytes that are no UTF-8 are for the staging table to refuse, as in the names of files.
    text = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value
    if isinstance(text, int) and not isinstance(text, bool):
        text = str(text)
    if not isinstance(text, str) or not text.strip():
        raise InvalidSampleError("no id or path", repr(value))
    return text.strip()


def refuse_urls(path: str, file: str) -> None:
    """Raise ValueError for a link: nothing is downloaded."""
    if path.startswith(("http://", "https://")):
        raise ValueError(
            f"{file} holds links ({path}), and this job downloads nothing: fetch the images with img2dataset "
            f"(--output_format webdataset), then prepare the folder it has written"
        )
