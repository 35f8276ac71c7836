"""Dual encoder: a model with a tower for texts and one for images, made to look like an `Embedder`.

The batch job, evaluation and search only ask for a preprocessor, a module that turns its batches into vectors, a
dimension and a fingerprint; so a baseline is embedded by the same machinery as an LVLM.

B images or texts, T tokens, D width, Q vectors of one image (1; BLIP-2 has one for each of its query tokens).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize

from vladva.core.item_content import ItemContent
from vladva.core.model_description import ModelDescription
from vladva.core.text import clean_text
from vladva.models.backbones import checkpoint_source
from vladva.models.batch import Pixels, Tokens, as_tensors, pad_right, pixel_statistics, to_uint8
from vladva.models.dual_encoders import family_name, find_family
from vladva.models.fingerprint import base_revision, displayed
from vladva.models.literal_tokenizer import LiteralTokenizer

if TYPE_CHECKING:
    from PIL import Image


ONE_OF_BOTH = "a dual encoder embeds a text or an image, not both together, and takes no instruction"


class DualPreprocessor:
    """Makes the inputs of one dual encoder. An image needs no prompt, so its row of token ids is empty."""

    def __init__(self, checkpoint: str) -> None:
        name = family_name(checkpoint)
        assert name is not None, f"{checkpoint} is no dual encoder"
        self.family_name, self.family = name, find_family(name)
        self.config, self.tokenizer, self.image_processor = self.family.tools(checkpoint)
        self.vectors, self.dimension = self.family.shape(self.config)
        self.literal = LiteralTokenizer(self.tokenizer)

    def text_prompt(self, text: str) -> list[int]:
        """Token ids of a text, cut where the model's context ends; nothing in it acts as a special token."""
        return self.family.token_ids(self.config, *self.literal.alone(clean_text(text)))

    def image_prompt(self, size: tuple[int, int]) -> list[int]:
        """Nothing is asked of an image."""
        return []

    def item_prompt(
        self, text: str | None = None, size: tuple[int, int] | None = None, instruction: str | None = None
    ) -> list[int]:
        """Those of a text, or none of an image. Raises ValueError for both together, and for an instruction."""
        if instruction or (text is None) == (size is None):
            raise ValueError(ONE_OF_BOTH)
        return [] if text is None else self.text_prompt(text)

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, its beginning and end included."""
        return [len(self.text_prompt(text)) for text in texts]

    def pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """Images resized and cropped as the model wants them, uint8 [B, 3, H, W]."""
        processed = self.image_processor(images=list(images), do_rescale=False, do_normalize=False, return_tensors="np")
        values = to_uint8(np.asarray(processed["pixel_values"]))
        return Pixels(values, np.array([(image.height, image.width) for image in images], np.int64))

    def pad(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tokens:
        """Right-pad (text, nothing) pairs of token ids to the longest."""
        return pad_right(rows, self.tokenizer.pad_token_id)

    def texts(self, texts: Sequence[str]) -> Tokens:
        """Texts, padded together."""
        return self.pad([(self.text_prompt(text), []) for text in texts])


class DualEncoderModel(nn.Module):
    """Both towers."""

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(self, checkpoint: str, preprocessor: DualPreprocessor, dtype: str) -> None:
        super().__init__()
        self.family, self.dtype = preprocessor.family, getattr(torch, dtype)
        self.towers: Any = self.family.load(checkpoint, self.dtype)
        mean, std = pixel_statistics(preprocessor.image_processor)
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Vectors of texts [B, D], or of images [B, Q * D]: float32, each of unit length. uint8 pixels."""
        if pixels is None:
            positions = torch.arange(tokens["ids"].shape[1], device=tokens["ids"].device)
            mask = (positions < tokens["lengths"][:, None]).long()
            vectors = self.family.text_vectors(self.towers, tokens["ids"], mask)
        else:
            values = (pixels["values"].float() - self.pixel_mean) / self.pixel_std
            vectors = self.family.image_vectors(self.towers, values.to(self.dtype))
        return normalize(vectors.float(), dim=-1).flatten(1)


class DualEncoder:
    """Embeds texts and images with one loaded dual encoder; the part of `Embedder` that makes sense for it."""

    def __init__(self, checkpoint: str, *, dtype: str = "float32", device: str = "cpu") -> None:
        self.preprocessor = DualPreprocessor(checkpoint)
        self.model = DualEncoderModel(checkpoint, self.preprocessor, dtype).to(device).eval()
        self.device: torch.device = self.model.pixel_mean.device
        self.dimension = self.preprocessor.dimension
        self._description = describe_dual_encoder(checkpoint, dtype)
        self.fingerprint: str = self._description["fingerprint"]

    def forward(self, tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Unit vectors of texts [B, D], or of images [B, Q * D]."""
        return self.model(tokens, pixels)

    def count_text_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text, its beginning and end included."""
        return self.preprocessor.count_tokens(texts)

    def num_image_tokens(self, width: int, height: int) -> int:
        """Tokens that the vision tower makes of an image, whatever its size."""
        return self.preprocessor.family.num_image_tokens(self.preprocessor.config)

    def count_item_tokens(self, item: ItemContent) -> int:
        """Tokens of a text or an image. Raises ValueError for both together, and for an instruction."""
        ids = self.preprocessor.item_prompt(item.text, item.size, item.instruction)
        return self.num_image_tokens(*item.size) if item.size else len(ids)

    def description(self) -> ModelDescription:
        """What tables made with this model carry."""
        return self._description

    @torch.inference_mode()
    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32."""
        parts = [np.zeros((0, self.dimension), np.float32)]
        for first in range(0, len(texts), batch_size):
            tokens = as_tensors(self.preprocessor.texts(texts[first : first + batch_size]), self.device)
            parts.append(self.model(tokens).cpu().numpy())
        return np.concatenate(parts)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32; [N, Q, D] where an image has several."""
        vectors = self.preprocessor.vectors
        parts = [np.zeros((0, vectors * self.dimension), np.float32)]
        for first in range(0, len(images), batch_size):
            pixels = as_tensors(self.preprocessor.pixels(images[first : first + batch_size]), self.device)
            parts.append(self.model({}, pixels).cpu().numpy())
        rows = np.concatenate(parts)
        return rows if vectors == 1 else rows.reshape(len(rows), vectors, self.dimension)

    def embed_items(self, items: Sequence[ItemContent], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32. Raises ValueError for both kinds together, and where an image has several."""
        if self.preprocessor.vectors > 1:
            raise ValueError("the model gives an image several vectors, and a text one: embed them separately")
        for item in items:
            self.count_item_tokens(item)
        vectors_ND = np.zeros((len(items), self.dimension), np.float32)
        texts = {i: item.text for i, item in enumerate(items) if item.text is not None}
        images = {i: item.image for i, item in enumerate(items) if item.image is not None}
        vectors_ND[list(texts)] = self.embed_texts(list(texts.values()), batch_size)
        vectors_ND[list(images)] = self.embed_images(list(images.values()), batch_size)
        return vectors_ND


def describe_dual_encoder(checkpoint: str, dtype: str) -> ModelDescription:
    """`DualEncoder.description`, without loading weights."""
    preprocessor = DualPreprocessor(checkpoint)
    family = preprocessor.family
    parts = {
        "base": family.revision(checkpoint) or base_revision(checkpoint),
        "family": [preprocessor.family_name, family.version],
        "pixels": json.loads(preprocessor.image_processor.to_json_string()),
    }
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
    description: ModelDescription = {
        "base_model": displayed(checkpoint),
        "adapter": None,
        "image_prompt": "",
        "text_prompt": "",
        "soft_prompts": False,
        "layer": None,
        "dimension": preprocessor.dimension,
        "vectors_per_image": preprocessor.vectors,
        "dtype": dtype,
        "fingerprint": digest.hexdigest()[:16],
    }
    revision = checkpoint_source(checkpoint).revision
    return description if revision is None else {**description, "revision": revision}
