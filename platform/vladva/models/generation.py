"""Generation: the model's next tokens one by one, and the pieces of text that they make."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
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
    around_token: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[int]:
    """Token ids one by one, with the key-value cache, until an end-of-sequence token or `max_tokens`.

    around_token: entered while a token is computed, and not between tokens, when other callers use the model.
    """
    ends = end_tokens(model)
    cache = None
    for _ in range(max_tokens):
        with torch.inference_mode(), around_token():
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


def end_tokens(model: EmbeddingModel) -> set[int]:
    """The ids that end an answer: those of the generation config, or, where it names none, of config and tokenizer."""
    named = [getattr(model.base.generation_config, "eos_token_id", None)]
    if named == [None]:
        configs = (model.base.config, model.base.config.get_text_config())
        named = [getattr(config, "eos_token_id", None) for config in configs]
        named.append(model.preprocessor.tokenizer.eos_token_id)
    found: set[int] = set()
    for each in named:
        if each is not None:
            found |= {each} if isinstance(each, int) else set(each)
    return found


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
    text = ""
    produced: list[int] = []
    for token in tokens:
        produced.append(token)
        whole = decoded(tokenizer, produced)
        cut = min((whole.index(word) for word in stop if word in whole), default=None)
        if cut is not None:
            yield whole[len(text) : cut]
            return
        # A stop word may be half written, and so may a character of several bytes: hold those back.
        held = max((n for word in stop for n in range(1, len(word)) if whole.endswith(word[:n])), default=0)
        if not whole.endswith("\ufffd") and len(whole) - held > len(text):
            yield whole[len(text) : len(whole) - held]
            text = whole[: len(whole) - held]
    whole = decoded(tokenizer, produced)
    if len(whole) > len(text):
        yield whole[len(text) :]


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """The text of an answer's tokens."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(text, str), "one row of ids is one text"
    return text.lstrip()
