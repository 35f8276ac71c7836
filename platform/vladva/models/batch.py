"""Batches: the only preprocessing in the platform. Training, embedding, evaluation and serving all go through here.

Token ids come from the model's own tokenizer and chat template and equal those of its Hugging Face processor; images
are resized and cropped by its own image processor and stay uint8 until they are on the device.

B images or texts, N hard-negative captions, T tokens (right-padded).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vladva.core.hashing import key_of

if TYPE_CHECKING:
    pass


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


@dataclass
class MicroBatch:
    """One chunk of image-text pairs, collated; never sliced afterwards."""

    number: int
    ids: list[str]
    pixels: Pixels | None  # None where texts stand in the images' stead
    image: Tokens  # [B] prompt, then the long caption where there is one
    text: Tokens  # [B + N] the short captions, then the hard negatives
    text_owners: np.ndarray  # int64 [B + N]; the pair that each text belongs to: 0 .. B-1, then those of the negatives
    has_short: np.ndarray  # bool [B]; pairs without a short caption take no part in the contrastive loss
    image_keys: np.ndarray  # int64 [B]; equal for images that are equal to the model
    caption_keys: np.ndarray  # int64 [B + N]; equal for equal texts

    def to_row(self) -> dict[str, Any]:
        """The batch as one row of a Ray data set."""
        row = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in RECORDS}
        for name, kind in self.records():
            row |= {f"{name}.{f.name}": getattr(getattr(self, name), f.name) for f in fields(kind)}
        return row

    def records(self) -> list[tuple[str, type[Pixels] | type[Tokens]]]:
        """The names and kinds of the records that are there."""
        return [(name, kind) for name, kind in RECORDS.items() if getattr(self, name) is not None]

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> MicroBatch:
        """The batch that `to_row` gave."""
        records = {
            name: kind(**{f.name: row[f"{name}.{f.name}"] for f in fields(kind)})
            if f"{name}.{fields(kind)[0].name}" in row
            else None
            for name, kind in RECORDS.items()
        }
        names = [f.name for f in fields(cls) if f.name not in RECORDS]
        return cls(**{name: row[name] for name in names}, **records)


RECORDS: dict[str, type[Pixels] | type[Tokens]] = {"pixels": Pixels, "image": Tokens, "text": Tokens}
"""The fields of a batch that are records themselves: in a row, one column for each of their fields."""


def cut(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Positions of the items of each batch: like lengths together, longest first so that the biggest fails first."""
    batch: list[int] = []
    for position in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[batch[0]] > BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(position)
    if batch:
        yield batch


def as_tensors(record: Tokens | Pixels, device: torch.device | str) -> dict[str, torch.Tensor]:
    """The record's fields, on the device."""
    return {f.name: torch.tensor(getattr(record, f.name), device=device) for f in fields(record)}
