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
    generator: torch.Generator | None = None,
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
        token = choose_token(output.logits[0, -1].float(), temperature, top_p, generator)
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


LIKELY = 1024  # tokens among which `top_p` is looked for first: to sort all of a vocabulary takes ten times as long


def choose_token(
    logits: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> int:
    """The next token from logits [V]: the best at temperature 0, else drawn from the smallest set of mass `top_p`."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_p == 1:
        return int(torch.multinomial(probabilities, 1, generator=generator))
    kept, order = probabilities.topk(min(LIKELY, len(probabilities)))
    if kept.sum() < top_p:
        kept, order = probabilities.sort(descending=True)
    outside = kept.cumsum(dim=-1) - kept >= top_p
    outside[0] = False
    return int(order[torch.multinomial(kept.masked_fill(outside, 0.0), 1, generator=generator)])


def pieces(tokenizer: PreTrainedTokenizerBase, tokens: Iterable[int], stop: Sequence[str]) -> Iterator[str]:
    """Pieces of the text that the tokens make, as they come, up to the first stop string."""
    text = AnswerText(tokenizer, stop)
    for token in tokens:
        if piece := text.add(token):
            yield piece
        if text.stopped:
            return
    if piece := text.end():
        yield piece


UNFINISHED_TOKENS = 8  # that may wait for the rest of a character: more than any character has bytes


class AnswerText:
    """The text of an answer, as its tokens come: whole characters, and nothing of a stop string.

    Takes time linear in the tokens and the characters: of the tokens, only the last few are decoded again, because how
    they read can depend on those before; stop strings are matched character by character (Knuth, Morris and Pratt).
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [StopString(text) for text in stop]
        self.stopped = False  # whether a stop string has come
        self.before: list[int] = []  # tokens that are told already
        self.new: list[int] = []  # and those that may be half a character
        self.held = ""  # text that may be the beginning of a stop string
        self.begun = False

    def add(self, token: int) -> str:
        """The text that is certain now and was not before."""
        self.new.append(token)
        shown = self._decoded(self.before)
        text = self._decoded(self.before + self.new)
        if len(text) <= len(shown) or (text.endswith("\ufffd") and len(self.new) < UNFINISHED_TOKENS):
            return ""
        self.before, self.new = self.new, []
        return self._unstopped(text[len(shown) :])

    def end(self) -> str:
        """What was held back, where no more tokens come."""
        shown, text = self._decoded(self.before), self._decoded(self.before + self.new)
        self.before, self.new = [], []
        rest = self._unstopped(text[len(shown) :])
        if not self.stopped:
            rest, self.held = rest + self.held, ""
        return rest

    def _decoded(self, tokens: list[int]) -> str:
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        assert isinstance(text, str), "one row of ids is one text"
        return text

    def _unstopped(self, text: str) -> str:
        """New text, without what may begin a stop string, or up to the one that is complete."""
        if not self.begun:
            text = text.lstrip()
            self.begun = bool(text)
        known = len(self.held)
        text = self.held + text
        for end in range(known, len(text)):
            matched = max((len(stop.text) for stop in self.stops if stop.completed_by(text[end])), default=0)
            if matched:
                self.stopped, self.held = True, ""
                return text[: end + 1 - matched]
        held = max((stop.matched for stop in self.stops), default=0)
        self.held = text[len(text) - held :]
        return text[: len(text) - held]


class StopString:
    """How much of a string the text ends with, told one character at a time."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self.shorter = [0] * len(text)  # the longest proper beginning of text[: i + 1] that it also ends with
        for i in range(1, len(text)):
            self.shorter[i] = self._longer(self.shorter[i - 1], text[i])

    def _longer(self, matched: int, character: str) -> int:
        while matched and self.text[matched] != character:
            matched = self.shorter[matched - 1]
        return matched + (self.text[matched] == character)

    def completed_by(self, character: str) -> bool:
        """Whether the string is complete with this character."""
        self.matched = self._longer(self.matched, character)
        return self.matched == len(self.text)
