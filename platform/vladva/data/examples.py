"""Examples: the bytes of a sample, decoded and checked, with the captions that one epoch uses of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from PIL import Image

from vladva.core.item_content import ItemContent


@dataclass(frozen=True)
class Example:
    """One image (RGB), or a text in its stead, with at most one short and one long caption.

    `negatives` are captions that are wrong for it on purpose, `caption` says which of the
    sample's captions the short one is, and `teacher` is a teacher's vector of it. `words` stand beside the image, both
    with their `instruction`; `positive` is what is contrasted with them in place of the short caption.
    """

    id: str
    image: Image.Image | str
    short: str | None
    long: str | None
    negatives: tuple[str, ...] = ()
    caption: int | None = None
    teacher: np.ndarray | None = None
    words: str | None = None
    instruction: str | None = None
    positive: ItemContent | None = None


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
    """The text in the JSON of a sample that has no image."""
    return json.loads(data.decode("utf-8-sig"))["text"].strip()


def _random(key: str) -> Random:
    return Random(int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little"))
