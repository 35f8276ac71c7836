"""Model replica: what a replica that holds a model has: the model, the engine that runs it, and threads beside it."""

import asyncio
import sys
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from serve.config import ServeArgs
from serve.deployments.engine import EngineLimits, EngineLoad, ModelEngine
from serve.deployments.engine_metrics import EngineMetrics
from serve.deployments.preparing import PreparingThreads
from serve.deployments.yes_or_no import YesOrNo
from serve.protocol.bodies import SWITCH_S

if TYPE_CHECKING:
    import torch

    from vladva.models.embedder import Embedder
    from vladva.models.interface import Embeds

SHORT_CHARACTERS = 2000  # a text up to which tokenising takes less time than handing it to a thread and back
HEALTH_S = 25.0  # less than Serve waits for a health check


def limits_of(args: ServeArgs) -> EngineLimits:
    """What the engine of a replica takes on."""
    return EngineLimits(
        batch_tokens=args.batch_tokens,
        step_tokens=args.step_tokens,
        batch_wait_s=args.batch_wait_s,
        conversations=args.max_conversations,
        cache_tokens=args.max_cache_tokens,
        queued_tokens=args.max_queued_tokens,
        queue_s=args.max_queue_s,
    )


class ModelReplica(ABC):
    """Loads the model and starts its engine. The event loop hands out work and nothing else, so that it answers."""

    def __init__(self, args: ServeArgs) -> None:
        from vladva.core.devices import assigned_device

        device = assigned_device()

        from serve.deployments.runners import runners_of, tokens_that_end
        from vladva.models.embedder import Embedder, load_embedder
        from vladva.models.generation import AnswerText

        self.args = args
        sys.setswitchinterval(SWITCH_S)
        embedder = load_embedder(args.model, dtype=args.dtype or "float32", device=device)
        self.embedder: Embeds = embedder
        self.lvlm = embedder if isinstance(embedder, Embedder) else None  # a dual encoder only embeds
        self.context: int = embedder.preprocessor.config.get_text_config().max_position_embeddings
        self.judgement: YesOrNo | None = None
        self.metrics: EngineMetrics | None = None
        self.preparing = PreparingThreads(args.prepare_threads)
        self.engine = ModelEngine(
            *runners_of(embedder),
            limits_of(args),
            ends=tokens_that_end(embedder),
            text=partial(AnswerText, embedder.preprocessor.tokenizer),
            score=self.score,
            device=embedder.device,
        )
        # The constructor runs in an event loop, which waits for it.
        self.preparing.pool.submit(lambda: asyncio.run(self.probe())).result()

    def score(self, logits_BV: "torch.Tensor") -> Sequence[float]:
        """P(yes) of pairs that were asked about. Raises ValueError where the model has no words for yes and no."""
        if self.judgement is None:
            self.judgement = YesOrNo(self.generator)
        return self.judgement(logits_BV)

    @property
    def generator(self) -> "Embedder":
        """The model as one that answers. Raises ValueError where it is a dual encoder."""
        if self.lvlm is None:
            raise ValueError(f"model: {self.args.model} has no generator; serve a vision-language model")
        return self.lvlm

    async def describe(self) -> dict[str, Any]:
        """What the model says of itself; the constructor has used it by then."""
        generates = self.lvlm is not None  # a dual encoder cuts texts by itself, too
        return {**self.embedder.description(), "context": self.context, "cuts": not generates, "generates": generates}

    async def load(self) -> EngineLoad:
        """What the engine is busy with."""
        return self.engine.load()

    async def check_health(self) -> None:
        """Run the model. Serve replaces a replica for which this raises again and again."""
        if self.metrics is None:
            about = self.embedder.description()
            labels = {"model": self.args.model, "fingerprint": about["fingerprint"], "adapter": about["adapter"] or ""}
            self.metrics = EngineMetrics(labels)
        self.metrics.tell(self.engine.load())
        if self.engine.broken is not None:
            raise RuntimeError("the engine broke down") from self.engine.broken
        await asyncio.wait_for(self.probe(), HEALTH_S)

    @abstractmethod
    async def probe(self) -> None:
        """Use the model for real. Raises RuntimeError where it does not do what this replica is for."""
        ...

    def __del__(self) -> None:
        """Serve drops a replica that it stops."""
        if hasattr(self, "engine"):
            self.engine.close()
