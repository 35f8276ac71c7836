"""Images: from what a client sends (a `data:` URI, or its base64 alone) to bytes that look like an image.

Nothing is decoded yet, and nothing is ever fetched: a server that reads URLs or files for its callers can be made to
read what they must not see (vLLM: CVE-2025-6242, CVE-2026-24779).
"""

import base64
import binascii
import re

from vladva.core.errors import InvalidSampleError
from vladva.core.images import check_image

DATA_URI = re.compile(r"\s*data:image/", re.IGNORECASE)
SPACE = b" \t\r\n\f"
SCHEME = re.compile(r"\s*([a-zA-Z][a-zA-Z0-9+.-]*):")
START = 1000  # characters in which the form of an image is seen
PERCENT = {f"%{code:02X}".encode(): bytes([code]) for code in b"+/=-_ \t\r\n\f"}  # what may stand so in base64
SLICE = 1 << 20  # characters that are decoded at a time: other threads wait for that long


def is_data_uri(text: str) -> bool:
    """Whether a text is an image rather than words."""
    return DATA_URI.match(text, 0, START) is not None


def parse_image_bytes(sent: str, max_bytes: int) -> bytes:
    """The bytes of `data:image/...;base64,...`, or of the base64 alone. Raises ValueError for anything else."""
    scheme = SCHEME.match(sent, 0, START)
    if scheme is None:
        return decode_base64(sent, max_bytes)
    if scheme[1].lower() in ("http", "https"):
        raise ValueError("remote URLs are off on this server; send the image as a data: URI")
    if scheme[1].lower() != "data":
        raise ValueError("an image is a data: URI, data:image/png;base64,...")
    comma = sent.find(",", 0, START)
    header = sent[:comma].strip().lower()
    if comma < 0 or not header.startswith("data:image/") or not header.endswith(";base64"):
        raise ValueError("an image is a base64 data: URI of an image type, data:image/png;base64,...")
    return decode_base64(sent[comma + 1 :], max_bytes)


def decode_base64(text: str, max_bytes: int) -> bytes:
    """The bytes of base64 as people write it: in lines, percent-encoded, without padding, or URL-safe.

    Raises ValueError for what could mean two things: both alphabets in one text, or padding that is not at the end.
    """
    if len(text) * 3 // 4 > 2 * max_bytes + 2:  # half of it may be line breaks, not more
        raise ValueError(f"the image is larger than {max_bytes:,} bytes")
    refusal = ValueError("the image is not valid base64: send data:image/png;base64,... or the base64 alone")
    try:
        letters = text.encode("ascii")
    except UnicodeEncodeError:
        raise refusal from None
    if b"%" in letters:
        for code, letter in PERCENT.items():
            letters = letters.replace(code, letter).replace(code.lower(), letter)
    letters = b"".join([letters[i : i + SLICE].translate(None, SPACE) for i in range(0, len(letters), SLICE)])
    url_safe = b"-" in letters or b"_" in letters
    if url_safe and (b"+" in letters or b"/" in letters):
        raise refusal
    bare = letters.rstrip(b"=")
    if len(letters) - len(bare) > 2 or len(bare) % 4 == 1 or b"=" in bare:
        raise refusal
    if len(bare) * 3 // 4 > max_bytes:
        raise ValueError(f"the image is larger than {max_bytes:,} bytes")
    whole = bare + b"=" * (-len(bare) % 4)
    alphabet = b"-_" if url_safe else None
    try:
        slices = [base64.b64decode(whole[i : i + SLICE], alphabet, validate=True) for i in range(0, len(whole), SLICE)]
    except (binascii.Error, ValueError):
        raise refusal from None
    return b"".join(slices)


def image_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) as the decoded image will have them: upright, from the header alone. Raises ValueError."""
    try:
        facts = check_image(data, verify=False, max_pixels=max_pixels)
    except InvalidSampleError as error:
        raise ValueError(error.detail or error.reason) from None
    return facts.width, facts.height
