"""Qwen3-VL: as Qwen2-VL, with features of several vision layers added to the first layers of the language model."""

from __future__ import annotations

import torch
from transformers import Qwen3VLForConditionalGeneration

from vladva.models.backbones.qwen2_vl import (
    EMBED_TOKENS,
    LORA_TARGETS,
    hidden_states,
    limit_image_tokens,
    model_inputs,
    num_image_tokens,
    pixels,
)

__all__ = [
    "EMBED_TOKENS",
    "LORA_TARGETS",
    "hidden_states",
    "limit_image_tokens",
    "load",
    "model_inputs",
    "num_image_tokens",
    "pixels",
]

PACKED_DECODERS = ()  # features of the vision tower go into several layers


def load(checkpoint: str, dtype: torch.dtype) -> Qwen3VLForConditionalGeneration:
    """The pretrained model."""
    return Qwen3VLForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
