"""vLLM generation: the deployment that answers with vLLM's engine (`layout=separate engine=vllm`), adapter off.

For GPUs, where vLLM's paged cache answers more conversations at a time than our own engine. It holds the base model
and nothing else: it neither embeds nor answers with the adapter on, so that what it needs of memory it needs besides
the embedding deployment's. Prompts are rendered and images decoded by the same code as for our own engine; an image is
one token in a prompt that vLLM takes, and vLLM puts in as many as the image has.
"""

import asyncio
import logging
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image

from serve.config import ServeArgs
from serve.deployments.engine import LATE, EngineCounters, EngineLoad
from serve.deployments.engine_metrics import EngineMetrics
from serve.deployments.generation import (
    READY_QUESTION,
    Answers,
    Conversation,
    Finished,
    Judged,
    Sampling,
    Started,
)
from serve.deployments.model_replica import HEALTH_S, limits_of
from serve.deployments.preparing import PreparingThreads
from serve.deployments.service_rate import ServiceRate
from serve.protocol.bodies import SWITCH_S
from serve.protocol.errors import INTERNAL, Failure
from serve.protocol.items import EmbedItem

if TYPE_CHECKING:
    from vladva.models.preprocessor import Preprocessor

logger = logging.getLogger("ray.serve")

ADAPTER_OFF = Failure(422, "engine=vllm answers with the adapter off; serve with engine=vladva", "unsupported_value")


class VllmGenerative(Answers):
    """Answers conversations, in pieces or whole, and judges pairs. Methods return a `Failure` for what they refuse."""

    def __init__(self, args: ServeArgs) -> None:
        from vladva.core.devices import assigned_device

        assigned_device()

        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from vladva.models.backbones import checkpoint_source
        from vladva.models.preprocessor import Preprocessor
        from vladva.models.resolve import describe
        from vladva.models.yes_probability import answer_tokens

        sys.setswitchinterval(SWITCH_S)
        config, self.description = describe(args.model, adapter=True, dtype=args.dtype or "float32")
        self.args = args
        self.limits = limits_of(args)
        self.preprocessor = Preprocessor.of(config)
        self.context = self.preprocessor.config.get_text_config().max_position_embeddings
        self.image_token = self.preprocessor.tokenizer.convert_tokens_to_ids(self.preprocessor.image_token)
        self.yes, self.no = (answer_tokens(self.preprocessor.tokenizer, answer) for answer in ("yes", "no"))
        self.preparing = PreparingThreads(args.prepare_threads)
        self.metrics: EngineMetrics | None = None
        self.counters = EngineCounters()
        self.open = 0  # conversations that are waiting or being answered
        self.held = 0  # tokens of them, and of questions about pairs
        self.rate = ServiceRate()  # tokens per second, of all answers together
        self.length = 0.0  # tokens of an answer, a running mean
        self.heard = 0.0  # when a token came last, or work after a pause
        source = checkpoint_source(config.checkpoint)
        settings: dict[str, Any] = {
            "model": source.name,
            "revision": source.revision,
            "dtype": args.dtype or "float32",
            "max_model_len": self.context,
            "max_num_seqs": args.max_conversations,
            "tensor_parallel_size": max(1, int(args.num_gpus or 0)),
            "disable_log_stats": True,
            **args.engine_options,
        }
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**settings))

    @property
    def template(self) -> "Preprocessor":
        """The model's own, as the embedding deployment has it."""
        return self.preprocessor

    async def describe(self) -> dict[str, Any]:
        """What the model says of itself."""
        return {**self.description, "context": self.context, "cuts": False, "generates": True}

    async def load(self) -> EngineLoad:
        """What the engine is busy with."""
        answering = min(self.open, self.limits.conversations)
        return EngineLoad(0, 0, self.open - answering, answering, self.wait_s(), self.counters)

    async def check_health(self) -> None:
        """Say a token about an image. Serve replaces a replica for which this raises again and again."""
        if self.metrics is None:
            labels = {name: self.description[name] or "" for name in ("fingerprint", "adapter")}
            self.metrics = EngineMetrics({"model": self.args.model, **labels})
        self.metrics.tell(await self.load())
        await self.engine.check_health()
        image = Image.new("RGB", (32, 32))
        prompt = self.prompt(self.template.render(READY_QUESTION, [image.size]), [image])
        await asyncio.wait_for(self.last(prompt, self.parameters(max_tokens=1)), HEALTH_S)

    async def answer(
        self, conversation: Conversation, sampling: Sampling
    ) -> AsyncIterator[Started | str | Finished | Failure]:
        """`Started`, pieces of text, `Finished`; or a `Failure` and nothing else."""
        end = time.monotonic() + self.args.deadline_s
        if sampling.adapter and self.description["adapter"]:
            yield ADAPTER_OFF.with_param("model")
            return
        planned = await self.preparing.run(self.plan, conversation, sampling.max_tokens)
        if isinstance(planned, Failure):
            yield planned
            return
        ids, max_tokens = planned
        refusal = self.refusal(len(ids) + max_tokens)
        if refusal:
            yield refusal
            return
        with self.hold(len(ids) + max_tokens):
            images = await self.preparing.run(self.decode, conversation.images, large=conversation.is_large)
            if isinstance(images, Failure):
                yield images
                return
            yield Started(len(ids))
            async for said in self.said(self.prompt(ids, images), max_tokens, sampling, end):
                yield said

    async def said(
        self, prompt: dict[str, Any], max_tokens: int, sampling: Sampling, end: float
    ) -> AsyncIterator[str | Finished | Failure]:
        """Pieces of text as vLLM makes them, and `Finished`; a `Failure` where it is late, or fails."""
        from vllm.sampling_params import RequestOutputKind

        parameters = self.parameters(
            max_tokens=max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            stop=list(sampling.stop),
            output_kind=RequestOutputKind.DELTA,
        )
        outputs = self.engine.generate(prompt, parameters, uuid.uuid4().hex)
        made = 0
        try:
            while True:
                try:
                    # When it is cancelled, vLLM drops the request.
                    output = (await asyncio.wait_for(anext(outputs), max(0.0, end - time.monotonic()))).outputs[0]
                except asyncio.TimeoutError:
                    self.counters.cancelled += 1
                    yield LATE
                    return
                except Exception:  # where the engine has died, the next health check replaces the replica
                    logger.exception("vLLM failed to answer")
                    yield INTERNAL
                    return
                made += len(output.token_ids)
                self.count(len(output.token_ids))
                if output.text:
                    yield output.text
                if output.finish_reason is not None:
                    self.length = made if not self.length else 0.9 * self.length + 0.1 * made
                    yield Finished(made, "length" if output.finish_reason == "length" else "stop")
                    return
        finally:
            await outputs.aclose()

    async def judge(self, queries: list[EmbedItem], documents: list[EmbedItem]) -> list[Judged | Failure] | Failure:
        """How probably each document matches its query, or the one there is; a `Failure` for a pair that is bad."""
        pairs = list(zip(queries * (len(documents) // len(queries)), documents, strict=True))
        planned = await self.preparing.run(lambda: [self.plan_question(*pair) for pair in pairs])
        cost = sum(len(one[0]) for one in planned if not isinstance(one, Failure))
        refusal = self.refusal(cost)
        if refusal:
            return refusal
        turns = asyncio.Semaphore(self.limits.conversations)

        async def judged(one: tuple[list[int], list[bytes]] | Failure) -> Judged | Failure:
            if isinstance(one, Failure):
                return one
            ids, encoded = one
            async with turns:
                images = await self.preparing.run(self.decode, encoded)
                return images if isinstance(images, Failure) else Judged(await self.probability(ids, images), len(ids))

        with self.hold(cost):
            work = asyncio.gather(*[judged(one) for one in planned])
            try:
                return list(await asyncio.wait_for(work, self.args.deadline_s))
            except asyncio.TimeoutError:
                return LATE

    async def probability(self, ids: list[int], images: list[Image.Image]) -> float:
        """P(yes) / (P(yes) + P(no)) of the first token of the answer."""
        import numpy as np

        asked = self.parameters(max_tokens=1, logprob_token_ids=[*self.yes, *self.no])
        output = await self.last(self.prompt(ids, images), asked)
        found = output.outputs[0].logprobs[0]
        yes, no = (np.logaddexp.reduce([found[one].logprob for one in of]) for of in (self.yes, self.no))
        return float(1 / (1 + np.exp(no - yes)))

    async def last(self, prompt: dict[str, Any], parameters: Any) -> Any:
        """The last that vLLM says to a prompt."""
        return [output async for output in self.engine.generate(prompt, parameters, uuid.uuid4().hex)][-1]

    @staticmethod
    def parameters(**given: Any) -> Any:
        """vLLM's sampling parameters, greedy where nothing else is said."""
        from vllm import SamplingParams

        return SamplingParams(**{"temperature": 0.0, **given})

    def prompt(self, ids: Sequence[int], images: Sequence[Image.Image]) -> dict[str, Any]:
        """A prompt as vLLM takes it: every image one token."""
        counts = iter([self.template.num_image_tokens(image.size) for image in images])
        short: list[int] = []
        place = 0
        while place < len(ids):
            short.append(ids[place])
            place += next(counts) if ids[place] == self.image_token else 1
        return {"prompt_token_ids": short, **({"multi_modal_data": {"image": list(images)}} if images else {})}

    def decode(self, images: Sequence[bytes]) -> list[Image.Image] | Failure:
        """Images, decoded."""
        from vladva.core.images import decode_image

        try:
            return [decode_image(data, self.args.max_image_pixels) for data in images]
        except ValueError as error:
            return Failure(422, str(error), "invalid_image").with_param("messages")

    # ------------------------------------------------------------------------------------------------------- admission

    def refusal(self, tokens: int) -> Failure | None:
        """Why work of so many tokens cannot be taken on, or None where it can."""
        refusal = self.limits.refusal(tokens, self.held, self.wait_s())
        self.counters.refused += refusal is not None and refusal.status == 429
        return refusal

    def wait_s(self) -> float:
        """How long a conversation that arrives now is expected to wait for a place."""
        return self.rate.seconds_for(max(0, self.open - self.limits.conversations) * self.length)

    @contextmanager
    def hold(self, tokens: int) -> Iterator[None]:
        """Count work as accepted until it is done, or nobody waits for it any more."""
        if not self.open:
            self.heard = time.monotonic()
        self.open += 1
        self.held += tokens
        try:
            yield
        finally:
            self.open -= 1
            self.held -= tokens

    def count(self, tokens: int) -> None:
        """So many tokens of an answer came now."""
        now = time.monotonic()
        self.rate.record(tokens, now - self.heard)
        self.heard = now
        self.counters.answer_tokens += tokens
