"""Images: which formats are accepted, how large they may be, and how bytes become pixels.

Scan, training, batch job, benchmarks and Serve decode with `decode_image`, so one file has the same pixels everywhere:

- turned upright as its EXIF (or XMP) orientation says, as Pillow's `exif_transpose` does;
- what is transparent lies on white;
- 16 bits a channel become 8, CMYK becomes RGB without a colour profile;
- of an animation, a multi-page TIFF or a multi-picture JPEG the first frame;
- a JPEG without its end marker is taken if all of its pixels are there, as browsers do.

The size is checked before any pixel is decoded. README's table says which formats there are.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import warnings
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vladva.core.errors import InvalidSampleError
from vladva.core.image_repair import complete_jpeg, without_text_chunks


class ImageFormat(NamedTuple):
    """A format: Pillow's name, endings of file names (the first is the usual one), and how its bytes begin."""

    name: str
    suffixes: tuple[str, ...]
    magic: re.Pattern[bytes]


def _starts(pattern: bytes) -> re.Pattern[bytes]:
    return re.compile(pattern, re.DOTALL)


ACCEPTED = (
    ImageFormat("JPEG", ("jpg", "jpeg", "jfif"), _starts(rb"\xff\xd8\xff")),
    ImageFormat("PNG", ("png", "apng"), _starts(rb"\x89PNG\r\n\x1a\n")),
    ImageFormat("WEBP", ("webp",), _starts(rb"RIFF....WEBP")),
    ImageFormat("GIF", ("gif",), _starts(rb"GIF8[79]a")),
    ImageFormat("BMP", ("bmp",), _starts(rb"BM")),
    ImageFormat("TIFF", ("tif", "tiff"), _starts(rb"II[*+]\0|MM\0[*+]")),
    ImageFormat("AVIF", ("avif",), _starts(rb"....ftyp(avi[fs]|(mif1|msf1|miaf)....(....){0,12}?avi[fs])")),
)
REFUSED = (  # known by sight, so that the reason names them
    ImageFormat("HEIC", ("heic", "heif"), _starts(rb"....ftyp(hei|hev|mif1|msf1)")),
    ImageFormat("JPEG 2000", ("jp2", "j2k", "jpx"), _starts(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51")),
    ImageFormat("JPEG XL", ("jxl",), _starts(rb"\xff\x0a|\0\0\0\x0cJXL ")),
    ImageFormat("SVG", ("svg",), _starts(rb"\s*(<\?xml.{0,200})?\s*<svg")),
    ImageFormat("Photoshop", ("psd",), _starts(rb"8BPS")),
    ImageFormat("PDF", (), _starts(rb"%PDF")),
)
FORMATS = tuple(form.name for form in ACCEPTED)
# A file with the ending of a format that is refused is a sample too, or nobody would hear of it.
IMAGES = tuple(suffix for form in ACCEPTED + REFUSED for suffix in form.suffixes)
IMAGE = re.compile(rf"\.({'|'.join(IMAGES)})$", re.IGNORECASE)

MAX_PIXELS = 50_000_000
# Image processors scale the shorter side to their own size: an image of 60,000 x 1 pixels would take gigabytes.
MAX_RATIO = 200  # of the longer side to the shorter; the limit of the Qwen families too

ORIENTATION = 0x0112  # EXIF tag
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV")  # and 16-bit grey
ORIENTATION_FIELDS = ("exif", "xmp", "XML:com.adobe.xmp", "Raw profile type exif")  # where Pillow finds an orientation
PNG_METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")


class ImageFacts(NamedTuple):
    """Size of an image as it is seen (upright), and what was done to it that somebody may want to count."""

    width: int
    height: int
    note: str = ""  # "several frames, the first is taken", "JPEG without end marker"


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode an encoded image to RGB, upright, on white. Raises InvalidSampleError (a ValueError) with the reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about sizes, palettes and metadata: each case is dealt with here
        image, data = _opened(data, max_pixels)
        try:
            # Not image.draft(): decoding at a half or a quarter of the size takes a third to a half of the time from
            # 1024 x 768 on, but resized to 336 the pixels are others by up to 7 of 255, and the promise is 1e-3.
            depth = _depth(image)
            image = _load(image, data)
            orientation = _orientation(image)
            rgb = _to_rgb(image, depth)
            return rgb.transpose(UPRIGHT[orientation]) if orientation > 1 else rgb
        except Exception as error:  # Pillow's decoders raise whatever they stumble over: OSError, IndexError...
            raise _problem(error, data) from None


def to_upright_rgb(image: Image.Image) -> Image.Image:
    """An image that Pillow has opened, or made, as `decode_image` gives it. Raises InvalidSampleError.

    One that was opened from a file gives the pixels of that file's bytes, whether or not they are loaded already.
    """
    _check_shape(image)
    try:
        depth = _depth(image)
        upright = ImageOps.exif_transpose(image)
        upright.info.update(image.info)
        return _to_rgb(upright, depth)
    except Exception as error:
        raise _problem(error, b"") from None


def from_data_uri(uri: str) -> bytes:
    """The bytes of `data:image/...;base64,...`. Raises ValueError for any other form."""
    header, comma, payload = uri.partition(",")
    kind = header.lower()
    if not comma or not kind.startswith("data:image/") or not kind.endswith(";base64"):
        raise ValueError("an image is a base64 data: URI of an image type, data:image/png;base64,...")
    try:
        return base64.b64decode(payload, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("the image is not valid base64") from None


def check_image(data: bytes, *, verify: bool, max_pixels: int = MAX_PIXELS) -> ImageFacts:
    """Upright size of an encoded image. Raises InvalidSampleError; `verify` decodes it, else the header is read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image, data = _opened(data, max_pixels)
        try:
            note = "several frames, the first is taken" if getattr(image, "is_animated", False) else ""
            _check_mode(image)
            width, height = image.size
            if verify:
                # A JPEG is decoded at an eighth of its size: all bytes are still read, in a third of the time.
                image.draft(None, (max(1, width // 8), max(1, height // 8)))
                loaded = _load(image, data)
                if loaded is not image and image.format != "PNG":
                    note = "JPEG without end marker"
                image = loaded
            turned = _orientation(image, None if verify else data) >= 5
        except Exception as error:
            raise _problem(error, data) from None
    return ImageFacts(height, width, note) if turned else ImageFacts(width, height, note)


def image_suffix(data: bytes) -> str:
    """The usual ending of the name of an image that `check_image` accepts."""
    return next(form.suffixes[0] for form in ACCEPTED if form.magic.match(data))


# --- bytes -> pixels -------------------------------------------------------------------------------------------------


def _opened(data: bytes, max_pixels: int) -> tuple[Image.Image, bytes]:
    """The image, its header read and its size checked, and the bytes it is read from. Raises InvalidSampleError."""
    if not data:
        raise InvalidSampleError("zero bytes", "the image is empty")
    try:
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except ValueError:  # a text chunk of a PNG larger than Pillow reads; nothing of it is needed
            data = without_text_chunks(data)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Exception as error:
        raise _problem(error, data) from None
    _check_shape(image, max_pixels)
    return image, data


def _check_shape(image: Image.Image, max_pixels: int = MAX_PIXELS) -> None:
    width, height = image.size
    if not width * height:
        raise InvalidSampleError("zero pixels", f"the image has {width} x {height} pixels")
    if width * height > max_pixels:
        raise InvalidSampleError(
            "too many pixels", f"the image has {width} x {height} pixels; at most {max_pixels:,} are accepted"
        )
    if max(width, height) > MAX_RATIO * min(width, height):
        raise InvalidSampleError(
            "extreme shape", f"the image has {width} x {height} pixels; a side is at most {MAX_RATIO} times the other"
        )


def _problem(error: Exception, data: bytes) -> InvalidSampleError:
    """What to say of an image that cannot be opened or decoded."""
    if isinstance(error, InvalidSampleError):
        return error
    if isinstance(error, Image.DecompressionBombError):
        return InvalidSampleError("too many pixels", f"the image has far more than {MAX_PIXELS:,} pixels")
    if any(form.magic.match(data) for form in ACCEPTED):
        what = "its header cannot be read" if isinstance(error, UnidentifiedImageError) else str(error)
        return InvalidSampleError("corrupt image", f"the image is corrupt: {what}")
    known = next((form.name for form in REFUSED if form.magic.match(data)), None)
    formats = f"the formats {', '.join(FORMATS)}"
    if known:
        return InvalidSampleError("format not accepted", f"the image is {known}: convert it to one of {formats}")
    return InvalidSampleError("not an image", f"not an image in one of {formats}; it begins with {data[:16]!r}")


def _load(image: Image.Image, data: bytes) -> Image.Image:
    """The image with its pixels; another one where Pillow would not load it as it is."""
    try:
        image.load()
    except (OSError, ValueError):
        whole = None
        if image.format in ("JPEG", "MPO"):
            whole = complete_jpeg(data)
        elif image.format == "PNG" and len(short := without_text_chunks(data)) < len(data):
            whole = Image.open(io.BytesIO(short), formats=("PNG",))
            whole.load()
        if whole is None:
            raise
        return whole
    return image


def _orientation(image: Image.Image, unread: bytes | None = None) -> int:
    """EXIF orientation, 1 to 8; 1 where there is none, or none that can be read. `unread`: of an image not loaded."""
    if image.format == "TIFF":  # Pillow turns it by itself
        return 1
    behind = image.format == "PNG" and unread is not None and any(name in unread for name in PNG_METADATA)
    if not behind and not any(name in image.info for name in ORIENTATION_FIELDS):
        return 1
    try:
        found = image.getexif().get(ORIENTATION, 1)  # of a PNG this decodes, as its EXIF may come last
    except Exception:  # broken metadata beside good pixels
        return 1
    return found if found in UPRIGHT else 1


def _depth(image: Image.Image) -> int:
    """Bits a channel in the file, where Pillow's mode does not say it; asked before the pixels are loaded."""
    if image.format != "PNG" or not image.tile:  # type: ignore[attr-defined]
        return 8
    rawmode = str(image.tile[0].args)  # type: ignore[attr-defined]
    found = re.search(r";(2|4|16)", rawmode)
    return int(found.group(1)) if found else 1 if image.mode == "1" else 8


def _check_mode(image: Image.Image) -> None:
    grey_16 = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode not in MODES and not grey_16:
        detail = f"the image has pixels of Pillow's mode {image.mode}: save it as RGB with 8 bits a channel"
        raise InvalidSampleError("format not accepted", detail)


def _to_rgb(image: Image.Image, depth: int) -> Image.Image:
    """Pixels of any mode as RGB, on white; `depth`: bits a channel in the file."""
    clear = image.info.get("transparency")
    if image.mode == "RGB" and clear is None:
        return image
    _check_mode(image)
    if image.mode.startswith("I"):  # 16-bit grey, in either order of its bytes: convert() would clip it to white
        levels = np.asarray(image)
        rgb = Image.fromarray((levels >> 8).astype(np.uint8)).convert("RGB")
        if clear is None:
            return rgb
        opaque = Image.fromarray(np.where(levels == clear, 0, 255).astype(np.uint8))
    else:
        if not image.has_transparency_data:
            return image.convert("RGB")
        if image.mode in ("1", "L") and depth < 8:  # Pillow widens the pixels, and not the level that is transparent
            assert clear is not None  # these modes have no alpha channel
            image.info["transparency"] = clear * 255 // (2**depth - 1)
        if image.mode == "RGB" and depth == 16:
            assert clear is not None
            image.info["transparency"] = tuple(level >> 8 for level in clear)
        rgba = image.convert("RGBA")
        rgb, opaque = rgba.convert("RGB"), rgba.getchannel("A")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgb, mask=opaque)
    return white
