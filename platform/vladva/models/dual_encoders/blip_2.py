"""BLIP-2's image-text contrastive head (Li et al. 2023): an image is as near as the nearest of its query tokens.

So an image has as many vectors as there are query tokens (32), and the scorer takes the largest cosine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vladva.models.backbones import pretrained
from vladva.models.dual_encoders.blip import Blip

if TYPE_CHECKING:
    import torch
    from transformers import Blip2ForImageTextRetrieval


@dataclass(frozen=True)
class Blip2(Blip):
    """Reads captions as BLIP does, with more words, and without the image tokens that the generator wants."""

    max_words: int = 50

    def load(self, checkpoint: str, dtype: torch.dtype) -> Blip2ForImageTextRetrieval:  # type: ignore[override]
        """The pretrained model."""
        from transformers import Blip2ForImageTextRetrieval

        return pretrained(Blip2ForImageTextRetrieval, checkpoint, dtype=dtype)

    def shape(self, config: Any) -> tuple[int, int]:
        """A vector of each query token."""
        return config.num_query_tokens, config.image_text_hidden_size

    def text_vectors(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The projected state at the text's class token [B, D]."""
        words = model.embeddings(input_ids=ids)
        states = model.qformer(query_embeds=words, query_length=0, attention_mask=mask).last_hidden_state
        return model.text_projection(states[:, 0].to(model.text_projection.weight.dtype))

    def image_vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """The projected states of the query tokens [B, Q, D]."""
        patches = model.vision_model(pixel_values=pixels).last_hidden_state
        seen = patches.new_ones(patches.shape[:2]).long()
        queries = model.query_tokens.expand(len(patches), -1, -1)
        states = model.qformer(query_embeds=queries, encoder_hidden_states=patches, encoder_attention_mask=seen)
        return model.vision_projection(states.last_hidden_state.to(model.vision_projection.weight.dtype))


FAMILY = Blip2(version=1)
