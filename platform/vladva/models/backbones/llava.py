"""LLaVA-1.5: a CLIP vision tower, a two-layer projector and a Llama."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import LlavaConfig, LlavaForConditionalGeneration

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from transformers import BaseImageProcessor

LORA_TARGETS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
EMBED_TOKENS = "embed_tokens"
PACKED_DECODERS = ("llama", "mistral", "qwen2")


def load(checkpoint: str, dtype: torch.dtype) -> LlavaForConditionalGeneration:
    """The pretrained model."""
    return LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype)


def num_image_tokens(config: LlavaConfig, processor: BaseImageProcessor, size: tuple[int, int]) -> int:
    """Every image is resized to one square, so its size does not matter."""
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def limit_image_tokens(config: LlavaConfig, processor: BaseImageProcessor, most: int) -> None:
    """Raises ValueError: the size of the vision tower alone says how many tokens an image, or a tile of it, has."""
    raise ValueError(f"model.max_image_tokens: {config.model_type} models have no such limit; leave it out")


def pixels(processor: BaseImageProcessor, image: Image) -> tuple[np.ndarray, tuple[int, int]]:
    """The image, resized and cropped [1, 3, H, W]; its own (height, width) does not matter afterwards."""
    processed = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
    return processed["pixel_values"], (image.height, image.width)


def model_inputs(
    config: LlavaConfig, inputs: dict[str, torch.Tensor], values: torch.Tensor | None, sizes: torch.Tensor | None
) -> dict[str, torch.Tensor]:
    """What the Hugging Face model takes; values [B, 3, H, W]."""
    return inputs if values is None else inputs | {"pixel_values": values}


def hidden_states(
    model: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor], layer: int | None
) -> torch.Tensor:
    """Hidden states [B, T, D] of layer `layer` after the final norm; later layers and the LM head are not computed."""
    llava = model.model if layer is None else first_layers(model.model, layer)
    return llava(**inputs, use_cache=False).last_hidden_state


def first_layers(llava: nn.Module, layer: int) -> nn.Module:
    """A view of the model whose language model ends after `layer` layers; it shares every weight with the original."""
    short = copy.copy(llava)
    short._modules = dict(llava._modules)
    language = copy.copy(llava.language_model)
    language._modules = dict(llava.language_model._modules)
    language.layers = nn.ModuleList(llava.language_model.layers[:layer])
    language.config = copy.copy(language.config)
    language.config.num_hidden_layers = layer
    short.language_model = language
    return short
