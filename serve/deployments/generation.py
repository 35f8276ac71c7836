"""Generative: the deployment that answers conversations about images, by default with the adapter off."""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from PIL import Image

from serve.config import ServeArgs
from serve.deployments.engine import TokenSampling
from serve.deployments.model_replica import HEALTH_S, ModelReplica
from serve.deployments.preparing import LARGE_PIXELS, PreparingThreads
from serve.deployments.runner import Encoded
from serve.deployments.yes_or_no import question
from serve.protocol.errors import Failure
from serve.protocol.items import EmbedItem

if TYPE_CHECKING:
    from vladva.models.preprocessor import Preprocessor


READY_QUESTION = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "ready?"}]}]


@dataclass(frozen=True)
class Conversation:
    """What to answer: messages in Hugging Face's chat form, and the encoded images and their sizes, in order."""

    messages: list[dict[str, Any]]
    images: list[bytes]
    sizes: list[tuple[int, int]]

    @property
    def is_large(self) -> bool:
        """Whether decoding its images takes long."""
        return sum(width * height for width, height in self.sizes) > LARGE_PIXELS


@dataclass(frozen=True)
class Sampling:
    """How to answer; `adapter` turns the adapter on."""

    max_tokens: int | None
    temperature: float
    top_p: float
    seed: int | None
    stop: Sequence[str]
    adapter: bool


@dataclass(frozen=True)
class Started:
    """The first thing an answer gives: the conversation is accepted, and takes this many tokens."""

    prompt_tokens: int


@dataclass(frozen=True)
class Finished:
    """The last thing an answer gives: tokens that were made, and whether it ended (`stop`) or was cut (`length`)."""

    completion_tokens: int
    reason: str


@dataclass(frozen=True)
class WholeAnswer:
    """An answer at once."""

    started: Started
    text: str
    finished: Finished


@dataclass(frozen=True)
class Judged:
    """The probability that a document matches its query, by the generator, and the tokens that it took to ask."""

    probability: float
    tokens: int


class Answers(ABC):
    """What every replica that answers conversations has in common, whichever engine runs the model."""

    args: ServeArgs
    context: int
    preparing: PreparingThreads

    @property
    @abstractmethod
    def template(self) -> "Preprocessor":
        """What renders conversations and prepares images."""
        ...

    @abstractmethod
    def answer(
        self, conversation: Conversation, sampling: Sampling
    ) -> AsyncIterator[Started | str | Finished | Failure]:
        """`Started`, pieces of text, `Finished`; or a `Failure` and nothing else."""
        ...

    async def whole_answer(self, conversation: Conversation, sampling: Sampling) -> WholeAnswer | Failure:
        """The same at once: it takes less of everything between the model and the client."""
        events = [event async for event in self.answer(conversation, sampling)]
        match events:
            case [Started() as started, *pieces, Finished() as finished]:
                return WholeAnswer(started, "".join(str(piece) for piece in pieces), finished)
        failure = events[-1]
        assert isinstance(failure, Failure)
        return failure

    def plan_question(self, query: EmbedItem, document: EmbedItem) -> tuple[list[int], list[bytes]] | Failure:
        """Token ids of the question about a pair, and its images, encoded."""
        messages, images = question(query, document)
        data = [item.image for item in images if item.image is not None]
        planned = self.plan(Conversation(messages, data, [item.size for item in images]), 1)
        return planned if isinstance(planned, Failure) else (planned[0], data)

    def plan(self, conversation: Conversation, max_tokens: int | None) -> tuple[list[int], int] | Failure:
        """Token ids of the prompt, and the number of tokens that the answer may have."""
        try:
            ids = self.template.render(conversation.messages, conversation.sizes)
        except ValueError as error:
            code = "invalid_image" if conversation.sizes else "invalid_value"
            return Failure(422, str(error), code).with_param("messages")
        room = self.context - len(ids)
        if max_tokens is None:
            max_tokens = min(self.args.max_tokens, max(room, 1))
        if max_tokens > room:
            text = f"the conversation takes {len(ids):,} tokens and the answer up to {max_tokens:,}"
            text = f"{text}; the model takes {self.context:,} in all"
            return Failure(422, text, "context_length_exceeded").with_param("messages")
        return ids, max_tokens


class Generative(ModelReplica, Answers):
    """Answers conversations, in pieces or whole, and judges pairs. Methods return a `Failure` for what they refuse."""

    @property
    def template(self) -> "Preprocessor":
        """The model's own."""
        return self.generator.preprocessor

    async def probe(self) -> None:
        """Say a token about an image. Raises RuntimeError where that fails."""
        image = Image.new("RGB", (32, 32))
        ids = self.template.render(READY_QUESTION, [image.size])
        encoded = Encoded(ids, self.template.pixels([image]), len(ids))
        async for said in self.engine.answer(encoded, TokenSampling(max_tokens=1), HEALTH_S):
            if isinstance(said, Failure):
                raise RuntimeError("the model does not answer")

    async def answer(
        self, conversation: Conversation, sampling: Sampling
    ) -> AsyncIterator[Started | str | Finished | Failure]:
        """`Started`, pieces of text, `Finished`; or a `Failure` and nothing else."""
        planned = await self.preparing.run(self.plan, conversation, sampling.max_tokens)
        if isinstance(planned, Failure):
            yield planned
            return
        ids, max_tokens = planned
        refusal = self.engine.answer_refusal(len(ids) + max_tokens)
        if refusal:
            yield refusal
            return
        with self.engine.hold_answer(len(ids) + max_tokens):
            encoded = await self.preparing.run(self.decode, ids, conversation.images, large=conversation.is_large)
            if isinstance(encoded, Failure):
                yield encoded
                return
            yield Started(len(ids))
            how = TokenSampling(
                max_tokens, sampling.temperature, sampling.top_p, sampling.seed, sampling.stop, sampling.adapter
            )
            events = self.engine.answer(encoded, how, self.args.deadline_s)
            try:
                async for said in events:
                    if isinstance(said, Failure):
                        yield said
                        return
                    if said.text:
                        yield said.text
                    if said.reason is not None:
                        yield Finished(said.tokens, said.reason)
            finally:
                await events.aclose()

    async def judge(self, queries: list[EmbedItem], documents: list[EmbedItem]) -> list[Judged | Failure] | Failure:
        """How probably each document matches its query, or the one there is; a `Failure` for a pair that is bad.

        By the base model: adapter off.
        """
        pairs = list(zip(queries * (len(documents) // len(queries)), documents, strict=True))
        planned = await self.preparing.run(lambda: [self.plan_question(*pair) for pair in pairs])
        queue = self.engine.scores
        cost = sum(len(one[0]) for one in planned if not isinstance(one, Failure))
        refusal = self.engine.refusal(queue, cost, len(planned))
        if refusal:
            return refusal
        with queue.hold(cost, len(planned)) as held:
            turns = self.preparing.turns()
            encoded = await asyncio.gather(*[self.decoded_question(one, turns) for one in planned])
            good = [one for one in encoded if isinstance(one, Encoded)]
            scores = await self.engine.items(queue, good, self.args.deadline_s, held) if good else []
        if isinstance(scores, Failure):
            return scores
        computed = iter(scores)
        results: list[Judged | Failure] = []
        for one in encoded:
            found = next(computed) if isinstance(one, Encoded) else one
            if isinstance(one, Encoded) and not isinstance(found, Failure):
                found = Judged(found, len(one.ids))
            results.append(found)
        return results

    async def decoded_question(
        self, planned: tuple[list[int], list[bytes]] | Failure, turns: asyncio.Semaphore
    ) -> Encoded | Failure:
        """A question as the model takes it."""
        if isinstance(planned, Failure):
            return planned
        async with turns:
            return await self.preparing.run(self.decode, *planned)

    def decode(self, ids: list[int], images: Sequence[bytes]) -> Encoded | Failure:
        """A prompt as the model takes it, its images decoded."""
        from vladva.core.images import decode_image

        try:
            decoded = [decode_image(data, self.args.max_image_pixels) for data in images]
        except ValueError as error:
            return Failure(422, str(error), "invalid_image").with_param("messages")
        return Encoded(ids, self.embedder.preprocessor.pixels(decoded) if decoded else None, len(ids))
