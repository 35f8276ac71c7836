"""Text files beside an image, with a caption a line."""

from __future__ import annotations

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.text import text_lines
from vladva.data.image_refs import read_file
from vladva.data.source import Entry


def read_caption_files(images_uri: str, entry: Entry) -> list[str]:
    """The lines of the text files beside an image. Raises InvalidSampleError, which names the file."""
    lines: list[str] = []
    for file in entry.caption_files:
        content = read_file(storage.resolve(images_uri, file))
        if isinstance(content, InvalidSampleError):
            raise content
        for number, line in enumerate(text_lines(content), start=1):
            if isinstance(line, InvalidSampleError):
                raise InvalidSampleError(line.reason, f"{file}, line {number}: {line.detail}")
            lines.append(line)
    return lines
