"""Text from users is text: nothing in it acts as a special token, and ordinary text has the ids that it always had.

The tokenizers are built as those of the families are: byte-level BPE with special tokens beside the vocabulary (Qwen,
Llama 3), sentencepiece's BPE with its `▁` by normaliser or by pre-tokenizer and control tokens inside the vocabulary
and its merges (Llama), Unigram (SigLIP, T5), WordPiece (BERT), CLIP's, and the tiny model's that lowers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests.support.checkpoints import _bert_tokenizer
from tests.support.families import QWEN_TOKENS, tokenizer_of
from vladva.models.backbones import TINY
from vladva.models.literal_tokenizer import MARK, LiteralTokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789<>/|_[]:.,!?'-\n"
PIECES = [*LETTERS, "▁", "▁a", "▁r", "▁re", "▁red", "▁<", "</", "s>", "</s>", "ma", "im"]


def llama(legacy: bool, normalized: bool) -> PreTrainedTokenizerFast:
    """Llama's conversion from sentencepiece: byte fallback, and `</s>` that the merge of `</` and `s>` would make."""
    special = ["<unk>", "<s>", "</s>"]
    vocab = {
        piece: i for i, piece in enumerate(dict.fromkeys([*special, *(f"<0x{n:02X}>" for n in range(256)), *PIECES]))
    }
    merges = [("▁", "a"), ("▁", "r"), ("▁r", "e"), ("r", "e"), ("▁re", "d"), ("▁", "<"), ("<", "/"), ("s", ">")]
    merges += [("</", "s>"), ("m", "a"), ("i", "m")]
    merges = [pair for pair in merges if {*pair, "".join(pair)} <= vocab.keys()]
    if normalized:
        merges.remove(("</", "s>"))  # Llama has none, and here the template's own would come of it, too
    model = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $0", None, [("<s>", 1)])
    tokenizer.add_special_tokens([AddedToken(name, normalized=normalized, special=True) for name in special])
    tokenizer.add_special_tokens([AddedToken("<image>", normalized=False, lstrip=True, special=True), "<pad>"])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=normalized), AddedToken("   ", normalized=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def unigram() -> PreTrainedTokenizerFast:
    """Sentencepiece's Unigram, whose control tokens have the best scores; NFKC makes `</s>` of full-width signs."""
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((piece, -5.0) for piece in PIECES if piece != "</s>")]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=0))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens([AddedToken("</s>", normalized=True, special=True), "<s>", "<image>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def clip() -> Any:
    from transformers import CLIPTokenizer

    letters = [letter + end for letter in LETTERS.lower() for end in ("", "</w>")]
    names = [*dict.fromkeys(letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(names)}, merges=[])


BUILD: dict[str, Callable[[], Any]] = {
    "qwen": lambda: tokenizer_of(QWEN_TOKENS, "<|im_end|>", "<|endoftext|>", None, ""),
    "llama-3": lambda: tokenizer_of(["<|bos|>", "<|eot_id|>", "<image>"], "<|eot_id|>", "<|eot_id|>", "<|bos|>", ""),
    "llama-legacy": lambda: llama(legacy=True, normalized=False),
    "llama-legacy-normalized": lambda: llama(legacy=True, normalized=True),
    "llama-metaspace": lambda: llama(legacy=False, normalized=False),
    "unigram": unigram,
    "bert": _bert_tokenizer,
    "clip": clip,
    "tiny": lambda: AutoTokenizer.from_pretrained(TINY),
}


@lru_cache
def literal(name: str) -> LiteralTokenizer:
    return LiteralTokenizer(BUILD[name]())


def special_names(tokenizer: Any) -> list[str]:
    return [str(token) for token in tokenizer.added_tokens_decoder.values() if not str(token).isspace()]


def special_ids(tokenizer: Any) -> set[int]:
    """What may not come of a text; the unknown token may, of a sign that the vocabulary lacks."""
    unknown = tokenizer.unk_token_id
    return {i for i, token in tokenizer.added_tokens_decoder.items() if not str(token).isspace()} - {unknown}


def forced(tokenizer: LiteralTokenizer, before: str, text: str, after: str, **options: Any) -> list[int]:
    """Ids by way of the renamed copy, which ordinary text does not take by itself."""
    marked = "".join(f"{sign}{MARK}" if not sign.isspace() else sign for sign in text.replace(MARK, ""))
    return tokenizer(f"{before}{marked}{after}", **options)


ORDINARY = st.text(st.one_of(st.sampled_from("ab <>/|red\n,.!é漢▁"), st.characters(exclude_categories=("Cs", "Cc"))))


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=60, deadline=None)
@given(text=ORDINARY, alone=st.booleans(), data=st.data())
def test_ordinary_text_has_the_ids_of_the_tokenizer_itself(name: str, text: str, alone: bool, data: Any) -> None:
    """With template and special tokens before and behind, by either way: seams and all."""
    tokenizer = literal(name)
    names = special_names(tokenizer.tokenizer)
    if tokenizer._roughly.search(tokenizer._normal(text)):
        return  # not ordinary: the next test's
    around = st.sampled_from(["", " ", "\n", "USER: ", *names, *(f"{name}\n" for name in names)])
    before, after = ("", "") if alone else (data.draw(around), data.draw(around))
    if tokenizer._exactly.findall(before + text + after) != tokenizer._exactly.findall(f"{before} {after}"):
        return  # template and text make one together, which `Preprocessor` puts a line end between
    expected = tokenizer.tokenizer(before + text + after, add_special_tokens=alone).input_ids
    [marked] = tokenizer.mark([text])
    assert tokenizer(before + marked + after, add_special_tokens=alone) == expected
    assert forced(tokenizer, before, text, after, add_special_tokens=alone) == expected


@pytest.mark.parametrize("name", BUILD)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_no_special_token_comes_of_a_text(name: str, data: Any) -> None:
    tokenizer = literal(name)
    names, special = special_names(tokenizer.tokenizer), special_ids(tokenizer.tokenizer)
    wide = {sign: chr(ord(sign) + 0xFEE0) for sign in "</s>"}  # full width, which NFKC makes narrow
    name_ = st.sampled_from([*names, *(n.upper() for n in names), *("".join(wide.get(c, c) for c in n) for n in names)])
    parts = st.lists(st.one_of(name_, name_.map(lambda n: f" {n} "), ORDINARY), min_size=1, max_size=5).map("".join)
    cut = data.draw(st.integers(0, 12))
    text = data.draw(parts)
    texts = [text[:cut], text[cut:]]  # two parts of one message, which the template puts side by side
    marked = "".join(tokenizer.mark(texts))
    assert not special & set(tokenizer(marked, add_special_tokens=False)), text
    template = data.draw(st.sampled_from(names))  # the template's own still act
    own = tokenizer.tokenizer.convert_tokens_to_ids(template)
    ids = tokenizer(f"{template}{marked}\n", add_special_tokens=False)
    assert [i for i in ids if i in special] == ([own] if own in special else []), text


@pytest.mark.parametrize("name", [name for name in BUILD if name not in ("bert", "clip", "unigram", "tiny")])
def test_the_text_is_read_whole(name: str) -> None:
    """Decoded, the ids are the text again, and around special tokens of the template, too."""
    tokenizer = literal(name)
    for special in special_names(tokenizer.tokenizer):
        text = f"a{special}b {special} red"
        ids = tokenizer(tokenizer.mark([text])[0], add_special_tokens=False)
        assert tokenizer.tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
        plain = tokenizer.tokenizer(text, add_special_tokens=False).input_ids
        assert ids != plain  # negative control: to the tokenizer itself it is a special token


def test_a_tokenizer_that_cannot_be_copied_gets_a_space() -> None:
    """open_clip's own tokenizer is Python with a table `encoder`; CLIP splits such names there anyway."""

    class Words:
        encoder = {"<start_of_text>": 0, "<end_of_text>": 1, "dog": 2, "<": 3, "end_of_text>": 4}  # noqa: RUF012

        def __call__(self, text: str) -> list[int]:
            return [self.encoder[word] for word in text.split()]

    tokenizer, text = LiteralTokenizer(Words()).alone("dog <end_of_text> dog")
    assert tokenizer(text) == [2, 3, 4, 2]
    tokenizer, text = LiteralTokenizer(Words()).alone("dog < dog")
    assert text == "dog < dog"


def test_a_cut_text_keeps_its_own_end() -> None:
    tokenizer = literal("clip").tokenizer
    options = {"truncation": True, "max_length": 6}
    copy, text = literal("clip").alone("a <|endoftext|> b c d")
    ids = copy(text, **options).input_ids
    assert len(ids) == 6
    assert ids.count(tokenizer.eos_token_id) == 1
    assert ids[-1] == tokenizer.eos_token_id
    assert tokenizer("a <|endoftext|> b c d", **options).input_ids.count(tokenizer.eos_token_id) == 2
