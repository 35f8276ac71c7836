"""LLaVA-Next: images of any resolution in tiles of the vision tower's size, and no tokens for what only pads them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers.image_processing_utils import select_best_resolution

from vladva.models.backbones import Backbone, llava

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class LlavaNext(Backbone):
    """The image as one tile, then all tiles of the resolution that suits it best."""

    def num_image_tokens(self, config: Any, processor: Any, size: tuple[int, int]) -> int:
        """The image as one tile, then all tiles without the rows or columns that only pad, each row with a newline."""
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

    def pixels(self, processor: Any, image: Image) -> tuple[np.ndarray, tuple[int, int]]:
        """The image's tiles [R, 3, H, W], the first of them all of it; its own (height, width) says what is padding."""
        processed = processor(images=[image], do_rescale=False, do_normalize=False, return_tensors="np")
        return processed["pixel_values"][0], (image.height, image.width)

    def model_inputs(
        self, config: Any, inputs: dict[str, torch.Tensor], values: torch.Tensor | None, sizes: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What the Hugging Face model takes; values [R, 3, H, W]: the tiles of all images."""
        if values is None or sizes is None:
            return inputs
        return inputs | {"pixel_values": values, "image_sizes": sizes}


BACKBONE = LlavaNext("LlavaNextForConditionalGeneration", packed_decoders=llava.BACKBONE.packed_decoders)
