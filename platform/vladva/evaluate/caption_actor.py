"""CaptionActor: images -> what a model writes about them. The actor that holds the model."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa

from vladva.core.devices import assigned_device
from vladva.core.storage import write_json
from vladva.data.image_refs import ImageRef, read_images

CAPTION_PROMPTS = (
    "Give a detailed description of the image.",
    "Describe the image briefly.",
    "Describe the image very briefly.",
    "Provide a concise description of this image.",
)


class CaptionActor:
    """Ray Data stage: rows of (image: JSON of an ImageRef, uri) -> the captions, written to uri."""

    def __init__(self, load: dict[str, Any], max_tokens: int) -> None:
        device = assigned_device()

        from vladva.models.embedder import load_lvlm

        self.embedder = load_lvlm(**load, device=device)
        self.max_tokens = max_tokens

    def __call__(self, rows: pa.Table) -> pa.Table:
        """The uris that were written."""
        for row in rows.to_pylist():
            write_json(row["uri"], self.captions_of(ImageRef(**json.loads(row["image"]))))
        return rows.select(["uri"])

    def captions_of(self, ref: ImageRef) -> list[dict[str, Any]]:
        """One caption for each prompt, with its number of tokens."""
        from vladva.core.images import decode_image

        [data] = read_images([ref])
        image, tokenizer = decode_image(data), self.embedder.preprocessor.tokenizer
        captions = []
        for prompt in CAPTION_PROMPTS:
            messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": prompt}]}]
            pieces = self.embedder.generate(messages, [image], max_tokens=self.max_tokens, adapter=True)
            caption = "".join(pieces).strip()
            tokens = len(tokenizer.encode(caption, add_special_tokens=False))
            captions.append({"prompt": prompt, "caption": caption, "tokens": tokens})
        return captions
