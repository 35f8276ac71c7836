"""Yes or no: a generative re-ranker's question about a query and a document, and the probability that it says yes.

A text and an image are asked about as re-ranking on benchmarks does it (vladva/models/yes_probability.py).
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from serve.protocol.items import EmbedItem

if TYPE_CHECKING:
    import torch

    from vladva.models.embedder import Embedder

PAIR_QUESTION = "Does the document match the query? Answer yes or no."


def question(query: EmbedItem, document: EmbedItem) -> tuple[list[dict[str, Any]], list[EmbedItem]]:
    """The conversation that asks about a pair, in Hugging Face's chat form, and the images in it, in order."""
    from vladva.models.yes_probability import QUESTION

    pair = (query, document)
    images = [item for item in pair if item.image is not None]
    if len(images) == 1 and all(item.is_plain for item in pair):
        [text] = [item.text or "" for item in pair if item.image is None]
        content: list[dict[str, Any]] = [{"type": "image"}, {"type": "text", "text": QUESTION.format(text=text)}]
        return [{"role": "user", "content": content}], images
    content = []
    for name, item in (("Query", query), ("Document", document)):
        words = "\n".join(filter(None, (item.instruction, item.text)))
        if item.image is None:
            content.append({"type": "text", "text": f"{name}: {words}\n"})
        else:
            content += [
                {"type": "text", "text": f"{name}: "},
                {"type": "image"},
                {"type": "text", "text": f"{words}\n"},
            ]
    content.append({"type": "text", "text": PAIR_QUESTION})
    return [{"role": "user", "content": content}], images


class YesOrNo:
    """Logits of an answer's first token -> P(yes) / (P(yes) + P(no))."""

    def __init__(self, embedder: "Embedder") -> None:
        from vladva.models.yes_probability import answer_tokens

        self.yes, self.no = (answer_tokens(embedder.preprocessor.tokenizer, answer) for answer in ("yes", "no"))

    def __call__(self, logits_BV: "torch.Tensor") -> Sequence[float]:
        """P(yes) for every row."""
        yes_B, no_B = (logits_BV[:, ids].float().logsumexp(dim=1) for ids in (self.yes, self.no))
        return (yes_B - no_B).sigmoid().tolist()
