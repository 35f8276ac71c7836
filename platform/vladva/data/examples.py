"""Examples: the bytes of a sample, decoded and checked, with the captions that one epoch uses of it."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF")
MAX_PIXELS = 50_000_000


@dataclass(frozen=True)
class Example:
    """One picture (RGB), or a text in its stead, with at most one short and one long caption.

    `negatives` are captions that are wrong for it on purpose.
    """

    id: str
    image: Image.Image | str
    short: str | None
    long: str | None
    negatives: tuple[str, ...] = ()


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode JPEG, PNG, WebP or the first frame of a GIF to RGB.

    The size is checked before any pixel is decoded. Raises ValueError with the reason for everything else.
    """
    if not data:
        raise ValueError("the picture has zero bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"the picture has {width} x {height} pixels; at most {max_pixels:,} are accepted")
        # Not image.draft(): decoding at a half or a quarter of the size takes a third to a half of the time from
        # 1024 x 768 on, but resized to 336 the pixels are others by up to 7 of 255, and the promise is 1e-3.
        image.load()
        if image.mode.startswith("I;16"):  # 16-bit grey: convert() would clip it to white
            image = image.point(lambda value: value / 256).convert("L")
        return image if image.mode == "RGB" else image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError(f"not a picture in one of the formats {', '.join(FORMATS)}") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"the picture is corrupt: {error}") from None


def choose_captions(
    captions: Sequence[str],
    tokens: Sequence[int],
    *,
    short_below: int,
    long_below: int,
    seed: int,
    epoch: int,
    sample_id: str,
) -> tuple[str | None, str | None]:
    """The short and the long caption that an epoch uses, drawn by (seed, epoch, id); None where the sample has none."""
    short = [text for text, count in zip(captions, tokens, strict=True) if count < short_below]
    long = [text for text, count in zip(captions, tokens, strict=True) if short_below <= count < long_below]
    random = _random(f"{seed}/{epoch}/{sample_id}")
    return (random.choice(short) if short else None), (random.choice(long) if long else None)


def choose_negatives(negatives: Sequence[str], count: int, *, seed: int, epoch: int, sample_id: str) -> tuple[str, ...]:
    """At most `count` of the hard-negative captions, drawn by (seed, epoch, id)."""
    return tuple(_random(f"{seed}/{epoch}/{sample_id}/negatives").sample(negatives, min(count, len(negatives))))


def read_text(data: bytes) -> str:
    """The text in the JSON of a sample that has no picture."""
    return json.loads(data.decode("utf-8-sig"))["text"].strip()


def _random(key: str) -> Random:
    return Random(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))
