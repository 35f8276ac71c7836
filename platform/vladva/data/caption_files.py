"""Text files beside an image, with a caption a line."""

from __future__ import annotations

import re

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.data.columns import to_texts
from vladva.data.image_refs import read_file
from vladva.data.source import Entry

LINE_END = re.compile(r"\r\n|\r|\n")  # and not what else str.splitlines() takes for one, U+2028 say


def read_caption_files(images_uri: str, entry: Entry) -> list[str]:
    """The lines of the text files beside an image. Raises InvalidSampleError, which names the file."""
    lines: list[str] = []
    for file in entry.caption_files:
        content = read_file(storage.resolve(images_uri, file))
        if isinstance(content, InvalidSampleError):
            raise content
        try:
            (whole,) = to_texts([content.removeprefix(b"\xef\xbb\xbf")])
        except InvalidSampleError as problem:
            raise InvalidSampleError(problem.reason, f"{file}: {problem.detail}") from None
        lines += LINE_END.split(whole)
    return lines
