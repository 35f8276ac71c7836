"""Embedder: a loaded LVLM with its adapter and soft prompts, for use: it embeds images and texts, and it generates.

N images or texts, D width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vladva.config import ModelConfig
from vladva.core.hashing import key_of
from vladva.core.item_content import ItemContent
from vladva.core.model_description import ModelDescription
from vladva.models.adapter import AdapterSwitch, load_adapter
from vladva.models.batch import as_tensors, cut
from vladva.models.dual_encoder_embedder import DualEncoder
from vladva.models.dual_encoders import is_dual_encoder
from vladva.models.embedding_model import EmbeddingModel
from vladva.models.fingerprint import describe_lvlm
from vladva.models.generation import decode, pieces
from vladva.models.interface import Embeds
from vladva.models.packed.inference import Forward, embedding_forward
from vladva.models.preprocessor import Preprocessor
from vladva.models.resolve import check_exported_tokens, config_of, find_model

if TYPE_CHECKING:
    from PIL import Image


def load_embedder(
    model: str,
    *,
    adapter: bool = True,
    merge: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    layer: int | None = None,
) -> Embeds:
    """Load what `find_model` resolves. `adapter=False` is the base model, zero-shot; `merge` folds the adapter in.

    `layer` embeds from another layer than the model's own. What only LVLMs can do, `load_lvlm` gives, or
    `isinstance(found, Generates)` tells.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of reading weights from the disk; downloads keep theirs
    reference = find_model(model)
    if is_dual_encoder(reference.checkpoint):
        return DualEncoder(reference.checkpoint, dtype=dtype, device=device)
    folder = reference.adapter if adapter else None
    config = config_of(reference, folder, dtype)
    if layer is not None:
        config = replace(config, layer=layer)
    preprocessor = Preprocessor.of(config)
    if reference.note:
        check_exported_tokens(reference.note.parent, preprocessor)
    embedding_model = EmbeddingModel(config, preprocessor, device=device)
    if folder:
        load_adapter(embedding_model, folder)
        if merge:
            embedding_model.lvlm = embedding_model.lvlm.merge_and_unload()
    return Embedder(embedding_model.to(device).eval(), config, folder, merged=merge)


def load_lvlm(
    model: str,
    *,
    adapter: bool = True,
    merge: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
    layer: int | None = None,
) -> Embedder:
    """As `load_embedder`, of a model that also generates. Raises ValueError for a dual encoder, which does not."""
    found = load_embedder(model, adapter=adapter, merge=merge, dtype=dtype, device=device, layer=layer)
    if not isinstance(found, Embedder):
        raise ValueError(f"{model} is a dual encoder: it embeds, and generates nothing; name an LVLM")
    return found


class Embedder:
    """Embeds texts and images, and generates, with one loaded model."""

    def __init__(self, model: EmbeddingModel, config: ModelConfig, adapter: Path | None, *, merged: bool) -> None:
        self.model = model
        self.preprocessor = model.preprocessor
        self.config = config
        self.adapter = adapter
        self.merged = merged
        self.device: torch.device = model.pixel_mean.device
        self._description = describe_lvlm(config, adapter, None, self.preprocessor)
        self.dimension: int = self._description["dimension"]
        self.layer = self._description["layer"]
        self.fingerprint: str = self._description["fingerprint"]

    @cached_property
    def forward(self) -> Forward:
        """Tokens, pixels -> unit vectors [B, D]. Made when first asked for: to chat, a model needs none."""
        return embedding_forward(self.model)

    @cached_property
    def adapter_switch(self) -> AdapterSwitch:
        """Turns the adapter off for a moment."""
        return AdapterSwitch(self.model.lvlm)

    def description(self) -> ModelDescription:
        """What tables and indexes made with this embedder carry."""
        return self._description

    def count_text_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that embedding each text costs, prompt included."""
        return [len(self.preprocessor.text_prompt(text)) for text in texts]

    def num_image_tokens(self, width: int, height: int) -> int:
        """Tokens that embedding an image costs, prompt included."""
        return len(self.preprocessor.image_prompt((width, height)))

    def count_item_tokens(self, item: ItemContent) -> int:
        """Tokens that embedding an item costs, prompt included. Raises ValueError for more than the model takes."""
        return len(self.item_prompt(item))

    def item_prompt(self, item: ItemContent) -> list[int]:
        """Token ids that ask for an item's embedding. Raises ValueError for more than the model takes."""
        ids = self.preprocessor.item_prompt(item.text, item.size, item.instruction)
        context: int = self.preprocessor.config.get_text_config().max_position_embeddings
        if len(ids) > context:
            raise ValueError(f"the item takes {len(ids):,} tokens with its prompt; the model takes {context:,}")
        return ids

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32. Equal texts are embedded once; those of like length share a batch."""
        unique = list(dict.fromkeys(texts))
        row = {text: i for i, text in enumerate(unique)}
        return self.embed([self.preprocessor.text_prompt(text) for text in unique], None, batch_size)[
            [row[text] for text in texts]
        ]

    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32. Equal images are embedded once."""
        keys = [key_of(f"{image.mode} {image.size}".encode() + image.tobytes()) for image in images]
        unique = dict(zip(keys, images, strict=True))
        row = {key: i for i, key in enumerate(unique)}
        prompts = [self.preprocessor.image_prompt(image.size) for image in unique.values()]
        return self.embed(prompts, list(unique.values()), batch_size)[[row[key] for key in keys]]

    def embed_items(self, items: Sequence[ItemContent], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32, one of each item. Raises ValueError for more than the model takes."""
        embeddings_ND = np.zeros((len(items), self.dimension), np.float32)
        prompts = [self.item_prompt(item) for item in items]
        images = {i: item.image for i, item in enumerate(items) if item.image is not None}
        words = [i for i in range(len(items)) if i not in images]
        embeddings_ND[words] = self.embed([prompts[i] for i in words], None, batch_size)
        embeddings_ND[list(images)] = self.embed([prompts[i] for i in images], list(images.values()), batch_size)
        return embeddings_ND

    @torch.inference_mode()
    def embed(
        self, prompts: Sequence[list[int]], images: Sequence[Image.Image] | None = None, batch_size: int = 64
    ) -> np.ndarray:
        """Unit vectors [N, D], float32, of prompts and the images in them; batches are cut by what they cost."""
        embeddings_ND = np.zeros((len(prompts), self.dimension), np.float32)
        for chosen in cut([len(prompt) for prompt in prompts], batch_size):
            tokens = as_tensors(self.preprocessor.pad([(prompts[i], []) for i in chosen]), self.device)
            pixels = None
            if images is not None:
                pixels = as_tensors(self.preprocessor.pixels([images[i] for i in chosen]), self.device)
            embeddings_ND[chosen] = self.forward(tokens, pixels).cpu().numpy()
        return embeddings_ND

    def generate(
        self,
        messages: list[dict[str, Any]],
        images: Sequence[Image.Image] = (),
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        adapter: bool = False,
    ) -> Iterator[str]:
        """Pieces of the assistant's answer, as they come. Greedy when the temperature is 0.

        `messages` are in Hugging Face's chat form (content: a list of {"type": "text", "text"} and {"type": "image"}).
        Raises ValueError where images and image parts differ in number, or the adapter is merged and asked off.
        """
        parts = sum(
            part.get("type") == "image" for m in messages if isinstance(m["content"], list) for part in m["content"]
        )
        if parts != len(images):
            raise ValueError(f"messages hold {parts} image parts, but {len(images)} images came with them")
        if self.merged and not adapter:
            raise ValueError("this model's adapter is merged into its weights; load it with merge=False to turn it off")
        generator = None if seed is None else torch.Generator(self.device).manual_seed(seed)
        ids = self.preprocessor.render(messages, [image.size for image in images])
        tokens = as_tensors(self.preprocessor.pad([(ids, [])]), self.device)
        pixels = as_tensors(self.preprocessor.pixels(images), self.device) if images else None
        inputs = self.model.inputs(tokens, pixels)
        off = self.adapter is not None and not adapter and not self.merged
        around_token = self.adapter_switch.off if off else nullcontext
        tokens_out = decode(
            self.model, inputs, max_tokens, temperature, top_p, generator=generator, around_token=around_token
        )
        yield from pieces(self.preprocessor.tokenizer, tokens_out, stop)
