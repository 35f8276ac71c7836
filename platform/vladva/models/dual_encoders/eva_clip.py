"""EVA-CLIP of 8 and 18 billion parameters (Sun et al. 2024), through the code that lies with its checkpoints.

That code is BAAI's, not transformers': it is run because the checkpoint was asked for by name.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vladva.models.dual_encoders.clip import token_ids

__all__ = ["image_vectors", "load", "shape", "text_vectors", "token_ids", "tools"]

SIDE = 224  # no image processor lies with the checkpoints


def tools(checkpoint: str) -> tuple[Any, Any, Any]:
    """Configuration, CLIP's tokenizer, and CLIP's image processor at 224 pixels."""
    from transformers import AutoConfig, CLIPImageProcessor, CLIPTokenizer

    crop, size = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
    config = AutoConfig.from_pretrained(checkpoint)
    return config, CLIPTokenizer.from_pretrained(checkpoint), CLIPImageProcessor(size=size, crop_size=crop)


def load(checkpoint: str, dtype: torch.dtype) -> nn.Module:
    """The pretrained model."""
    from transformers import AutoModel

    return AutoModel.from_pretrained(checkpoint, dtype=dtype, trust_remote_code=True)


def shape(config: Any) -> tuple[int, int]:
    """One vector an image."""
    return 1, config.projection_dim


def text_vectors(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The text tower's vectors [B, D]."""
    return model.encode_text(ids)


def image_vectors(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The vision tower's vectors [B, D]."""
    return model.encode_image(pixels)
