"""Batches: what goes into a model, as records of arrays, and how items are cut into batches.

Token ids come from the model's own tokenizer and chat template and equal those of its Hugging Face processor; images
are resized and cropped by its own image processor and stay uint8 until they are on the device.

B images or texts, N hard-negative captions, T tokens (right-padded).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from vladva.core.hashing import key_of
from vladva.models.transfer import to_device

BATCH_TOKENS = 32_768  # in one batch, padding included; long items come in smaller batches


@dataclass
class Tokens:
    """Token ids [B, T]; length [B] of each prompt, its last token being the summary token; length [B] with caption."""

    ids: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray


@dataclass
class Pixels:
    """Images as the model takes them, uint8 until they are on the device.

    An image has one row of `values` (LLaVA: all of it) or several (LLaVA-Next: tiles; Qwen: patches). Images are put
    together by concatenation, and never taken apart again.
    """

    values: np.ndarray  # uint8 [R, 3, h, w]
    sizes: np.ndarray  # int64 [B, 2]; (height, width) of each image: in patches (Qwen), before resizing (the others)

    def key(self) -> int:
        """Equal for what the model cannot tell apart."""
        return key_of(self.sizes.tobytes() + self.values.tobytes())

    @classmethod
    def concatenate(cls, parts: Sequence[Pixels]) -> Pixels:
        """The images of all parts, in order."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


class Replacement(NamedTuple):
    """A planned sample that could not be used, for which the one at `position` of the chunk stands in."""

    position: int
    id: str
    reason: str


@dataclass
class MicroBatch:
    """One chunk of pairs, collated; never sliced afterwards.

    The side `image` holds the queries, images unless there are texts in their stead, `text` the positives, captions
    unless there are images among them.
    """

    number: int
    ids: list[str]
    pixels: Pixels | None  # None where there are texts instead of images
    image: Tokens  # [B] prompt, then the long caption where there is one
    text: Tokens  # [B + N] the short captions, then the hard negatives
    text_owners: np.ndarray  # int64 [B + N]; the pair that each text belongs to: 0 .. B-1, then those of the negatives
    has_short: np.ndarray  # bool [B]; pairs without a short caption take no part in the contrastive loss
    image_keys: np.ndarray  # int64 [B]; equal for images that are equal to the model
    caption_keys: np.ndarray  # int64 [B + N]; equal for equal texts
    teacher: np.ndarray | None = None  # int16 [B, E]; what a teacher makes of each short caption, in whole numbers
    text_pixels: Pixels | None = None  # of the positives that are images, or hold one
    replaced: str = "[]"  # JSON: [position, id, reason] of each planned sample that another stands in for

    def replacements(self) -> list[Replacement]:
        """The planned samples that could not be used, with the positions of those that stand in for them."""
        return [Replacement(*each) for each in json.loads(self.replaced)]

    def to_row(self) -> dict[str, Any]:
        """The batch as one row of a Ray data set: a column for each array."""
        row: dict[str, Any] = {
            "number": self.number,
            "ids": self.ids,
            "text_owners": self.text_owners,
            "has_short": self.has_short,
            "image_keys": self.image_keys,
            "caption_keys": self.caption_keys,
            "replaced": self.replaced,
        }
        if self.teacher is not None:
            row["teacher"] = self.teacher
        for side, tokens in (("image", self.image), ("text", self.text)):
            row |= {
                f"{side}.ids": tokens.ids,
                f"{side}.prompt_lengths": tokens.prompt_lengths,
                f"{side}.lengths": tokens.lengths,
            }
        if self.pixels is not None:
            row |= {"pixels.values": self.pixels.values, "pixels.sizes": self.pixels.sizes}
        if self.text_pixels is not None:
            row |= {"text_pixels.values": self.text_pixels.values, "text_pixels.sizes": self.text_pixels.sizes}
        return row

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> MicroBatch:
        """The batch that `to_row` gave."""

        def tokens(side: str) -> Tokens:
            return Tokens(row[f"{side}.ids"], row[f"{side}.prompt_lengths"], row[f"{side}.lengths"])

        def pixels(name: str) -> Pixels | None:
            return Pixels(row[f"{name}.values"], row[f"{name}.sizes"]) if f"{name}.values" in row else None

        return cls(
            number=row["number"],
            ids=row["ids"],
            pixels=pixels("pixels"),
            text_pixels=pixels("text_pixels"),
            image=tokens("image"),
            text=tokens("text"),
            text_owners=row["text_owners"],
            has_short=row["has_short"],
            image_keys=row["image_keys"],
            caption_keys=row["caption_keys"],
            teacher=row.get("teacher"),
            replaced=row["replaced"],
        )


def cut(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices of the items of each batch: like lengths together, longest first so that the biggest fails first."""
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def pad_right(rows: Sequence[tuple[list[int], list[int]]], padding: int | None) -> Tokens:
    """(prompt, caption) pairs of token ids, filled up to the longest with the padding id, or 0 where there is none."""
    lengths = np.array([len(prompt) + len(caption) for prompt, caption in rows], np.int64)
    ids = np.full((len(rows), int(lengths.max())), 0 if padding is None else padding, np.int64)
    for i, (prompt, caption) in enumerate(rows):
        ids[i, : lengths[i]] = prompt + caption
    return Tokens(ids, np.array([len(prompt) for prompt, _ in rows], np.int64), lengths)


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Pixels on the scale of 0 to 255, rounded: some image processors give them as floats."""
    return values if values.dtype == np.uint8 else np.clip(np.rint(values), 0, 255).astype(np.uint8)


def pixel_statistics(image_processor: Any) -> tuple[list[float], list[float]]:
    """Mean and standard deviation that an image processor normalises with, per channel, on the scale of 0 to 255."""
    factor = image_processor.rescale_factor
    return [m / factor for m in image_processor.image_mean], [s / factor for s in image_processor.image_std]


def as_tensors(record: Tokens | Pixels, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The record's fields, on the device; what shapes depend on is on the host besides, where that is another place."""
    tensors = to_device({f.name: getattr(record, f.name) for f in fields(record)}, device)
    if torch.device(device).type != "cpu":
        tensors |= on_host(record)
    return tensors


def on_host(record: Tokens | Pixels) -> dict[str, torch.Tensor]:
    """The fields of tokens, or the sizes of images, as the host has them: by the names that are looked for there."""
    names = [f.name for f in fields(record)] if isinstance(record, Tokens) else ["sizes"]
    return {f"host_{name}": torch.from_numpy(getattr(record, name)) for name in names}


def host_array(tokens: dict[str, torch.Tensor], name: str) -> np.ndarray:
    """A field of tokens for the host to read: its own copy, or the device's, which is waited for."""
    own = tokens.get(f"host_{name}")
    return (tokens[name].cpu() if own is None else own).numpy()
