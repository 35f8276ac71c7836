"""BLIP's image-text contrastive head (Li et al. 2022). No image-text matching: published retrieval numbers re-rank."""

from __future__ import annotations

import re

import torch
from transformers import BlipConfig, BlipForImageTextRetrieval, PreTrainedTokenizerBase

from vladva.models.dual_encoders import pretrained_tools as tools

__all__ = ["clean", "image_vectors", "load", "shape", "text_vectors", "token_ids", "tools"]

MAX_TOKENS = 35
MAX_WORDS = 30


def load(checkpoint: str, dtype: torch.dtype) -> BlipForImageTextRetrieval:
    """The pretrained model."""
    return BlipForImageTextRetrieval.from_pretrained(checkpoint, dtype=dtype)


def shape(config: BlipConfig) -> tuple[int, int]:
    """One vector an image."""
    return 1, config.image_text_hidden_size


def clean(text: str, max_words: int = MAX_WORDS) -> str:
    """The caption as BLIP was trained to read it: lower case, these signs gone, spaces single, the first words."""
    return " ".join(re.sub(r"[.!\"()*#:;~]", " ", text.lower()).split()[:max_words])


def token_ids(config: BlipConfig, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the cleaned caption."""
    return tokenizer(clean(text), truncation=True, max_length=MAX_TOKENS).input_ids


def text_vectors(model: BlipForImageTextRetrieval, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The projected state at the text's class token [B, D]."""
    return model.text_proj(model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state[:, 0])


def image_vectors(model: BlipForImageTextRetrieval, pixels: torch.Tensor) -> torch.Tensor:
    """The projected state at the image's class token [B, D]."""
    return model.vision_proj(model.vision_model(pixel_values=pixels).last_hidden_state[:, 0])
