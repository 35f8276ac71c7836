"""Qwen2-VL: images of any size as patches, 2 x 2 of which make a token, and a Qwen2 with positions on three axes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vladva.models.backbones import Backbone

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image


@dataclass(frozen=True)
class QwenVL(Backbone):
    """Images keep their shape and, within the processor's limits, their size."""

    def num_image_tokens(self, config: Any, processor: Any, size: tuple[int, int]) -> int:
        """As many as the image has room for, in the processor's limits. Raises ValueError for one too narrow."""
        width, height = size
        return processor.get_number_of_image_patches(height, width, {}) // config.vision_config.spatial_merge_size**2

    def limit_image_tokens(self, config: Any, processor: Any, most: int) -> None:
        """As the processor's own `max_pixels` does. Raises ValueError below the checkpoint's least number of tokens."""
        of_a_token = (processor.patch_size * config.vision_config.spatial_merge_size) ** 2
        least = -(-processor.size["shortest_edge"] // of_a_token)
        if most < least:
            raise ValueError(f"model.max_image_tokens is {most}, but the checkpoint's images have at least {least}")
        processor.size["longest_edge"] = most * of_a_token

    def pixels(self, processor: Any, image: Image) -> tuple[np.ndarray, tuple[int, int]]:
        """The image's patches [R, 3, p, p], in the order in which they are merged; how many it is high and wide."""
        # The model takes every image as a film of two equal frames: the second is made on the device.
        processed = processor(
            images=[image], do_rescale=False, do_normalize=False, temporal_patch_size=1, return_tensors="np"
        )
        patch = processor.patch_size
        _, height, width = processed["image_grid_thw"][0].tolist()
        return processed["pixel_values"].reshape(-1, 3, patch, patch), (height, width)

    def model_inputs(
        self, config: Any, inputs: dict[str, torch.Tensor], values: torch.Tensor | None, sizes: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """What the Hugging Face model takes; values [R, 3, p, p]: patches of all images, sizes [N, 2] in patches."""
        is_image_BT = inputs["input_ids"] == config.image_token_id
        if values is None or sizes is None:
            return inputs | {"position_ids": positions(is_image_BT)}
        merge = config.vision_config.spatial_merge_size
        frames = values[:, :, None].expand(-1, -1, config.vision_config.temporal_patch_size, -1, -1)
        return inputs | {
            "position_ids": positions(is_image_BT, sizes // merge, len(values) // merge**2),
            "pixel_values": frames.flatten(1),
            "image_grid_thw": torch.cat([torch.ones_like(sizes[:, :1]), sizes], dim=1),
        }


def positions(is_image_BT: torch.Tensor, grids_N2: torch.Tensor | None = None, num_tokens: int = 0) -> torch.Tensor:
    """Positions [3, B, T] on the axes of time, height and width.

    An image's tokens are at the position where it starts, plus their row and column in its grid of `grids_N2` tokens;
    what follows goes on after the longer side. Text tokens come one after the other on all axes. The same as Hugging
    Face's `get_rope_index`, for all samples at once; with the `num_tokens` of all images, which the host knows, it
    never waits for the device.
    """
    steps_BT = torch.ones_like(is_image_BT, dtype=torch.long)
    rows_BT, columns_BT = torch.zeros_like(steps_BT), torch.zeros_like(steps_BT)
    if grids_N2 is not None:
        # Of each of the K image tokens: its image, and its number within that image.
        heights_N, widths_N = grids_N2.unbind(1)
        counts_N = heights_N * widths_N
        image_K = torch.repeat_interleave(counts_N, output_size=num_tokens)
        index_K = torch.arange(num_tokens, device=counts_N.device) - (counts_N.cumsum(0) - counts_N)[image_K]
        # Within an image no token takes a step; its last one steps over the longer side.
        is_last_K = index_K == counts_N[image_K] - 1
        steps_BT.masked_scatter_(is_image_BT, is_last_K * torch.maximum(heights_N, widths_N)[image_K])
        rows_BT.masked_scatter_(is_image_BT, index_K // widths_N[image_K])
        columns_BT.masked_scatter_(is_image_BT, index_K % widths_N[image_K])
    # A token starts where the steps of all tokens before it add up to.
    starts_BT = steps_BT.cumsum(1) - steps_BT
    return torch.stack([starts_BT, starts_BT + rows_BT, starts_BT + columns_BT])


BACKBONE = QwenVL("Qwen2VLForConditionalGeneration", packed_decoders=("qwen2_vl_text",))
