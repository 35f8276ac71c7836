"""Preprocessor: images and texts -> token ids and pixels, as the checkpoint's own processor gives them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from vladva.config import IMAGE_PROMPT, TEXT_PROMPT, ModelConfig
from vladva.core.hashing import key_of
from vladva.core.item_content import ItemContent
from vladva.core.text import clean_characters, clean_text
from vladva.data.examples import Example
from vladva.models.backbones import backbone_of, checkpoint_file, pretrained
from vladva.models.batch import MicroBatch, Pixels, Tokens, pad_right, pixel_statistics, to_uint8
from vladva.models.literal_tokenizer import MARK, LiteralTokenizer

if TYPE_CHECKING:
    from PIL import Image


Side = Literal["image", "text"]


class Preprocessor:
    """Makes the inputs of one model from images and texts. Loads tokenizer and image processor, never weights.

    Special tokens come from the template and the hand-written prompts alone: in captions, queries and conversations
    they are text like any other.
    """

    def __init__(
        self,
        checkpoint: str,
        *,
        image_prompt: str = IMAGE_PROMPT,
        text_prompt: str = TEXT_PROMPT,
        soft_prompts: bool = False,
        max_image_tokens: int | None = None,
        chat_template: str = "",
    ) -> None:
        """Raises ValueError where the family, or the checkpoint, has no such limit on an image's tokens."""
        from transformers import AutoConfig, AutoTokenizer

        # By its short name, older versions give it only where torchvision is installed.
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        self.backbone = backbone_of(checkpoint)
        self.config = pretrained(AutoConfig, checkpoint)
        tokenizer: Any = pretrained(AutoTokenizer, checkpoint)
        self.tokenizer = tokenizer  # any of transformers' classes
        template = checkpoint_file(checkpoint, "chat_template.json")
        if template:  # where older checkpoints keep the template with images; the tokenizer's own has none
            self.tokenizer.chat_template = json.loads(template.read_text())["chat_template"]
        if chat_template:
            self.tokenizer.chat_template = chat_template
        # The same pixels everywhere: torchvision's resizing, the default where it is installed, differs from Pillow's.
        self.image_processor = pretrained(AutoImageProcessor, checkpoint, backend="pil")
        if max_image_tokens is not None:
            self.backbone.limit_image_tokens(self.config, self.image_processor, max_image_tokens)
        self.image_token: str = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        self.prompts = {"image": image_prompt, "text": text_prompt}
        self.image_prompts: dict[int, list[int]] = {}  # by number of image tokens
        self.soft_ids: dict[str, list[int]] = {"image": [], "text": []}
        self.literal = LiteralTokenizer(self.tokenizer)
        self.prompt_ids: dict[str, list[int]] = {side: self._prompt_in_context(side) for side in ("image", "text")}
        if soft_prompts:
            for side in ("image", "text"):
                names = soft_tokens(side, len(self.prompt_ids[side]))
                self.tokenizer.add_tokens(names, special_tokens=True)
                self.soft_ids[side] = self.tokenizer.convert_tokens_to_ids(names)
                self.prompts[side] = "".join(names)
            self.literal = LiteralTokenizer(self.tokenizer)

    @classmethod
    def of(cls, config: ModelConfig) -> Preprocessor:
        """The preprocessor that a configuration asks for."""
        return cls(
            config.checkpoint,
            image_prompt=config.image_prompt,
            text_prompt=config.text_prompt,
            soft_prompts=config.soft_prompts,
            max_image_tokens=config.max_image_tokens,
            chat_template=config.chat_template,
        )

    def _prompt_in_context(self, side: Side) -> list[int]:
        """Token ids of the hand-written prompt in its place in the conversation, where no space may precede it."""

        def rendered(prompt: str) -> list[int]:
            if side == "image":
                content = [{"type": "image"}, {"type": "text", "text": prompt}]
                return self._render([{"role": "user", "content": content}], [(64, 64)])
            return self._render([{"role": "user", "content": [{"type": "text", "text": f"x\n{prompt}"}]}])

        if not self.prompts[side]:  # others' models may have none
            return []
        whole, bare = rendered(self.prompts[side]), rendered("")
        before = next(i for i, (a, b) in enumerate(zip(whole, bare, strict=False)) if a != b)
        return whole[before : len(whole) - (len(bare) - before)]

    def _encode(self, text: str) -> list[int]:
        [marked] = self.literal.mark([clean_characters(text)])
        return self.literal(marked, add_special_tokens=False)

    def render(self, messages: list[dict[str, Any]], sizes: Sequence[tuple[int, int]] = ()) -> list[int]:
        """Token ids of a conversation up to the assistant's turn; `sizes`: (width, height) of its images.

        Raises InvalidSampleError for a text that is none (half a surrogate pair).
        """
        texts = iter(self.literal.mark([clean_characters(text) for text in _texts_of(messages)]))
        return self._render([_with_texts(message, texts) for message in messages], sizes)

    def _render(self, messages: list[dict[str, Any]], sizes: Sequence[tuple[int, int]] = ()) -> list[int]:
        """The same of messages whose texts are marked already, or this project's own."""
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        pieces = text.split(self.image_token)
        assert len(pieces) == len(sizes) + 1, (len(pieces) - 1, len(sizes))
        expanded = pieces[0]
        for piece, size in zip(pieces[1:], sizes, strict=True):
            expanded += self.image_token * self.num_image_tokens(size) + piece
        # A template that writes the beginning-of-sequence token itself must not get a second one.
        bos = self.tokenizer.bos_token
        return self.literal(expanded, add_special_tokens=bos is None or not expanded.startswith(bos))

    def num_image_tokens(self, size: tuple[int, int]) -> int:
        """Image tokens of an image of (width, height). Raises ValueError for a shape that the model does not take."""
        return self.backbone.num_image_tokens(self.config, self.image_processor, size)

    def image_prompt(self, size: tuple[int, int]) -> list[int]:
        """Token ids that ask for the summary of an image of (width, height)."""
        count = self.num_image_tokens(size)
        if count not in self.image_prompts:
            self.image_prompts[count] = self._turn([], size)
        return self.image_prompts[count]

    def text_prompt(self, text: str) -> list[int]:
        """Token ids that ask for the summary of a text. Raises InvalidSampleError for half a surrogate pair."""
        return self.item_prompt(text)

    def item_prompt(
        self, text: str | None = None, size: tuple[int, int] | None = None, instruction: str | None = None
    ) -> list[int]:
        """Token ids that ask for the summary of a text, of an image of (width, height), or of both together.

        One turn of the user: the image, the instruction, the text and the prompt, the last three a line each. Where
        there is an image, the prompt is the image's. Raises ValueError for neither text nor image, and
        InvalidSampleError (a ValueError) for half a surrogate pair.
        """
        if text is None and size is None:
            raise ValueError("an item has a text, an image, or both")
        words = [asked] if (asked := clean_text(instruction or "")) else []
        words += [] if text is None else [clean_text(text)]
        return self.image_prompt(size) if size and not words else self._turn(words, size)

    def _turn(self, words: list[str], size: tuple[int, int] | None) -> list[int]:
        words = self.literal.mark(words)
        prompt = self.prompts["text" if size is None else "image"]
        lines = [*words, prompt] if prompt else words
        content: list[dict[str, str]] = [] if size is None else [{"type": "image"}]
        if lines:
            content.append({"type": "text", "text": "\n".join(lines)})
        return self._render([{"role": "user", "content": content}], [] if size is None else [size])

    def pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """Images resized and cut up as the model wants them."""
        return Pixels.concatenate(self.pixel_parts(images))

    def pixel_parts(self, images: Sequence[Image.Image]) -> list[Pixels]:
        """The same, one by one."""
        parts = []
        for image in images:
            values, size = self.backbone.pixels(self.image_processor, image)
            parts.append(Pixels(to_uint8(values), np.array([size], np.int64)))
        return parts

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation per channel, on the scale of 0 to 255."""
        return pixel_statistics(self.image_processor)

    def texts(self, texts: Sequence[str]) -> Tokens:
        """Texts with their prompt, padded together."""
        return self.pad([(self.text_prompt(text), []) for text in texts])

    def images(self, sizes: Sequence[tuple[int, int]], captions: Sequence[str | None]) -> Tokens:
        """Prompts for images of (width, height), each followed by its long caption and an end token if it has one."""
        rows = []
        for size, caption in zip(sizes, captions, strict=True):
            following = [] if caption is None else [*self._encode(caption), self.tokenizer.eos_token_id]
            rows.append((self.image_prompt(size), following))
        return self.pad(rows)

    def pad(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tokens:
        """Right-pad (prompt, caption) pairs of token ids to the longest."""
        return pad_right(rows, self.tokenizer.pad_token_id)

    def first_tokens(self, text: str, count: int) -> str:
        """The text of the first `count` tokens."""
        ids = self._encode(text)
        return text if len(ids) <= count else self.tokenizer.decode(ids[:count]).strip()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself, without prompt."""
        marked = [self.literal.mark([clean_characters(text)])[0] for text in texts]
        plain = [text for text in marked if MARK not in text]  # nearly all: encoded together
        ids = iter(self.tokenizer(plain, add_special_tokens=False).input_ids if plain else [])
        return [len(self.literal(text, add_special_tokens=False) if MARK in text else next(ids)) for text in marked]

    def collate(self, number: int, examples: Sequence[Example]) -> MicroBatch:
        """The chunk `number` from its examples, which all have an image, or all a text instead."""
        texts = [example.image for example in examples if isinstance(example.image, str)]
        images = [example.image for example in examples if not isinstance(example.image, str)]
        assert not texts or not images, examples[0].id
        parts = self.pixel_parts(images)
        positives = [example.positive or ItemContent(example.short or "") for example in examples]
        negatives = [(owner, text) for owner, example in enumerate(examples) for text in example.negatives]
        # A wrong caption is asked for as the right one would be.
        contrasted = positives + [ItemContent(text, None, positives[owner].instruction) for owner, text in negatives]
        shown = {row: item.image for row, item in enumerate(positives) if item.image is not None}
        shown_parts = dict(zip(shown, self.pixel_parts(list(shown.values())), strict=True))
        named = [
            example.short or example.id if row not in shown else f"{shown_parts[row].key()} {positives[row].text or ''}"
            for row, example in enumerate(examples)
        ]
        named += [text for _, text in negatives]
        vectors = [example.teacher for example in examples if example.teacher is not None]
        return MicroBatch(
            number=number,
            ids=[example.id for example in examples],
            pixels=Pixels.concatenate(parts) if parts else None,
            image=self.pad([self._query(example) for example in examples]),
            text=self.pad([(self.item_prompt(item.text, item.size, item.instruction), []) for item in contrasted]),
            text_owners=np.array([*range(len(examples)), *(owner for owner, _ in negatives)], np.int64),
            has_short=np.array([example.short is not None or example.positive is not None for example in examples]),
            image_keys=np.array([_query_key(example, parts, row) for row, example in enumerate(examples)], np.int64),
            caption_keys=np.array([key_of(text.encode()) for text in named], np.int64),
            teacher=np.stack(vectors) if vectors else None,
            text_pixels=Pixels.concatenate(list(shown_parts.values())) if shown else None,
        )

    def _query(self, example: Example) -> tuple[list[int], list[int]]:
        """The prompt of a pair's query, and the long caption that follows it."""
        if isinstance(example.image, str):
            return self.item_prompt(example.image, None, example.instruction), []
        following = [] if example.long is None else [*self._encode(example.long), self.tokenizer.eos_token_id]
        return self.item_prompt(example.words, example.image.size, example.instruction), following


def _query_key(example: Example, parts: Sequence[Pixels], row: int) -> int:
    """Equal for queries that are equal to the model: an image with other words is another query."""
    key = key_of(example.image.encode()) if isinstance(example.image, str) else parts[row].key()
    beside = (example.words, example.instruction)
    return key if beside == (None, None) else key_of(repr((key, *beside)).encode())


def _texts_of(messages: Sequence[dict[str, Any]]) -> Iterator[str]:
    for message in messages:
        parts = message["content"]
        yield from [parts] if isinstance(parts, str) else [part["text"] for part in parts if part["type"] == "text"]


def _with_texts(message: dict[str, Any], texts: Iterator[str]) -> dict[str, Any]:
    """The message with the next of the texts in the place of each of its own."""
    parts = message["content"]
    if isinstance(parts, str):
        return message | {"content": next(texts)}
    return message | {"content": [p | {"text": next(texts)} if p["type"] == "text" else p for p in parts]}


def soft_tokens(side: Literal["image", "text"], count: int) -> list[str]:
    """Names of the `count` soft-prompt tokens of a side."""
    return [f"<|vladva_{side}_{i}|>" for i in range(count)]
