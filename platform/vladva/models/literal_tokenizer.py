"""Text from users is text: `</s>`, `<image>` or `<|im_end|>` in a caption are read as the signs they are made of.

A chat template writes special tokens and the user's text into one string, where a tokenizer cannot tell whose they
are. So texts that might hold one are marked before they go into the template:

    "a </s> b" -> `mark`: a NUL behind every sign -> template -> the special tokens that are whole are the template's:
               -> they get other names, the marks go   -> a copy of the tokenizer that knows only the other names

A text without anything like a special token takes none of these steps: its ids are those of the tokenizer itself.
transformers' `split_special_tokens` does not do: it forgets the template's special tokens too, leaves tokens that were
added without being special, and pieces of text that are encoded one by one get other ids where they meet.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

MARK = "\0"  # no text has one: `clean_text` drops it, and so does `mark`


class LiteralTokenizer:
    """Encodes texts that users wrote, alone or in a chat template, so that no special token comes of them.

    Every added token counts as special, but for runs of spaces, which some tokenizers add to write ordinary text.
    """

    def __init__(self, tokenizer: Any) -> None:
        """Of a tokenizer to which nothing is added afterwards: of transformers, or one of open_clip's own."""
        self.tokenizer = tokenizer
        added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
        self._ids = {i for i, token in added.items() if not str(token).isspace()}
        names = {str(added[i]) for i in self._ids}
        if not added:  # open_clip's own tokenizer keeps them among the words
            names = {word for word in getattr(tokenizer, "encoder", {}) if re.fullmatch("<[a-z_]+_of_text>", word)}
        # The longest of those that begin at a place, as tokenizers do it.
        self._names = sorted(names, key=len, reverse=True)
        self._first_signs = sorted({sign for name in names for sign in (name[0].lower(), name[0].upper())})
        pattern = "|".join(map(re.escape, self._names)) or "(?!)"
        self._exactly, self._roughly = re.compile(pattern), re.compile(pattern, re.IGNORECASE)

    def mark(self, texts: Sequence[str]) -> list[str]:
        """The texts, all of them marked where a special token might arise in one, or where one meets the next."""
        texts = [text.replace(MARK, "") for text in texts]
        if all(text.isascii() and not any(sign in text for sign in self._first_signs) for text in texts):
            return texts  # nearly always
        together = {"".join(texts), "".join(text.strip() for text in texts)}  # some templates strip
        if not any(self._roughly.search(self._normal(text)) for text in together):
            return texts
        return [re.sub(r"(\S)", rf"\1{MARK}", text) for text in texts]

    def __call__(self, text: str, **options: Any) -> list[int]:
        """Token ids of a text whose users' parts are as `mark` left them; `options` are the tokenizer's own."""
        if MARK not in text:
            return self.tokenizer(text, **options).input_ids
        if self._copy is None:
            users, names = self._exactly.split(text), self._exactly.findall(text)
            users = [self._spaced(part.replace(MARK, "")) for part in users]
            whole = users[0] + "".join(name + part for name, part in zip(names, users[1:], strict=True))
            return self.tokenizer(whole, **options).input_ids
        whole, end = "", 0
        for start, stop in self._templates_own(text):
            whole += text[end:start].replace(MARK, "") + self._other_name(text[start:stop])
            end = stop
        return self._copy(whole + text[end:].replace(MARK, ""), **options).input_ids

    def _templates_own(self, text: str) -> list[tuple[int, int]]:
        """Where special tokens stand in a marked text: the tokenizer says, for not every name that is there acts.

        Old Llama tokenizers know `</s>` behind a space, and read it as text behind a word.
        """
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        found = [span for i, span in zip(encoding.ids, encoding.offsets, strict=True) if i in self._ids]
        return [match.span() for span in found if (match := self._exactly.search(text, *span))]

    def alone(self, text: str) -> tuple[Any, str]:
        """A tokenizer without special tokens for a text that stands in no template, and what to give it."""
        [marked] = self.mark([text])
        if MARK not in marked:
            return self.tokenizer, marked
        text = text.replace(MARK, "")
        return (self.tokenizer, self._spaced(text)) if self._copy is None else (self._copy, text)

    def _normal(self, text: str) -> str:
        """The text as the tokenizer's normaliser leaves it, which may make `</s>` of full-width signs."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return text if normalizer is None or text.isascii() else f"{text} {normalizer.normalize_str(text)}"

    def _spaced(self, text: str) -> str:
        """The text with a space in every special token, for tokenizers that cannot be copied."""
        return self._roughly.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    @staticmethod
    def _other_name(name: str) -> str:
        return f"{MARK}{name.encode().hex()}{MARK}"

    @cached_property
    def _copy(self) -> Any:
        """The same tokenizer, ids included, that knows its special tokens by other names; None where it is not fast."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "to_str"):
            return None
        from tokenizers import Tokenizer
        from transformers import PreTrainedTokenizerFast

        other = {name: self._other_name(name) for name in self._names}
        content = json.loads(backend.to_str()) | {"truncation": None, "padding": None}
        kept = backend.normalizer is None or MARK in backend.normalizer.normalize_str(f"a{MARK}b")
        for token in content["added_tokens"]:
            token["content"] = other.get(token["content"], token["content"])
            token["normalized"] &= kept  # a normaliser that drops the mark must not see the name
        model = content["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {other.get(word, word): i for word, i in model["vocab"].items()}
        else:
            model["vocab"] = [[other.get(word, word), score] for word, score in model["vocab"]]
        if "merges" in model:  # none may make a special token of its parts, which the vocabulary has no more
            model["merges"] = [pair for pair in model["merges"] if not other.keys() & _made_and_made_of(pair)]
        if model.get("unk_token") is not None:
            model["unk_token"] = other.get(model["unk_token"], model["unk_token"])
        copy = Tokenizer.from_str(json.dumps(content))
        assert all(copy.token_to_id(other[name]) == backend.token_to_id(name) for name in other)
        return PreTrainedTokenizerFast(tokenizer_object=copy)


def _made_and_made_of(pair: str | list[str]) -> set[str]:
    first, second = pair.split(" ") if isinstance(pair, str) else pair
    return {first, second, first + second}
