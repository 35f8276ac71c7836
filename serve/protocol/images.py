"""Images: from what a client sends (`data:` URIs only) to bytes that look like an image, nothing decoded yet.

Nothing is ever fetched: a server that reads URLs or files for its callers can be made to read what they must not see
(vLLM: CVE-2025-6242, CVE-2026-24779).
"""

from vladva.core.errors import InvalidSampleError
from vladva.core.images import check_image, from_data_uri


def parse_data_uri(uri: str, max_bytes: int) -> bytes:
    """The bytes of `data:image/...;base64,...`. Raises ValueError for every other scheme, encoding, or size."""
    scheme, _, rest = uri.partition(":")
    if scheme.lower() in ("http", "https"):
        raise ValueError("remote URLs are off on this server; send the image as a data: URI")
    if scheme.lower() != "data":
        raise ValueError("an image is a data: URI, data:image/png;base64,...")
    if len(rest.partition(",")[2]) * 3 // 4 > max_bytes + 2:
        raise ValueError(f"the image is larger than {max_bytes:,} bytes")
    return from_data_uri(uri)


def image_size(data: bytes, max_pixels: int) -> tuple[int, int]:
    """(width, height) as the decoded image will have them: upright, from the header alone. Raises ValueError."""
    try:
        facts = check_image(data, verify=False, max_pixels=max_pixels)
    except InvalidSampleError as error:
        raise ValueError(error.detail or error.reason) from None
    return facts.width, facts.height
