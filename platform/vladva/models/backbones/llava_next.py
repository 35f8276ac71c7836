"""LLaVA-Next: images of any resolution in tiles of the vision tower's size, and no tokens for what only pads them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration
from transformers.image_processing_utils import select_best_resolution

from vladva.models.backbones.llava import EMBED_TOKENS, LORA_TARGETS, PACKED_DECODERS, hidden_states, limit_image_tokens

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from transformers import BaseImageProcessor

__all__ = [
    "EMBED_TOKENS",
    "LORA_TARGETS",
    "PACKED_DECODERS",
    "hidden_states",
    "limit_image_tokens",
    "load",
    "model_inputs",
    "num_image_tokens",
    "pixels",
]


def load(checkpoint: str, dtype: torch.dtype) -> LlavaNextForConditionalGeneration:
    """The pretrained model."""
    return LlavaNextForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)


def num_image_tokens(config: LlavaNextConfig, processor: BaseImageProcessor, size: tuple[int, int]) -> int:
    """The image as one tile, then all tiles without the rows or columns that only pad, each row with its newline."""
    width, height = size
    tile = config.vision_config.image_size
    side = tile // config.vision_config.patch_size
    resolution = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, columns = (edge // tile * side for edge in resolution)
    if width / height > columns / rows:
        rows -= (rows - int(round(height * (columns / width), 7))) // 2 * 2
    else:
        columns -= (columns - int(round(width * (rows / height), 7))) // 2 * 2
    return side * side + rows * (columns + 1)


def pixels(processor: BaseImageProcessor, image: Image) -> tuple[np.ndarray, tuple[int, int]]:
    """The image's tiles [R, 3, H, W], the first of them all of it; its own (height, width) says what is padding."""
    processed = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
    return processed["pixel_values"][0], (image.height, image.width)


def model_inputs(
    config: LlavaNextConfig, inputs: dict[str, torch.Tensor], values: torch.Tensor | None, sizes: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What the Hugging Face model takes; values [R, 3, H, W]: the tiles of all images."""
    return inputs if values is None else inputs | {"pixel_values": values, "image_sizes": sizes}
