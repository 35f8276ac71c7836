"""CLIP and whatever was saved as one: OpenAI's, OpenCLIP's ViT-g and ViT-bigG (Radford et al. 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vladva.models.backbones import pretrained
from vladva.models.dual_encoders import DualEncoderFamily

if TYPE_CHECKING:
    import torch
    from transformers import CLIPModel


@dataclass(frozen=True)
class Clip(DualEncoderFamily):
    """One vector an image, one a text."""

    def load(self, checkpoint: str, dtype: torch.dtype) -> CLIPModel:
        """The pretrained model."""
        from transformers import CLIPModel

        return pretrained(CLIPModel, checkpoint, dtype=dtype)

    def shape(self, config: Any) -> tuple[int, int]:
        """One vector an image."""
        return 1, config.projection_dim

    def token_ids(self, config: Any, tokenizer: Any, text: str) -> list[int]:
        """Token ids, the end token kept where the text is cut (77 tokens)."""
        return tokenizer(text, truncation=True, max_length=config.text_config.max_position_embeddings).input_ids

    def text_vectors(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The projected state at the end token [B, D]."""
        return model.get_text_features(input_ids=ids, attention_mask=mask).pooler_output

    def image_vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """The projected class token [B, D]."""
        return model.get_image_features(pixel_values=pixels).pooler_output


FAMILY = Clip(version=1)
