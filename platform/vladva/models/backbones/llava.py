"""LLaVA-1.5: a CLIP vision tower, a two-layer projector and a Llama."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vladva.models.backbones import Backbone

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class Llava(Backbone):
    """Every image is resized to one square."""

    def num_image_tokens(self, config: Any, processor: Any, size: tuple[int, int]) -> int:
        """As many as the tower has patches, whatever the size."""
        return (config.vision_config.image_size // config.vision_config.patch_size) ** 2

    def pixels(self, processor: Any, image: Image) -> tuple[np.ndarray, tuple[int, int]]:
        """The image, resized and cropped [1, 3, H, W]; its own (height, width) does not matter afterwards."""
        processed = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
        return processed["pixel_values"], (image.height, image.width)

    def model_inputs(
        self, config: Any, inputs: dict[str, torch.Tensor], values: torch.Tensor | None, sizes: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What the Hugging Face model takes; values [N, 3, H, W]."""
        return inputs if values is None else inputs | {"pixel_values": values}


BACKBONE = Llava("LlavaForConditionalGeneration", packed_decoders=("llama", "mistral", "qwen2"))
