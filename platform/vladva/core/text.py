"""Text from users: one policy for marks, line ends and characters that nobody sees, for every reader and for Serve.

- UTF-8, or UTF-16 that begins with its byte order mark; any other bytes are an error that names the file or row.
- Byte order marks are dropped: they would be tokens, and the same caption another embedding.
- Windows, old Macintosh, Unicode (U+2028, U+2029, U+0085) and form-feed line ends become "\\n".
- NUL and the other control characters are dropped, tabs are kept.
- Space around the text goes. Everything else stays as it is: no Unicode normalisation, no change of case.
"""

from __future__ import annotations

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from vladva.core.errors import InvalidSampleError

LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
DROPPED = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff]")
UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def clean_text(text: str) -> str:
    """The text as the policy wants it. Raises InvalidSampleError for halves of characters, which no UTF-8 has."""
    return clean_characters(text).strip()


def clean_characters(text: str) -> str:
    """The same with the space around it, which in a conversation is part of the text. Raises InvalidSampleError."""
    if text.isprintable():  # almost always: then there is nothing to replace
        return text
    try:
        text.encode()
    except UnicodeError as error:
        raise InvalidSampleError("caption is not UTF-8", str(error)) from None
    return DROPPED.sub("", LINE_ENDS.sub("\n", text))


def decode_text(data: bytes) -> str:
    """The text in a file, as it is there but for a byte order mark. Raises InvalidSampleError."""
    try:
        return data.decode("utf-16" if data.startswith(UTF_16) else "utf-8-sig")
    except UnicodeError as error:
        raise InvalidSampleError("caption is not UTF-8", str(error)) from None


def text_lines(data: bytes) -> list[str | InvalidSampleError]:
    """The lines of a text file, as written, or what is wrong with one; only line feeds and carriage returns end one.

    U+2028 inside a caption is part of it. A line that is no UTF-8 costs no other line.
    """
    if data.startswith(UTF_16):
        try:
            return list(re.split("\r\n|\n|\r", decode_text(data)))
        except InvalidSampleError as problem:
            return [problem]
    return [_line(line) for line in re.split(b"\r\n|\n|\r", data.removeprefix(codecs.BOM_UTF8))]


def _line(data: bytes) -> str | InvalidSampleError:
    try:
        return data.decode()
    except UnicodeError as error:
        return InvalidSampleError("caption is not UTF-8", str(error))


def decode_json(data: bytes) -> Any:
    """A JSON document in UTF-8, -16 or -32, with or without a byte order mark. Raises ValueError where it is none.

    Bytes that are no UTF-8 come as halves of characters: whoever takes a text out of it refuses that one alone.
    """
    return json.loads(data.decode(json.detect_encoding(data), "surrogateescape"))


def lost_more_than_space(text: str, clean: str) -> bool:
    """Whether cleaning took marks or control characters out of a text, or changed its line ends."""
    return clean != text and clean != text.strip()


def clean_captions(texts: Iterable[str], changed: Counter[str] | None = None) -> list[str]:
    """Clean texts without empty ones, each once; `changed` counts those that had more than space taken away.

    Raises InvalidSampleError.
    """
    cleaned = []
    for text in texts:
        clean = clean_text(text)
        if changed is not None and lost_more_than_space(text, clean):
            changed["caption cleaned of marks and control characters"] += 1
        if clean:
            cleaned.append(clean)
    return list(dict.fromkeys(cleaned))
