"""Images that are whole, though Pillow refuses them: a JPEG without its end marker, a PNG with a very long text."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

from PIL import Image

END = b"\xff\xd9"
# What a decoder reads behind the end of the data. Where pixels are missing, it makes of each of these other pixels.
FILLERS = (bytes(64), b"\xaa" * 64, b"\x5b\x6d\xb6" * 21)
TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def complete_jpeg(data: bytes) -> Image.Image | None:
    """The decoded image of a JPEG that lacks only its end marker; None where pixels are missing too.

    libjpeg replaces missing data without telling, so the data is decoded with several things behind it: the pixels
    are equal only where none of them depends on what comes after the end.
    """
    body = data.rstrip(b"\xff")
    if not _has_all_scans(body):
        return None
    images = []
    for filler in FILLERS:
        image = Image.open(io.BytesIO(body + filler + END), formats=("JPEG",))
        try:
            image.load()
        except OSError:
            return None
        images.append(image)
    first = images[0].tobytes()
    return images[0] if all(image.tobytes() == first for image in images[1:]) else None


def _has_all_scans(data: bytes) -> bool:
    """Whether the scans of a progressive JPEG reach the last bit of every coefficient; true of other JPEGs."""
    missing: set[tuple[int, int]] = set()  # (component, coefficient) whose lowest bit has not come
    for marker, body in _segments(data):
        if marker == 0xC2:  # start of a progressive frame
            missing = {(body[6 + 3 * i], k) for i in range(body[5]) for k in range(64)}
        if marker == 0xDA and missing:  # start of a scan: components, first and last coefficient, bits
            components = [body[1 + 2 * i] for i in range(body[0])]
            first, last, bits = body[1 + 2 * body[0] :][:3]
            if bits & 15 == 0:
                missing -= {(component, k) for component in components for k in range(first, last + 1)}
    return not missing


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(marker, content) of a JPEG's segments; the coded pixels between them are passed over."""
    position = 2
    while (position := data.find(b"\xff", position)) >= 0 and position + 4 <= len(data):
        marker = data[position + 1]
        if marker in (0x00, 0xFF, *range(0xD0, 0xDA)):  # a stuffed byte, a fill byte, a marker without content
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack(">H", data[position + 2 : position + 4])
        yield marker, data[position + 4 : position + 2 + length]
        position += 2 + length


def without_text_chunks(data: bytes) -> bytes:
    """A PNG without its texts and colour profile, which Pillow does not read where they are long."""
    kept, position = [data[:8]], 8
    while position + 8 <= len(data):
        (length,) = struct.unpack(">I", data[position : position + 4])
        end = position + 12 + length
        if data[position + 4 : position + 8] not in TEXT_CHUNKS:
            kept.append(data[position:end])
        position = end
    return b"".join(kept)
