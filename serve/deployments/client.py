"""Backend: the two deployments as the routes see them: with a deadline, and Serve's own errors in the one shape."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any

from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, DeploymentStatusTrigger

from serve.config import ServeArgs
from serve.deployments.embedding import ItemEmbedding
from serve.deployments.full_replicas import FullReplicas
from serve.deployments.generation import Conversation, Judged, Sampling, Started, WholeAnswer
from serve.deployments.served_models import Served, described_by_files
from serve.protocol.errors import REPLICA_OUTDATED, ApiError, Failure
from serve.protocol.items import EmbedItem, Limits

CALL_ATTEMPTS = 7
FIRST_WAIT_S, LONGEST_WAIT_S = 0.1, 3.0  # between them
DESCRIBE_S = 30.0
DESCRIBED_S = 5.0  # how long an answer is believed: an update may bring another model
OUTDATED_WAIT_S = 1.0
RUNNING, STOPPING = "RUNNING", "STOPPING"  # states of a replica: one answers, the other is about to go
STATUS_S = 5.0  # for Serve's controller to say who is asleep
OVERLOADED = (429, "the queue is full; try again later", "overloaded")
REPLICA_UNAVAILABLE = (503, "the deployment is not available at the moment; try again later", "unavailable")


def deadline_error(deadline_s: float) -> ApiError:
    """The refusal of a request whose time is up."""
    return ApiError(408, f"not answered within {deadline_s:g} s; the work was cancelled", "deadline_exceeded")


async def call(method: DeploymentHandle, *args: Any, deadline_s: float) -> Any:
    """The result of an idempotent method. Tried again on another replica where one dies; cancelled when the time is up.

    While an application is updated, replicas with its old arguments refuse what they know nothing of: then it waits for
    a new one. Raises ApiError for what the method refuses, 408, 429 and 503.
    """
    end = time.monotonic() + deadline_s
    deaths = 0
    while True:
        response = method.remote(*args)
        try:
            result = await asyncio.wait_for(response, end - time.monotonic())
        except asyncio.TimeoutError:
            response.cancel()
            raise deadline_error(deadline_s) from None
        except asyncio.CancelledError:
            response.cancel()
            raise
        except BackPressureError:
            raise ApiError(*OVERLOADED) from None
        except (RayActorError, DeploymentUnavailableError):
            deaths += 1
            if deaths == CALL_ATTEMPTS:
                raise ApiError(*REPLICA_UNAVAILABLE) from None
            await asyncio.sleep(again_in(deaths - 1))
            continue
        if result == REPLICA_OUTDATED and time.monotonic() + OUTDATED_WAIT_S < end:
            await asyncio.sleep(OUTDATED_WAIT_S)
            continue
        if isinstance(result, Failure):
            raise ApiError.of(result)
        return result


async def stream(method: DeploymentHandle, *args: Any, deadline_s: float) -> AsyncGenerator[Any, None]:
    """What `answer` yields; cancelled when the caller stops listening or the time is up.

    `Started` is told with what comes after it: until then nothing is out, and where the replica dies another one
    answers. Raises ApiError for what the method refuses, 408, 429 and 503.
    """
    end = time.monotonic() + deadline_s
    for attempt in range(CALL_ATTEMPTS):
        responses: Any = method.options(stream=True).remote(*args)
        untold: list[Any] = []
        told = False
        try:
            while True:
                event = await asyncio.wait_for(anext(responses), end - time.monotonic())
                if told and isinstance(event, Failure):
                    raise ApiError.of(event)
                untold.append(event)
                if not isinstance(event, Started):
                    told = True
                    for one in untold:
                        yield one
                    untold.clear()
        except StopAsyncIteration:
            return
        except asyncio.TimeoutError:
            raise deadline_error(deadline_s) from None
        except BackPressureError:
            raise ApiError(*OVERLOADED) from None
        except (RayActorError, DeploymentUnavailableError):
            if told or attempt + 1 == CALL_ATTEMPTS:
                raise ApiError(*REPLICA_UNAVAILABLE) from None
        finally:
            responses.cancel()
        await asyncio.sleep(again_in(attempt))


def again_in(attempt: int) -> float:
    """Seconds to wait after so many deaths before this one: the router hears of them a moment later than we do."""
    return min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)


def running_replicas(deployment: str, application: str) -> int:
    """How many replicas a deployment has."""
    states = serve.status().applications[application].deployments[deployment].replica_states
    return sum(count for state, count in states.items() if state == RUNNING)


def is_asleep(deployment: DeploymentStatusOverview) -> bool:
    """Whether a deployment has no replica for want of load, and is well: the last is about to go, or the first to come.

    Requests that come meanwhile are answered once it is up.
    """
    states = {state for state, count in deployment.replica_states.items() if count}
    if deployment.status == DeploymentStatus.UPSCALING:
        return deployment.status_trigger == DeploymentStatusTrigger.AUTOSCALING and RUNNING not in states
    return deployment.status in (DeploymentStatus.HEALTHY, DeploymentStatus.DOWNSCALING) and states <= {STOPPING}


async def sleeping() -> set[str]:
    """The deployments of this application that are asleep or waking; none where nobody can say."""
    name = serve.get_replica_context().app_name

    def asleep() -> set[str]:
        deployments = serve.status().applications[name].deployments
        return {one for one, status in deployments.items() if is_asleep(status)}

    try:
        return await asyncio.wait_for(asyncio.to_thread(asleep), STATUS_S)
    except Exception:  # Serve's controller is being replaced; the deployments can be asked nevertheless
        return set()


class Backend:
    """What the routes call. created: when the application was made, the same in every ingress replica."""

    def __init__(
        self, args: ServeArgs, discriminative: DeploymentHandle, generative: DeploymentHandle, created: int
    ) -> None:
        self.args = args
        self.created = created
        self.discriminative = discriminative
        self.generative = generative
        name = serve.get_replica_context().app_name
        self.embedding_full, self.answering_full = (
            FullReplicas(partial(running_replicas, handle.deployment_name, name))
            for handle in (discriminative, generative)
        )
        self._served: Served | None = None
        self._asked = 0.0
        self._asking: asyncio.Task[Served] | None = None

    async def served(self) -> Served:
        """The models that this application serves. What was heard lately is believed; nobody waits for news of it."""
        if self._asking is None and time.monotonic() > self._asked + DESCRIBED_S:
            self._asking = asyncio.create_task(self._ask())
        if self._served is not None:
            return self._served
        assert self._asking is not None
        return await asyncio.shield(self._asking)

    async def served_unwoken(self) -> Served:
        """The same, for those who only look: a deployment that sleeps is not woken, nor kept awake.

        What nobody has heard from it yet is read from the model's files.
        """
        if time.monotonic() <= self._asked + DESCRIBED_S or self.discriminative.deployment_name not in await sleeping():
            return await self.served()
        if self._served is None:
            self._served = await asyncio.to_thread(described_by_files, self.args)
        return self._served

    async def _ask(self) -> Served:
        try:
            description = await call(self.discriminative.describe, deadline_s=DESCRIBE_S)
            self._served = Served.of(self.args.model, self.args.name, description)
            self._asked = time.monotonic()
            return self._served
        except ApiError:
            if self._served is None:
                raise
            return self._served  # no replica answers at the moment; their models are what they were
        finally:
            self._asking = None

    async def limits(self) -> Limits:
        """Caps on what a request may carry, those of the model included."""
        description = (await self.served()).description
        return self.args.limits.of_model(
            description["context"], cuts=description["cuts"], mixes=description["generates"]
        )

    async def call(self, method: str, *args: Any) -> Any:
        """The result of a method of the discriminative deployment."""
        return await call(getattr(self.discriminative, method), *args, deadline_s=self.args.deadline_s)

    async def embed(self, items: Sequence[EmbedItem | Failure], fields: Sequence[str]) -> list[ItemEmbedding | Failure]:
        """Embeddings in order, with a `Failure` in the place of a bad item; `fields` name the items in its message."""
        good = [item for item in items if isinstance(item, EmbedItem)]
        with self.embedding_full.listening():
            embedded = iter(await self.call("embed", good) if good else [])
        results = []
        for item, field in zip(items, fields, strict=True):
            result = item if isinstance(item, Failure) else next(embedded)
            results.append(result.with_param(field) if isinstance(result, Failure) and item is not result else result)
        return results

    async def answer(self, conversation: Conversation, sampling: Sampling) -> AsyncGenerator[Any, None]:
        """`Started`, pieces of text, `Finished`; or a `Failure` and nothing else."""
        events = stream(self.generative.answer, conversation, sampling, deadline_s=self.args.deadline_s)
        with self.answering_full.listening():
            async with aclosing(events):
                async for event in events:
                    yield event

    async def whole_answer(self, conversation: Conversation, sampling: Sampling) -> WholeAnswer:
        """The answer at once; tried again on another replica where one dies."""
        with self.answering_full.listening():
            return await call(self.generative.whole_answer, conversation, sampling, deadline_s=self.args.deadline_s)

    async def judge(self, queries: list[EmbedItem], documents: list[EmbedItem]) -> list[Judged | Failure]:
        """By the generator, how probably each document matches its query, or the one there is."""
        return await call(self.generative.judge, queries, documents, deadline_s=self.args.deadline_s)
