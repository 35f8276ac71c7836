"""Discriminative: the deployment that embeds (adapter on), and searches and changes the index of the same model.

Items of all waiting requests share batches. A batch is full by cost, not by count: an item costs its tokens, and at
least its pixels / PIXELS_PER_TOKEN, because a model that makes 16 tokens of every image still holds it decoded.
"""

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ray import serve

from serve.config import ServeArgs
from serve.deployments.served_index import Changed, Found, IndexEntry, ServedIndex
from serve.deployments.token_budget import TokenBudget
from serve.protocol.errors import INTERNAL, Failure
from serve.protocol.items import EmbedItem

logger = logging.getLogger("ray.serve")

PIXELS_PER_TOKEN = 10_000


@dataclass(frozen=True)
class Work:
    """An item, the tokens it takes, and what it costs in a batch."""

    item: EmbedItem
    tokens: int
    cost: int


@dataclass(frozen=True)
class ItemEmbedding:
    """The embedding [D] of one item, unit norm, the tokens it took, and the model that made it.

    While an application is updated, replicas of two models answer: only the replica itself knows which one it holds.
    """

    vector: np.ndarray
    tokens: int
    fingerprint: str


def batch_cost(work: Sequence[Work]) -> int:
    """What a batch costs. Serve refuses an item that alone exceeds a batch; here it makes a batch by itself."""
    return sum(one.cost for one in work) if len(work) > 1 else 1


@serve.deployment
class Discriminative:
    """Embeds texts and images, and searches. Methods return a `Failure` for what they refuse."""

    def __init__(self, args: ServeArgs) -> None:
        from vladva.core.devices import assigned_device

        device = assigned_device()

        from vladva.models.embedder import load_embedder

        self.args = args
        self.embedder = load_embedder(args.model, dtype=args.dtype or "float32", device=device)
        self.context: int = self.embedder.preprocessor.config.get_text_config().max_position_embeddings
        self.budget = TokenBudget(args.max_queued_tokens)
        # The event loop only hands out work, so that it always answers.
        self.model_thread = ThreadPoolExecutor(1)
        self.token_thread = ThreadPoolExecutor(1)
        self.index = ServedIndex(args, self.embedder.description())
        self.embed_batched.set_max_batch_size(args.max_batch_tokens)
        self.embed_batched.set_batch_wait_timeout_s(args.batch_wait_s)
        self.embedder.embed_texts(["ready"])

    async def describe(self) -> dict[str, Any]:
        """What the embedder says of itself; the constructor has embedded something by then."""
        return {**self.embedder.description(), "context": self.context, "cuts": False, "generates": True}

    async def costs(self, items: list[EmbedItem]) -> list[tuple[int, int] | Failure]:
        """(tokens, cost in a batch) of each item, with a `Failure` in the place of a bad one."""
        counted = await asyncio.get_running_loop().run_in_executor(self.token_thread, self.count, items)
        return [one if isinstance(one, Failure) else (one.tokens, one.cost) for one in counted]

    async def embed(self, items: list[EmbedItem]) -> list[ItemEmbedding | Failure] | Failure:
        """Embeddings of the items, in order, with a `Failure` in the place of a bad one."""
        work = await asyncio.get_running_loop().run_in_executor(self.token_thread, self.count, items)
        cost = sum(one.cost for one in work if isinstance(one, Work))
        refusal = self.budget.refusal(cost)
        if refusal:
            return refusal

        async def embed_one(one: Work | Failure) -> ItemEmbedding | Failure:
            return one if isinstance(one, Failure) else await self.embed_batched(one)

        with self.budget.hold(cost):
            return await asyncio.gather(*[embed_one(one) for one in work])

    async def search(
        self, query: EmbedItem | np.ndarray, k: int, where: str | None, version: int | str | None
    ) -> Found | Failure:
        """The k rows of the index nearest to an item, or to a vector [D] of unit norm."""
        vector, tokens = query, 0
        if isinstance(query, EmbedItem):
            embedded = await self.embed([query])
            if isinstance(embedded, Failure):
                return embedded
            if isinstance(embedded[0], Failure):
                return embedded[0].with_param("query")
            vector, tokens = embedded[0].vector, embedded[0].tokens
        elif len(query) != self.embedder.dimension:
            message = f"the vector has {len(query)} numbers; the model's have {self.embedder.dimension}"
            return Failure(422, message, "invalid_value").with_param("query")
        found = await asyncio.get_running_loop().run_in_executor(
            self.index.search_threads, self.index.search, vector, k, where, version
        )
        return replace(found, tokens=tokens) if isinstance(found, Found) else found

    async def thumbnail(self, name: str, size: int) -> bytes | Failure:
        """A JPEG, at most `size` pixels wide and high, of the image that the index has under this id."""
        return await asyncio.get_running_loop().run_in_executor(
            self.index.search_threads, self.index.thumbnail, name, size
        )

    async def upsert(self, items: list[EmbedItem], entries: list[IndexEntry]) -> Changed | Failure:
        """Embed the items and write them to the index."""
        embedded = await self.embed(items)
        if isinstance(embedded, Failure):
            return embedded
        for i, one in enumerate(embedded):
            if isinstance(one, Failure):
                return one.with_param(f"items[{i}]")
        vectors_ND = np.stack([one.vector for one in embedded])
        changed = await asyncio.get_running_loop().run_in_executor(
            self.index.write_thread, self.index.upsert, entries, vectors_ND
        )
        return replace(changed, tokens=sum(one.tokens for one in embedded)) if isinstance(changed, Changed) else changed

    async def delete(self, ids: list[str]) -> Changed | Failure:
        """Remove rows from the index."""
        return await asyncio.get_running_loop().run_in_executor(self.index.write_thread, self.index.delete, ids)

    def count(self, items: Sequence[EmbedItem]) -> list[Work | Failure]:
        """What each item costs; a `Failure` where the model cannot take it."""
        return [self.count_one(item) for item in items]

    def count_one(self, item: EmbedItem) -> Work | Failure:
        """What an item costs."""
        if item.text is None:
            try:
                tokens = self.embedder.num_image_tokens(*item.size)
            except ValueError as error:
                return Failure(422, str(error), "invalid_image")
            return Work(item, tokens, max(tokens, item.pixels // PIXELS_PER_TOKEN))
        try:
            [tokens] = self.embedder.count_text_tokens([item.text])
            if tokens > self.context and item.truncate != "none":
                text, tokens = self.shorter(item.text, tokens - self.context, item.truncate)
                item = replace(item, text=text)
        except ValueError as error:
            return Failure(422, str(error), "invalid_value")
        if tokens > self.context:
            message = f"the text takes {tokens:,} tokens with its prompt; the model takes {self.context:,}"
            return Failure(422, message, "context_length_exceeded")
        return Work(item, tokens, tokens)

    def shorter(self, text: str, drop: int, side: str) -> tuple[str, int]:
        """A text without its first (`start`) or last (`end`) tokens, at least `drop`, so that it fits; its new count.

        The prompt around it stays whole. Raises ValueError where even an empty text does not fit.
        """
        encoded = self.embedder.preprocessor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        while drop < len(starts):
            short = text[starts[drop] :] if side == "start" else text[: starts[-drop]]
            [tokens] = self.embedder.count_text_tokens([short])
            if tokens <= self.context:
                return short, tokens
            drop += max(tokens - self.context, drop // 32)  # what is left may be cut into other tokens
        raise ValueError("the model's context is shorter than its prompt")

    @serve.batch(max_batch_size=1, batch_size_fn=batch_cost)  # the constructor sets size and wait
    async def embed_batched(self, work: list[Work]) -> list[ItemEmbedding | Failure]:
        """One caller's item, embedded together with those of others."""
        return await asyncio.get_running_loop().run_in_executor(self.model_thread, self.embed_now, work)

    def embed_now(self, work: Sequence[Work]) -> list[ItemEmbedding | Failure]:
        """Decode and embed one batch. An error in it is laid at the door of the item that causes it."""
        from vladva.core.images import decode_image

        results: list[ItemEmbedding | Failure | None] = [None] * len(work)
        texts, images = [], {}
        for i, one in enumerate(work):
            if one.item.image is None:
                texts.append(i)
                continue
            try:
                images[i] = decode_image(one.item.image, self.args.max_image_pixels)
            except ValueError as error:
                results[i] = Failure(422, str(error), "invalid_image")
        try:
            vectors = [
                *zip(texts, self.embedder.embed_texts([work[i].item.text for i in texts]), strict=True),
                *zip(images, self.embedder.embed_images(list(images.values())), strict=True),
            ]
        except Exception:
            if len(work) == 1:
                logger.exception("an item cannot be embedded")
                return [INTERNAL]
            return [self.embed_now([one])[0] for one in work]
        for i, vector in vectors:
            results[i] = ItemEmbedding(vector, work[i].tokens, self.embedder.fingerprint)
        return results
