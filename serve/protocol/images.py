"""Images: from what a client sends (`data:` URIs only) to bytes that look like an image, nothing decoded yet.

Nothing is ever fetched: a server that reads URLs or files for its callers can be made to read what they must not see
(vLLM: CVE-2025-6242, CVE-2026-24779).
"""

import base64
import binascii
import io

from PIL import Image

from vladva.core.images import FORMATS, MAX_RATIO

# Image processors scale the shorter side to their own size: an image of 50,000,000 x 1 pixels would become 16 billion.


def parse_data_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes of `data:image/...;base64,...`. Raises ValueError for every other scheme, encoding, or size."""
    scheme, _, rest = uri.partition(":")
    if scheme.lower() in ("http", "https"):
        raise ValueError("remote URLs are off on this server; send the image as a data: URI")
    if scheme.lower() != "data":
        raise ValueError("an image is a data: URI, data:image/png;base64,...")
    header, comma, payload = rest.partition(",")
    if not comma or not header.lower().startswith("image/") or not header.lower().endswith(";base64"):
        raise ValueError("an image is a base64 data: URI of an image type, data:image/png;base64,...")
    if len(payload) * 3 // 4 > max_bytes + 2:
        raise ValueError(f"the image is larger than {max_bytes:,} bytes")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the image is not valid base64") from None


def image_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) from the header alone. Raises ValueError for what is no image or has too many pixels."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
    except Image.DecompressionBombError:
        raise ValueError(f"the image has far more than {max_pixels:,} pixels") from None
    except (OSError, SyntaxError, ValueError):
        raise ValueError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    if width * height > max_pixels:
        raise ValueError(f"the image has {width} x {height} pixels; at most {max_pixels:,} are accepted")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise ValueError(f"the image is {width} x {height}; one side may be at most {MAX_RATIO} times the other")
    return width, height
