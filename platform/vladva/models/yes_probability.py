"""Yes probability: how sure a generator is that a text describes an image, when it is asked.

    "Does this text describe the image? TEXT  Answer yes or no."  ->  P(yes) / (P(yes) + P(no)) of the first word

It is the generator as it was before any adapter: an adapter that has made it a retriever is turned off for the
question, so one loaded model embeds and judges. Costly beside a cosine, and so for the best few that a retriever finds.

N pairs, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from vladva.models.batch import cut

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from vladva.models.embedder import Embedder

QUESTION = "Does this text describe the image? {text} Answer yes or no."
ANSWERS = {"yes": ("yes", "Yes", " yes", " Yes"), "no": ("no", "No", " no", " No")}


def yes_probabilities(
    embedder: Embedder, images: Sequence[Image.Image], texts: Sequence[str], batch_size: int = 16
) -> np.ndarray:
    """P("yes") against "no" of each image with the text beside it, float32 [N], in batches of like lengths.

    Raises ValueError where the adapter is merged into the weights, or the model has no words for an answer.
    """
    if embedder.merged:
        raise ValueError("this model's adapter is merged into its weights; load it with merge=False to ask it")
    yes, no = (answer_tokens(embedder.preprocessor.tokenizer, answer) for answer in ("yes", "no"))
    prompts = [question_prompt(embedder, text, image.size) for image, text in zip(images, texts, strict=True)]
    found_N = np.zeros(len(prompts), np.float32)
    for chosen in cut([len(prompt) for prompt in prompts], batch_size):
        logits = first_word_logits(embedder, [prompts[i] for i in chosen], [images[i] for i in chosen])
        of_yes, of_no = (logits[:, tokens].logsumexp(dim=1) for tokens in (yes, no))
        found_N[chosen] = (of_yes - of_no).sigmoid().cpu().numpy()
    return found_N


def question_prompt(embedder: Embedder, text: str, size: tuple[int, int]) -> list[int]:
    """Token ids of the question about an image of this size, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(text=text)}]
    return embedder.preprocessor.render([{"role": "user", "content": content}], [size])


def answer_tokens(tokenizer: Any, answer: str) -> list[int]:
    """The tokens that an answer may begin with: no other answer begins with one of them.

    Raises ValueError where the tokenizer has none.
    """
    unknown, vocabulary = tokenizer.unk_token_id, tokenizer.get_vocab()

    def begins(word: str) -> set[int]:
        # Also those that the tokenizer itself would not begin a text with, as it puts a space first: a model may.
        whole = {vocabulary.get(space + spelling) for space in ("", "Ġ", "▁") for spelling in ANSWERS[word]}
        spellings = (tokenizer.encode(spelling, add_special_tokens=False) for spelling in ANSWERS[word])
        # Some tokenizers put a space of its own before a word: that says nothing.
        ids = (next((one for one in ids if tokenizer.decode([one]).strip()), unknown) for ids in spellings)
        return {one for one in (*ids, *whole) if one is not None and one != unknown}

    (other,) = ANSWERS.keys() - {answer}
    found = begins(answer) - begins(other)
    if not found:
        raise ValueError(f"{tokenizer.name_or_path} has no token that an answer of {answer!r} begins with")
    return sorted(found)


def first_word_logits(embedder: Embedder, prompts: Sequence[list[int]], images: Sequence[Image.Image]) -> torch.Tensor:
    """Logits [N, V] (float32) of the first token of each answer, with the adapter off."""
    import torch

    from vladva.models.batch import as_tensors

    tokens = as_tensors(embedder.preprocessor.pad([(prompt, []) for prompt in prompts]), embedder.device)
    pixels = as_tensors(embedder.preprocessor.pixels(images), embedder.device)
    inputs = embedder.model.inputs(tokens, pixels)
    # Only where a prompt ends: the vocabulary is large, and the other positions answer nothing.
    ends, row_of = torch.unique(tokens["prompt_lengths"] - 1, return_inverse=True)
    off = embedder.adapter_switch.off() if embedder.adapter is not None else nullcontext()
    with torch.inference_mode(), off:
        logits = embedder.model.base(**inputs, logits_to_keep=ends, use_cache=False).logits
    return logits[torch.arange(len(prompts)), row_of].float()
