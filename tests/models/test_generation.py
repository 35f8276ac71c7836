"""Tokens are drawn as asked; the text of an answer is whole characters, cut at stop strings, in linear time."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from vladva.models.backbones import TINY
from vladva.models.generation import AnswerText, StopString, choose_token, pieces

TOKENIZER = AutoTokenizer.from_pretrained(TINY)


def encode(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False).input_ids


@pytest.mark.parametrize("text", ["a red circle, and a blue one.", "żółć 漢字 🎉🎉 e\u0301", "\n two\n\nlines "])
def test_pieces_make_the_text_that_the_tokenizer_makes_of_all_tokens(text: str) -> None:
    ids = encode(text)
    whole = TOKENIZER.decode(ids, skip_special_tokens=True).lstrip()
    found = list(pieces(TOKENIZER, ids, []))
    assert "".join(found) == whole
    assert not any("\ufffd" in piece for piece in found)  # no half a character
    assert len(found) > 3


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet="ab", max_size=40), st.lists(st.text(alphabet="ab", min_size=1, max_size=5), max_size=3))
def test_stop_strings_cut_where_the_first_of_them_is_complete(text: str, stops: list[str]) -> None:
    """Against a search that looks at every beginning of the text anew."""
    expected = text
    for end in range(len(text) + 1):
        ended = [stop for stop in stops if text[:end].endswith(stop)]
        if ended:
            expected = text[: end - max(map(len, ended))]
            break
    answer = AnswerText(TOKENIZER, stops)
    answer.begun = True
    found = ""
    for character in text:
        if not answer.stopped:
            piece = answer._unstopped(character)
            assert expected.startswith(found + piece)  # nothing is told that is not part of the answer
            found += piece
    if not answer.stopped:
        found += answer.held
    assert found == expected
    assert answer.stopped == (len(expected) < len(text))


def test_a_stop_string_across_tokens_is_never_told() -> None:
    ids = encode("a red circle and a blue square")
    whole = TOKENIZER.decode(ids).lstrip()
    assert "".join(pieces(TOKENIZER, ids, ["le and a b"])) == whole[: whole.index("le and a b")]
    assert "".join(pieces(TOKENIZER, ids, ["squared"])) == whole  # what was held back comes at the end


def test_time_is_linear_in_the_answer_and_in_the_stop_string() -> None:
    """Characters compared, by counting: the longest stop string that almost matches, again and again."""
    compared = 0

    class Counted(str):
        __slots__ = ()

        def __getitem__(self, index: object) -> str:
            nonlocal compared
            compared += 1
            return super().__getitem__(index)  # type: ignore[index]

    def cost(length: int) -> int:
        nonlocal compared
        stop = StopString("a" * (length // 2) + "b")
        stop.text = Counted(stop.text)
        compared = 0
        for character in "a" * length:
            assert not stop.completed_by(character)
        return compared

    assert cost(4000) < 4.5 * cost(1000)


def test_tokens_are_decoded_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []
    decode = type(TOKENIZER).decode

    def counted(self: object, ids: list[int], **options: object) -> str:
        lengths.append(len(ids))
        return decode(self, ids, **options)

    monkeypatch.setattr(type(TOKENIZER), "decode", counted)
    list(pieces(TOKENIZER, encode("a red circle " * 100), []))
    assert max(lengths) <= 4
    lengths.clear()
    byte = encode("🎉")[-1]
    list(pieces(TOKENIZER, [byte] * 200, []))  # never a whole character
    assert max(lengths) < 20


def test_draws_follow_the_probabilities_and_the_generator() -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    generator = torch.Generator().manual_seed(3)
    drawn = Counter(choose_token(logits, 1.0, 1.0, generator) for _ in range(4000))
    for token, probability in enumerate(logits.softmax(0).tolist()):
        assert drawn[token] / 4000 == pytest.approx(probability, abs=0.03)
    assert {choose_token(logits, 1.0, 0.7, generator) for _ in range(200)} == {0, 1}  # 0.64 and 0.24
    assert choose_token(logits, 0.0, 1.0) == 0
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = [choose_token(logits, 1.5, 0.95, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert first == [choose_token(logits, 1.5, 0.95, torch.Generator().manual_seed(seed)) for seed in range(20)]
    assert torch.equal(torch.get_rng_state(), state)  # the process's own random numbers are nobody's


def test_the_smallest_set_is_the_same_where_many_tokens_share_the_mass() -> None:
    flat = torch.zeros(5000)  # the likely ones alone do not hold 0.9
    drawn = {choose_token(flat, 1.0, 0.9, torch.Generator().manual_seed(seed)) for seed in range(300)}
    assert len(drawn) > 200
