"""Qwen2.5-VL: as Qwen2-VL, with a vision tower that attends in windows."""

from __future__ import annotations

import torch
from transformers import Qwen2_5_VLForConditionalGeneration

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

PACKED_DECODERS = ("qwen2_5_vl_text",)


def load(checkpoint: str, dtype: torch.dtype) -> Qwen2_5_VLForConditionalGeneration:
    """The pretrained model."""
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)
