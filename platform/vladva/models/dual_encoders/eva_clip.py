"""EVA-CLIP of 8 and 18 billion parameters (Sun et al. 2024), through the code that lies with its checkpoints.

That code is BAAI's, not transformers': it is run because the checkpoint was asked for by name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vladva.models.backbones import pretrained
from vladva.models.dual_encoders import Tools
from vladva.models.dual_encoders.clip import Clip

if TYPE_CHECKING:
    import torch

SIDE = 224  # no image processor lies with the checkpoints


@dataclass(frozen=True)
class EvaClip(Clip):
    """Reads texts and images as CLIP does."""

    def tools(self, checkpoint: str) -> Tools:
        """Configuration, CLIP's tokenizer, and CLIP's image processor at 224 pixels."""
        from transformers import AutoConfig, CLIPImageProcessor, CLIPTokenizer

        crop, size = {"height": SIDE, "width": SIDE}, {"shortest_edge": SIDE}
        config = pretrained(AutoConfig, checkpoint)
        processor = CLIPImageProcessor(size=size, crop_size=crop)
        return Tools(config, pretrained(CLIPTokenizer, checkpoint), processor)

    def load(self, checkpoint: str, dtype: torch.dtype) -> Any:
        """The pretrained model."""
        from transformers import AutoModel

        return pretrained(AutoModel, checkpoint, dtype=dtype, trust_remote_code=True)

    def text_vectors(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The text tower's vectors [B, D]."""
        return model.encode_text(ids)

    def image_vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """The vision tower's vectors [B, D]."""
        return model.encode_image(pixels)


FAMILY = EvaClip(version=1)
