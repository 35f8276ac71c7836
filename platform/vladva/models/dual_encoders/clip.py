"""CLIP and whatever was saved as one: OpenAI's, OpenCLIP's ViT-g and ViT-bigG (Radford et al. 2021)."""

from __future__ import annotations

import torch
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from vladva.models.dual_encoders import pretrained_tools as tools

__all__ = ["image_vectors", "load", "shape", "text_vectors", "token_ids", "tools"]


def load(checkpoint: str, dtype: torch.dtype) -> CLIPModel:
    """The pretrained model."""
    return CLIPModel.from_pretrained(checkpoint, dtype=dtype)


def shape(config: CLIPConfig) -> tuple[int, int]:
    """One vector an image."""
    return 1, config.projection_dim


def token_ids(config: CLIPConfig, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids, the end token kept where the text is cut (77 tokens)."""
    return tokenizer(text, truncation=True, max_length=config.text_config.max_position_embeddings).input_ids


def text_vectors(model: CLIPModel, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The projected state at the end token [B, D]."""
    return model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output


def image_vectors(model: CLIPModel, pixels: torch.Tensor) -> torch.Tensor:
    """The projected class token [B, D]."""
    return model.get_image_features(pixel_values=pixels).pooler_output
