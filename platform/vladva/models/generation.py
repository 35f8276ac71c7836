"""Generation: the model's next tokens one by one, and the pieces of text that they make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from vladva.models.embedding_model import EmbeddingModel


def decode(
    model: EmbeddingModel,
    inputs: dict[str, torch.Tensor],
    max_tokens: int,
    temperature: float,
    top_p: float,
    *,
    adapter_off: bool,
) -> Iterator[int]:
    """Token ids one by one, with the key-value cache, until the end-of-sequence token."""
    ends = model.base.generation_config.eos_token_id
    ends = {ends} if isinstance(ends, int) else set(ends)
    cache = None
    for _ in range(max_tokens):
        # The adapter is off only while a token is computed, so that other callers never see it off.
        with torch.inference_mode(), model.lvlm.disable_adapter() if adapter_off else nullcontext():
            output = model.base(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = output.past_key_values
        token = choose_token(output.logits[0, -1].float(), temperature, top_p)
        if token in ends:
            return
        yield token
        mask, positions = inputs["attention_mask"], inputs.get("position_ids")
        inputs = {
            "input_ids": torch.tensor([[token]], device=mask.device),
            "attention_mask": torch.cat([mask, mask.new_ones(1, 1)], dim=1),
        }
        if positions is not None:  # [3, 1, T]: where an image takes fewer positions than it has tokens
            inputs["position_ids"] = positions.amax().expand(3, 1, 1) + 1


def choose_token(logits: torch.Tensor, temperature: float, top_p: float) -> int:
    """The next token from logits [V]: the best at temperature 0, else drawn from the smallest set of mass `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(dim=-1).sort(descending=True)
    outside = probabilities.cumsum(dim=-1) - probabilities >= top_p
    outside[0] = False
    return int(order[torch.multinomial(probabilities.masked_fill(outside, 0.0), 1)])


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int], stop: Sequence[str]) -> Iterator[str]:
    """Pieces of the text that the tokens make, as they come, up to the first stop word."""
    text, produced = "", []
    for token in tokens:
        produced.append(token)
        whole = tokenizer.decode(produced, skip_special_tokens=True).lstrip()
        cut = min((whole.index(word) for word in stop if word in whole), default=None)
        if cut is not None:
            yield whole[len(text) : cut]
            return
        # A stop word may be half written, and so may a character of several bytes: hold those back.
        held = max((n for word in stop for n in range(1, len(word)) if whole.endswith(word[:n])), default=0)
        if not whole.endswith("\ufffd") and len(whole) - held > len(text):
            yield whole[len(text) : len(whole) - held]
            text = whole[: len(whole) - held]
    whole = tokenizer.decode(produced, skip_special_tokens=True).lstrip()
    if len(whole) > len(text):
        yield whole[len(text) :]
