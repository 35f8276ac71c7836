"""Towers: the vision tower of a model as the packed forwards run it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vladva.models.packed.clip_tower import with_packed_clip_tower
from vladva.models.packed.qwen_tower import PackedQwenTower, is_qwen_tower, with_packed_qwen_tower

TEXT_INPUTS = ("input_ids", "attention_mask", "position_ids")  # of a Hugging Face model; the others are of images


def with_packed_tower(model: Any, *, keep_plain: bool = True) -> Any:
    """A view of a model of transformers with a packed vision tower; one with another kind of tower as it is.

    keep_plain: whether the model still has the weights that the view keeps in another layout.
    """
    if model.config.vision_config.model_type == "clip_vision_model":
        return with_packed_clip_tower(model, keep_plain=keep_plain)
    return with_packed_qwen_tower(model) if is_qwen_tower(model) else model


def image_features(vision: Any, inputs: dict[str, Tensor], pixels: dict[str, Tensor]) -> Tensor:
    """Features [K, D] of the K image tokens of all images.

    vision: what `with_packed_tower` gave. inputs: what a Hugging Face model takes. pixels: the record they are from;
    with sizes that are on the host, too, nothing has to wait for the device to tell them.
    """
    of_images = {name: value for name, value in inputs.items() if name not in TEXT_INPUTS}
    sizes = pixels.get("host_sizes")
    if sizes is not None and "image_sizes" in of_images:
        of_images["image_sizes"] = sizes
    if sizes is not None and isinstance(getattr(vision, "visual", None), PackedQwenTower):
        of_images["image_grid_thw"] = torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1)
    return torch.cat(list(vision.get_image_features(**of_images).pooler_output))
