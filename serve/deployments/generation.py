"""Generative: the deployment that answers conversations about images, by default with the adapter off."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from PIL import Image
from ray import serve

from serve.config import ServeArgs
from serve.deployments.token_budget import TokenBudget
from serve.protocol.errors import Failure


@dataclass(frozen=True)
class Conversation:
    """What to answer: messages in Hugging Face's chat form, and the encoded images and their sizes, in order."""

    messages: list[dict[str, Any]]
    images: list[bytes]
    sizes: list[tuple[int, int]]


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
    """The last thing an answer gives: its tokens, and whether it ended (`stop`) or was cut (`length`)."""

    completion_tokens: int
    reason: str


@serve.deployment
class Generative:
    """Answers conversations, piece by piece."""

    def __init__(self, args: ServeArgs) -> None:
        from vladva.core.devices import assigned_device

        device = assigned_device()

        from vladva.models.embedder import load_embedder

        self.args = args
        self.embedder = load_embedder(args.model, dtype=args.dtype or "float32", device=device)
        self.context: int = self.embedder.preprocessor.config.get_text_config().max_position_embeddings
        self.budget = TokenBudget(args.max_queued_tokens)
        # One thread for the model: conversations that run at the same time take turns, token by token.
        self.model_thread = ThreadPoolExecutor(1)
        self.sampling_lock = asyncio.Lock()  # one random state: answers that draw from it take turns as a whole
        content = [{"type": "image"}, {"type": "text", "text": "ready?"}]
        list(self.embedder.generate([{"role": "user", "content": content}], [Image.new("RGB", (32, 32))], max_tokens=1))

    async def describe(self) -> dict[str, Any]:
        """What the model says of itself; the constructor has generated something by then."""
        return self.embedder.description()

    async def answer(
        self, conversation: Conversation, sampling: Sampling
    ) -> AsyncIterator[Started | str | Finished | Failure]:
        """`Started`, pieces of text, `Finished`; or a `Failure` and nothing else."""
        loop = asyncio.get_running_loop()
        planned = await loop.run_in_executor(self.model_thread, self.plan, conversation, sampling.max_tokens)
        if isinstance(planned, Failure):
            yield planned
            return
        prompt_tokens, max_tokens = planned
        refusal = self.budget.refusal(prompt_tokens + max_tokens)
        if refusal:
            yield refusal
            return
        with self.budget.hold(prompt_tokens + max_tokens):
            images = await loop.run_in_executor(self.model_thread, self.decode, conversation.images)
            if isinstance(images, Failure):
                yield images
                return
            yield Started(prompt_tokens)
            text = ""
            pieces = self.embedder.generate(
                conversation.messages,
                images,
                max_tokens=max_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                stop=sampling.stop,
                adapter=sampling.adapter,
            )
            async with self.sampling_lock if sampling.temperature else nullcontext():
                async for piece in self.in_thread(pieces):
                    text += piece
                    yield piece
            completion_tokens = self.embedder.preprocessor.count_tokens([text])[0]
            yield Finished(completion_tokens, "length" if completion_tokens >= max_tokens else "stop")

    def plan(self, conversation: Conversation, max_tokens: int | None) -> tuple[int, int] | Failure:
        """Tokens of the prompt, and tokens that the answer may have."""
        try:
            prompt_tokens = len(self.embedder.preprocessor.render(conversation.messages, conversation.sizes))
        except ValueError as error:
            return Failure(422, str(error), "invalid_image").with_param("messages")
        room = self.context - prompt_tokens
        if max_tokens is None:
            max_tokens = min(self.args.max_tokens, max(room, 1))
        if max_tokens > room:
            text = f"the conversation takes {prompt_tokens:,} tokens and the answer up to {max_tokens:,}"
            text = f"{text}; the model takes {self.context:,} in all"
            return Failure(422, text, "context_length_exceeded").with_param("messages")
        return prompt_tokens, max_tokens

    def decode(self, images: Sequence[bytes]) -> list[Image.Image] | Failure:
        """The images, decoded."""
        from vladva.core.images import decode_image

        try:
            return [decode_image(data, self.args.max_image_pixels) for data in images]
        except ValueError as error:
            return Failure(422, str(error), "invalid_image").with_param("messages")

    async def in_thread(self, pieces: Iterator[str]) -> AsyncIterator[str]:
        """The pieces, each made in the model's thread; none after the caller has gone away."""
        loop = asyncio.get_running_loop()
        try:
            while (piece := await loop.run_in_executor(self.model_thread, next, pieces, None)) is not None:
                yield piece
        finally:
            # In the same thread, because a piece may still be in the making there.
            self.model_thread.submit(pieces.close)
