"""BLIP-2's image-text contrastive head (Li et al. 2023): an image is as near as the nearest of its query tokens.

So an image has as many vectors as there are query tokens (32), and the scorer takes the largest cosine.
"""

from __future__ import annotations

import torch
from transformers import Blip2Config, Blip2ForImageTextRetrieval, PreTrainedTokenizerBase

from vladva.models.dual_encoders import pretrained_tools as tools
from vladva.models.dual_encoders.blip import MAX_TOKENS, clean

__all__ = ["image_vectors", "load", "shape", "text_vectors", "token_ids", "tools"]

MAX_WORDS = 50


def load(checkpoint: str, dtype: torch.dtype) -> Blip2ForImageTextRetrieval:
    """The pretrained model."""
    return Blip2ForImageTextRetrieval.from_pretrained(checkpoint, dtype=dtype)


def shape(config: Blip2Config) -> tuple[int, int]:
    """A vector of each query token."""
    return config.num_query_tokens, config.image_text_hidden_size


def token_ids(config: Blip2Config, tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of the cleaned caption, without the image tokens that the generator wants."""
    return tokenizer(clean(text, MAX_WORDS), truncation=True, max_length=MAX_TOKENS).input_ids


def text_vectors(model: Blip2ForImageTextRetrieval, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The projected state at the text's class token [B, D]."""
    words = model.embeddings(input_ids=ids)
    states = model.qformer(query_embeds=words, query_length=0, attention_mask=mask).last_hidden_state
    return model.text_projection(states[:, 0].to(model.text_projection.weight.dtype))


def image_vectors(model: Blip2ForImageTextRetrieval, pixels: torch.Tensor) -> torch.Tensor:
    """The projected states of the query tokens [B, Q, D]."""
    patches = model.vision_model(pixel_values=pixels).last_hidden_state
    seen = torch.ones(patches.shape[:2], dtype=torch.long, device=patches.device)
    queries = model.query_tokens.expand(len(patches), -1, -1)
    states = model.qformer(query_embeds=queries, encoder_hidden_states=patches, encoder_attention_mask=seen)
    return model.vision_projection(states.last_hidden_state.to(model.vision_projection.weight.dtype))
