"""Batches: the only preprocessing in the platform. Training, embedding, evaluation and serving all go through here.

Token ids come from the model's own tokenizer and chat template and equal those of its Hugging Face processor; pictures
are resized and cropped by its own image processor and stay uint8 until they are on the device.

B pictures or texts, N hard-negative captions, T tokens (right-padded).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vladva.backbones import backbone_of, resolve
from vladva.examples import Example
from vladva.prompts import IMAGE_PROMPT, TEXT_PROMPT, soft_tokens

if TYPE_CHECKING:
    from PIL import Image

Side = Literal["image", "text"]

BATCH_TOKENS = 32_768  # in one batch, padding included; long items come in smaller batches


@dataclass
class Tokens:
    """Token ids [B, T]; length [B] of each prompt, its last token being the summary token; length [B] with caption."""

    ids: np.ndarray
    prompt_lengths: np.ndarray
    lengths: np.ndarray


@dataclass
class Pixels:
    """Pictures as the model takes them, uint8 until they are on the device.

    A picture has one row of `values` (LLaVA: all of it) or several (LLaVA-Next: tiles; Qwen: patches). Pictures are put
    together by concatenation, and never taken apart again.
    """

    values: np.ndarray  # uint8 [R, 3, h, w]
    sizes: np.ndarray  # int64 [B, 2]; (height, width) of each picture: in patches (Qwen), before resizing (the others)

    def key(self) -> int:
        """Equal for what the model cannot tell apart."""
        return key_of(self.sizes.tobytes() + self.values.tobytes())

    @classmethod
    def concatenate(cls, parts: Sequence[Pixels]) -> Pixels:
        """The pictures of all parts, in order."""
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))


@dataclass
class Batch:
    """One chunk of image-text pairs, collated; never sliced afterwards."""

    number: int
    ids: list[str]
    pixels: Pixels | None  # None where texts stand in the pictures' stead
    image: Tokens  # [B] prompt, then the long caption where there is one
    text: Tokens  # [B + N] the short captions, then the hard negatives
    text_owners: np.ndarray  # int64 [B + N]; the pair that each text belongs to: 0 .. B-1, then those of the negatives
    has_short: np.ndarray  # bool [B]; pairs without a short caption take no part in the contrastive loss
    image_keys: np.ndarray  # int64 [B]; equal for pictures that are equal to the model
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
    def from_row(cls, row: dict[str, Any]) -> Batch:
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


def key_of(data: bytes) -> int:
    """A 63-bit hash: equal data, equal key."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


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


class Preprocessor:
    """Makes the inputs of one model from pictures and texts. Loads tokenizer and image processor, never weights."""

    def __init__(
        self,
        checkpoint: str,
        *,
        image_prompt: str = IMAGE_PROMPT,
        text_prompt: str = TEXT_PROMPT,
        soft_prompts: bool = False,
        max_image_tokens: int | None = None,
    ) -> None:
        """Raises ValueError where the family, or the checkpoint, has no such limit on a picture's tokens."""
        from transformers import AutoConfig, AutoTokenizer

        # By its short name, older versions give it only where torchvision is installed.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor
        from transformers.utils import cached_file

        folder = resolve(checkpoint)
        self.backbone = backbone_of(checkpoint)
        self.config = AutoConfig.from_pretrained(folder)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        template = cached_file(folder, "chat_template.json", _raise_exceptions_for_missing_entries=False)
        if template:  # where older checkpoints keep the template with pictures; the tokenizer's own has none
            self.tokenizer.chat_template = json.loads(Path(template).read_text())["chat_template"]
        # The same pixels everywhere: torchvision's resizing, the default where it is installed, differs from Pillow's.
        self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        if max_image_tokens is not None:
            self.backbone.limit_image_tokens(self.config, self.image_processor, max_image_tokens)
        self.image_token: str = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        self.prompts = {"image": image_prompt, "text": text_prompt}
        self.image_prompts: dict[int, list[int]] = {}  # by number of image tokens
        self.soft_ids: dict[str, list[int]] = {"image": [], "text": []}
        self.prompt_ids: dict[str, list[int]] = {side: self._prompt_in_context(side) for side in ("image", "text")}
        if soft_prompts:
            for side in ("image", "text"):
                names = soft_tokens(side, len(self.prompt_ids[side]))
                self.tokenizer.add_tokens(names, special_tokens=True)
                self.soft_ids[side] = self.tokenizer.convert_tokens_to_ids(names)
                self.prompts[side] = "".join(names)

    def _prompt_in_context(self, side: Side) -> list[int]:
        """Token ids of the hand-written prompt in its place in the conversation, where no space may precede it."""

        def rendered(prompt: str) -> list[int]:
            if side == "image":
                content = [{"type": "image"}, {"type": "text", "text": prompt}]
                return self.render([{"role": "user", "content": content}], [(64, 64)])
            return self.render([{"role": "user", "content": [{"type": "text", "text": f"x\n{prompt}"}]}])

        whole, bare = rendered(self.prompts[side]), rendered("")
        before = next(i for i, (a, b) in enumerate(zip(whole, bare, strict=False)) if a != b)
        return whole[before : len(whole) - (len(bare) - before)]

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def render(self, messages: list[dict[str, Any]], sizes: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Token ids of a conversation up to the assistant's turn; `sizes`: (width, height) of its pictures."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = text.split(self.image_token)
        assert len(pieces) == len(sizes) + 1, (len(pieces) - 1, len(sizes))
        expanded = pieces[0]
        for piece, size in zip(pieces[1:], sizes, strict=True):
            expanded += self.image_token * self.num_image_tokens(size) + piece
        # A template that writes the beginning-of-sequence token itself must not get a second one.
        bos = self.tokenizer.bos_token
        return self.tokenizer(expanded, add_special_tokens=bos is None or not expanded.startswith(bos)).input_ids

    def num_image_tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of a picture of (width, height). Raises ValueError for a shape that the model does not take."""
        return self.backbone.num_image_tokens(self.config, self.image_processor, size)

    def image_prompt(self, size: tuple[int, int]) -> list[int]:
        """Token ids that ask for the summary of a picture of (width, height)."""
        count = self.num_image_tokens(size)
        if count not in self.image_prompts:
            content = [{"type": "image"}, {"type": "text", "text": self.prompts["image"]}]
            self.image_prompts[count] = self.render([{"role": "user", "content": content}], [size])
        return self.image_prompts[count]

    def text_prompt(self, text: str) -> list[int]:
        """Token ids that ask for the summary of a text."""
        if self.image_token in text:
            raise ValueError(f"the text contains the image token {self.image_token!r}")
        content = [{"type": "text", "text": f"{text.strip()}\n{self.prompts['text']}"}]
        return self.render([{"role": "user", "content": content}])

    def pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """Pictures resized and cut up as the model wants them."""
        return Pixels.concatenate(self.pixel_parts(images))

    def pixel_parts(self, images: Sequence[Image.Image]) -> list[Pixels]:
        """The same, one by one."""
        parts = []
        for image in images:
            values, size = self.backbone.pixels(self.image_processor, image)
            if values.dtype != np.uint8:
                values = np.clip(np.rint(values), 0, 255).astype(np.uint8)
            parts.append(Pixels(values, np.array([size], np.int64)))
        return parts

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel, on the scale of 0 to 255."""
        factor = self.image_processor.rescale_factor
        return [m / factor for m in self.image_processor.image_mean], [
            s / factor for s in self.image_processor.image_std
        ]

    def texts(self, texts: Sequence[str]) -> Tokens:
        """Texts with their prompt, padded together."""
        return self.pad([(self.text_prompt(text), []) for text in texts])

    def images(self, sizes: Sequence[tuple[int, int]], captions: Sequence[str | None]) -> Tokens:
        """Prompts for pictures of (width, height), each followed by its long caption and an end token if it has one."""
        rows = []
        for size, caption in zip(sizes, captions, strict=True):
            following = [] if caption is None else [*self._encode(caption), self.tokenizer.eos_token_id]
            rows.append((self.image_prompt(size), following))
        return self.pad(rows)

    def pad(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tokens:
        """Right-pad (prompt, caption) pairs of token ids to the longest."""
        lengths = np.array([len(prompt) + len(caption) for prompt, caption in rows], np.int64)
        padding = self.tokenizer.pad_token_id
        ids = np.full((len(rows), int(lengths.max())), 0 if padding is None else padding, np.int64)
        for i, (prompt, caption) in enumerate(rows):
            ids[i, : lengths[i]] = prompt + caption
        return Tokens(ids, np.array([len(prompt) for prompt, _ in rows], np.int64), lengths)

    def first_tokens(self, text: str, count: int) -> str:
        """The text of the first `count` tokens."""
        ids = self._encode(text)
        return text if len(ids) <= count else self.tokenizer.decode(ids[:count]).strip()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, without prompt."""
        return [len(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False).input_ids] if texts else []

    def collate(self, number: int, examples: Sequence[Example]) -> Batch:
        """The chunk `number` from its examples, which all have a picture, or all a text in its stead."""
        anchors = [example.image for example in examples]
        texts = [anchor for anchor in anchors if isinstance(anchor, str)]
        assert len(texts) in (0, len(anchors)), examples[0].id
        parts = [] if texts else self.pixel_parts(anchors)
        if texts:
            image = self.texts(texts)
        else:
            image = self.images([picture.size for picture in anchors], [example.long for example in examples])
        negatives = [(owner, text) for owner, example in enumerate(examples) for text in example.negatives]
        captions = [example.short or "" for example in examples] + [text for _, text in negatives]
        named = [example.short or example.id for example in examples] + [text for _, text in negatives]
        return Batch(
            number=number,
            ids=[example.id for example in examples],
            pixels=Pixels.concatenate(parts) if parts else None,
            image=image,
            text=self.texts(captions),
            text_owners=np.array([*range(len(examples)), *(owner for owner, _ in negatives)], np.int64),
            has_short=np.array([example.short is not None for example in examples]),
            image_keys=np.array([key_of(text.encode()) for text in texts] or [part.key() for part in parts], np.int64),
            caption_keys=np.array([key_of(text.encode()) for text in named], np.int64),
        )
