"""Discriminative: the deployment that embeds (adapter on), and searches and changes the index of the same model.

Items of all waiting requests share batches (engine.py). A batch is full by cost, not by count: an item costs its
tokens, and at least its pixels / PIXELS_PER_TOKEN, because a model that makes 16 tokens of every image still has to
decode it.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from PIL import Image

from serve.config import ServeArgs
from serve.deployments.model_replica import HEALTH_S, SHORT_CHARACTERS, ModelReplica
from serve.deployments.preparing import LARGE_CHARACTERS, LARGE_PIXELS
from serve.deployments.runner import Encoded
from serve.deployments.served_index import Changed, Found, IndexEntry, ServedIndex
from serve.protocol.errors import Failure
from serve.protocol.items import EmbedItem

PIXELS_PER_TOKEN = 10_000
UNIT_TOLERANCE = 1e-2


@dataclass(frozen=True)
class Work:
    """An item as token ids, what it costs in a batch, and the tokens it takes; an image is not decoded yet."""

    ids: list[int]
    image: bytes | None
    cost: int
    tokens: int
    pixels: int = 0


@dataclass(frozen=True)
class ItemEmbedding:
    """The embedding [D] of one item, unit norm, the tokens it took, and the model that made it.

    While an application is updated, replicas of two models answer: only the replica itself knows which one it holds.
    """

    vector: np.ndarray
    tokens: int
    fingerprint: str


class Discriminative(ModelReplica):
    """Embeds texts and images, and searches. Methods return a `Failure` for what they refuse."""

    def __init__(self, args: ServeArgs) -> None:
        super().__init__(args)
        self.index = ServedIndex(args, dict(self.embedder.description()))

    async def probe(self) -> None:
        """Embed an image. Raises RuntimeError where that does not give a unit vector."""
        preprocessor, image = self.embedder.preprocessor, Image.new("RGB", (32, 32))
        ids = preprocessor.image_prompt(image.size)
        encoded = Encoded(ids, preprocessor.pixels([image]), self.embedder.num_image_tokens(*image.size))
        results = await self.engine.items(self.engine.embeddings, [encoded], HEALTH_S)
        vector = None if isinstance(results, Failure) else results[0]
        if not isinstance(vector, np.ndarray) or not abs(float(np.linalg.norm(vector)) - 1) < UNIT_TOLERANCE:
            raise RuntimeError("the model does not embed")

    async def costs(self, items: list[EmbedItem]) -> list[tuple[int, int] | Failure]:
        """(tokens, cost in a batch) of each item, with a `Failure` in the place of a bad one."""
        return [one if isinstance(one, Failure) else (one.tokens, one.cost) for one in await self.counted(items)]

    async def embed(self, items: list[EmbedItem]) -> list[ItemEmbedding | Failure] | Failure:
        """Embeddings of the items, in order, with a `Failure` in the place of a bad one."""
        work = await self.counted(items)
        queue, cost = self.engine.embeddings, sum(one.cost for one in work if isinstance(one, Work))
        refusal = self.engine.refusal(queue, cost, len(work))
        if refusal:
            return refusal
        with queue.hold(cost, len(work)) as held:
            turns = self.preparing.turns()
            encoded = await asyncio.gather(*[self.encoded(one, turns) for one in work])
            good = [one for one in encoded if isinstance(one, Encoded)]
            vectors = await self.engine.items(queue, good, self.args.deadline_s, held) if good else []
        if isinstance(vectors, Failure):
            return vectors
        computed = iter(vectors)
        results: list[ItemEmbedding | Failure] = []
        for planned, one in zip(work, encoded, strict=True):
            found = next(computed) if isinstance(one, Encoded) else one
            if isinstance(planned, Work) and not isinstance(found, Failure):
                found = ItemEmbedding(found, planned.tokens, self.embedder.fingerprint)
            results.append(found)
        return results

    async def search(
        self, query: EmbedItem | np.ndarray, k: int, where: str | None, version: int | str | None
    ) -> Found | Failure:
        """The k rows of the index nearest to an item, or to a vector [D] of unit norm."""
        tokens = 0
        if isinstance(query, EmbedItem):
            embedded = await self.embed([query])
            if isinstance(embedded, Failure):
                return embedded
            [one] = embedded
            if isinstance(one, Failure):
                return one.with_param("query")
            vector, tokens = one.vector, one.tokens
        else:
            vector = query
        if len(vector) != self.embedder.dimension:
            message = f"the vector has {len(vector)} numbers; the model's have {self.embedder.dimension}"
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
        good = []
        for i, one in enumerate(embedded):
            if isinstance(one, Failure):
                return one.with_param(f"items[{i}]")
            good.append(one)
        vectors_ND = np.stack([one.vector for one in good])
        changed = await asyncio.get_running_loop().run_in_executor(
            self.index.write_thread, self.index.upsert, entries, vectors_ND
        )
        return replace(changed, tokens=sum(one.tokens for one in good)) if isinstance(changed, Changed) else changed

    async def delete(self, ids: list[str]) -> Changed | Failure:
        """Remove rows from the index."""
        return await asyncio.get_running_loop().run_in_executor(self.index.write_thread, self.index.delete, ids)

    async def counted(self, items: Sequence[EmbedItem]) -> list[Work | Failure]:
        """What each item costs; a `Failure` where the model cannot take it."""
        characters = sum(len(item.text or "") for item in items) + len(items)
        if characters < SHORT_CHARACTERS:
            return self.count(items)
        return await self.preparing.run(self.count, items, large=characters > LARGE_CHARACTERS)

    def count(self, items: Sequence[EmbedItem]) -> list[Work | Failure]:
        """The same, in this thread."""
        return [self.count_one(item) for item in items]

    def count_one(self, item: EmbedItem) -> Work | Failure:
        """What an item costs."""
        size = None if item.image is None else item.size
        prompt = partial(self.embedder.preprocessor.item_prompt, size=size, instruction=item.instruction)
        try:
            ids = prompt(item.text)
            if len(ids) > self.context and item.text is not None and item.truncate != "none":
                ids = self.shorter(item.text, len(ids) - self.context, item.truncate, prompt)
        except ValueError as error:
            return Failure(422, str(error), "invalid_value" if size is None else "invalid_image")
        if len(ids) > self.context:
            what = "text" if size is None else "item"
            message = f"the {what} takes {len(ids):,} tokens with its prompt; the model takes {self.context:,}"
            return Failure(422, message, "context_length_exceeded")
        tokens = len(ids) or self.embedder.num_image_tokens(*item.size)  # a dual encoder asks nothing of an image
        return Work(ids, item.image, max(tokens, item.pixels // PIXELS_PER_TOKEN), tokens, item.pixels)

    def shorter(self, text: str, drop: int, side: str, prompt: Callable[[str], list[int]]) -> list[int]:
        """The prompt of a text without its first (`start`) or last (`end`) tokens, at least `drop`, so that it fits.

        What is around the text stays whole. Raises ValueError where even an empty text does not fit.
        """
        encoded = self.embedder.preprocessor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        starts = [start for start, _ in encoded["offset_mapping"]]
        while drop < len(starts):
            ids = prompt(text[starts[drop] :] if side == "start" else text[: starts[-drop]])
            if len(ids) <= self.context:
                return ids
            drop += max(len(ids) - self.context, drop // 32)  # what is left may be cut into other tokens
        raise ValueError("the model's context is shorter than what is around the text")

    async def encoded(self, work: Work | Failure, turns: asyncio.Semaphore) -> Encoded | Failure:
        """An item as the model takes it, its image decoded beside the model."""
        if isinstance(work, Failure):
            return work
        if work.image is None:
            return Encoded(work.ids, None, work.cost)
        async with turns:
            return await self.preparing.run(self.decoded, work, large=work.pixels > LARGE_PIXELS)

    def decoded(self, work: Work) -> Encoded | Failure:
        """The same of an image, in this thread."""
        from vladva.core.images import decode_image

        assert work.image is not None
        try:
            image = decode_image(work.image, self.args.max_image_pixels)
        except ValueError as error:
            return Failure(422, str(error), "invalid_image")
        return Encoded(work.ids, self.embedder.preprocessor.pixels([image]), work.cost)
