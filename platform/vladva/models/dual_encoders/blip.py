"""BLIP's image-text contrastive head (Li et al. 2022). No image-text matching: published retrieval numbers re-rank."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vladva.models.backbones import pretrained
from vladva.models.dual_encoders import DualEncoderFamily

if TYPE_CHECKING:
    import torch
    from transformers import BlipForImageTextRetrieval

MAX_TOKENS = 35


@dataclass(frozen=True)
class Blip(DualEncoderFamily):
    """One vector an image, one a text."""

    max_words: int = 30  # of a caption; the rest is not read

    def load(self, checkpoint: str, dtype: torch.dtype) -> BlipForImageTextRetrieval:
        """The pretrained model."""
        from transformers import BlipForImageTextRetrieval

        return pretrained(BlipForImageTextRetrieval, checkpoint, dtype=dtype)

    def shape(self, config: Any) -> tuple[int, int]:
        """One vector an image."""
        return 1, config.image_text_hidden_size

    def token_ids(self, config: Any, tokenizer: Any, text: str) -> list[int]:
        """Token ids of the cleaned caption."""
        return tokenizer(clean(text, self.max_words), truncation=True, max_length=MAX_TOKENS).input_ids

    def text_vectors(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The projected state at the text's class token [B, D]."""
        return model.text_proj(model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])

    def image_vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """The projected state at the image's class token [B, D]."""
        return model.vision_proj(model.vision_model(pixel_values=pixels).last_hidden_state[:, 0])


def clean(text: str, max_words: int) -> str:
    """The caption as BLIP was trained to read it: lower case, these signs gone, spaces single, the first words."""
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split()[:max_words])


FAMILY = Blip(version=1)
