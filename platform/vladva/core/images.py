"""Images: which formats are accepted, how large they may be, and how bytes become pixels."""

from __future__ import annotations

import io
import re
import warnings

from PIL import Image, UnidentifiedImageError

from vladva.core.errors import InvalidSampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 50_000_000


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode JPEG, PNG, WebP or the first frame of a GIF to RGB.

    The size is checked before any pixel is decoded. Raises ValueError with the reason for everything else.
    """
    if not data:
        raise ValueError("the image has zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"the image has {width} x {height} pixels; at most {max_pixels:,} are accepted")
        # Not image.draft(): decoding at a half or a quarter of the size takes a third to a half of the time from
        # 1024 x 768 on, but resized to 336 the pixels are others by up to 7 of 255, and the promise is 1e-3.
        image.load()
        if image.mode.startswith("I;16"):  # 16-bit grey: convert() would clip it to white
            image = image.point(lambda value: value / 256).convert("L")
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"not an image in one of the formats {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the image is corrupt: {error}") from None


IMAGE = re.compile(r"\.(jpe?g|png|webp|gif)$", re.IGNORECASE)
IMAGES = ("jpg", "jpeg", "png", "webp", "gif")
MAGIC = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"GIF8")  # first bytes of these formats


def check_image(data: bytes, *, verify: bool, max_pixels: int) -> tuple[int, int]:
    """Width and height of an encoded image. Raises InvalidSampleError; `verify` decodes it."""
    if not data:
        raise InvalidSampleError("zero bytes")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is below
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise InvalidSampleError("too many pixels", f"{width} x {height}; at most {max_pixels} are accepted")
        if verify:
            # A JPEG is decoded at an eighth of its size: all of its bytes are still read, in a third of the time.
            image.draft(None, (max(1, width // 8), max(1, height // 8)))
            image.load()
    except InvalidSampleError:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidSampleError("too many pixels", str(error)) from None
    except (
        Exception
    ) as error:  # Pillow's decoders raise whatever they stumble over: OSError, SyntaxError, IndexError...
        if isinstance(error, UnidentifiedImageError) and not data.startswith(MAGIC):
            raise InvalidSampleError("not an image", f"it begins with {data[:16]!r}") from None
        raise InvalidSampleError("corrupt image", str(error)) from None
    return width, height


def image_suffix(data: bytes) -> str:
    """The name's ending for an image that `check_image` accepts, by its first bytes."""
    return dict(zip(MAGIC, ("jpg", "png", "webp", "gif"), strict=True))[
        next(magic for magic in MAGIC if data.startswith(magic))
    ]
