"""Engine: the one loop that runs a replica's model, for batches of embeddings and for conversations, at the same time.

A *step* is planned anew every time, so that what arrives while the model is busy is in the next one:

1. Conversations that wait get a place, in the order of their arrival, while there are places and cache for them.
2. One forward for all conversations: the next token of every one that is being answered, and as much of the prompts
   that are not read yet as the budget of tokens has room for. Every conversation draws from its own random numbers.
3. One batch of items to embed, and one of prompts to score, each up to the budget: the step's while conversations are
   being answered, so that none waits long for its next token; a whole batch's otherwise. Requests take turns, item by
   item, so that a small one does not wait for a large one before it; an item that does not fit stays the next one.

On a CPU of several cores the items to embed have a thread of their own, where the runner allows it: forwards of few
tokens, as those of conversations are, leave cores idle. Each thread has all cores while the other has no work, and half
of them while it has.

Nothing else runs in these threads: tokenising and decoding images happen beside them. What is cancelled or late is
dropped before the next step, and its place is free in it.

Admission is by time: what is done before a request may take `max_queue_s`, at the pace of the last seconds. Requests
take turns, so a small one is not refused for a large one that waits, nor for the memory that this takes.
"""

import asyncio
import logging
import math
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from serve.deployments.batch_times import BatchTimes
from serve.deployments.runner import EmbedsBatches, Encoded, OpenConversation, TakesSteps
from serve.deployments.service_rate import ServiceRate
from serve.protocol.errors import INTERNAL, Failure

if TYPE_CHECKING:
    import torch

    from vladva.models.generation import AnswerText

logger = logging.getLogger("ray.serve")

LATE = Failure(408, "not answered in time; the work was cancelled", "deadline_exceeded")
SMALL_SHARE, LEFT_SHARE = 16, 4  # of the room for work: a quarter is left to requests of up to a sixteenth of it
CLOSED = Failure(503, "the replica is shutting down; try again", "unavailable")


@dataclass(frozen=True)
class EngineLimits:
    """What an engine takes on."""

    batch_tokens: int  # cost of a batch of items
    step_tokens: int  # of a step while conversations are being answered
    batch_wait_s: float  # how long the first item of an idle engine waits for others
    conversations: int  # answered at the same time
    cache_tokens: int  # of all conversations together
    queued_tokens: int  # accepted and not finished: a bound of memory
    queue_s: float  # how long what waits may take

    def refusal(self, cost: int, held: int, wait_s: float) -> Failure | None:
        """Why work cannot be taken on beside `held` tokens, `wait_s` of which come first; None where it can."""
        room = self.queued_tokens
        if cost > room // SMALL_SHARE:
            room -= room // LEFT_SHARE
        if cost > room:
            message = f"the request costs {cost:,} tokens; one request may cost at most {room:,}"
            return Failure(413, message, "request_too_large")
        if wait_s > self.queue_s or held + cost > room:
            again = max(1, math.ceil(wait_s - self.queue_s))
            message = f"{held:,} tokens of work are waiting, {wait_s:.1f} s of it before this; try again in {again} s"
            return Failure(429, message, "overloaded", retry_after=again)
        return None


@dataclass(frozen=True)
class TokenSampling:
    """How tokens are chosen, and when an answer ends."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    adapter: bool = False


@dataclass(frozen=True)
class Said:
    """A step's share of an answer: text that is certain now, how many tokens were made so far, and why it ended."""

    text: str
    tokens: int
    reason: str | None = None  # `stop`, `length`, or None: it goes on


@dataclass
class EngineCounters:
    """What an engine has done since it started."""

    steps: int = 0
    batches: int = 0
    batch_items: int = 0
    batch_cost: int = 0
    prompt_tokens: int = 0
    answer_tokens: int = 0
    busy_s: float = 0.0
    refused: int = 0
    cancelled: int = 0


@dataclass(frozen=True)
class EngineLoad:
    """What an engine is busy with now."""

    queued_cost: int  # of items to embed and to score
    queued_items: int
    waiting: int  # conversations
    answering: int
    wait_s: float  # that an item which arrives now is expected to wait
    counters: EngineCounters


@dataclass(eq=False)
class Held:
    """What is left to do of a request that was accepted."""

    cost: int
    items: int


@dataclass(eq=False)
class ItemJob:
    """The items of one request to embed or to score."""

    items: deque[tuple[int, Encoded]]
    results: list[Any]
    done: Callable[["ItemJob"], None]  # called in the engine's thread
    arrived: float
    deadline: float
    missing: int
    held: Held | None
    cancelled: bool = False


@dataclass(eq=False)
class AnswerJob:
    """A conversation, waiting or being answered."""

    encoded: Encoded
    sampling: TokenSampling
    say: Callable[[Said | Failure], None]  # called in the engine's thread
    deadline: float
    text: "AnswerText"
    generator: "torch.Generator"
    reserved: int = 0
    progress: OpenConversation | None = None
    made: int = 0
    cancelled: bool = False


@dataclass(eq=False)
class ItemQueue:
    """Items of one kind, their batches' function, and how long batches took."""

    forward: Callable[[Sequence[Encoded]], Iterable[Any]]
    jobs: "deque[ItemJob]" = field(default_factory=deque)
    times: BatchTimes = field(default_factory=BatchTimes)
    held: set[Held] = field(default_factory=set)  # accepted, not finished
    last_done: float = 0.0
    next_done: float = 0.0  # when the batch that is computed is expected to be done: until then nothing gets shorter

    @property
    def cost(self) -> int:
        """Of all that is accepted and not finished."""
        return sum(one.cost for one in self.held)

    def ahead_of(self, items: int) -> int:
        """Cost of what is done before so many items of a new request: requests take turns, item by item."""
        return sum(one.cost if one.items <= items else one.cost * items // one.items for one in self.held)

    @contextmanager
    def hold(self, cost: int, items: int) -> Iterator[Held]:
        """Count a request as accepted until it is done, or nobody waits for it any more."""
        held = Held(cost, items)
        self.held.add(held)
        try:
            yield held
        finally:
            self.held.remove(held)


@dataclass(eq=False)
class Lane:
    """A thread of an engine, and the kinds of work that are done in it."""

    queues: Sequence[ItemQueue]
    answers: bool  # whether conversations are among it
    began: float | None = None  # a step that is not done


class ModelEngine:
    """Runs a model in threads of its own. Methods are called from the event loop of the replica."""

    def __init__(
        self,
        embedding: EmbedsBatches,
        generation: TakesSteps | None,
        limits: EngineLimits,
        *,
        ends: set[int],
        text: Callable[[Sequence[str]], "AnswerText"],
        score: Callable[["torch.Tensor"], Sequence[float]],
        device: Any = "cpu",
        cores: int | None = None,
    ) -> None:
        """`ends`: tokens that end an answer. `text`: text of an answer with stop strings. `score`: of logits [B, V].

        A model without `generation` only embeds: nobody may ask the engine to answer or to score. `cores`: that a
        forward uses on a CPU; by default those of torch's threads.
        """
        import torch

        self.generation, self.limits, self.ends, self.text, self.device = generation, limits, ends, text, device
        self.cores = cores or torch.get_num_threads()
        self.name = uuid.uuid4().hex
        self.embeddings = ItemQueue(embedding.embed)
        self.scores = ItemQueue(lambda items: score(self.stepped.next_token_logits(items)))
        self.waiting: deque[AnswerJob] = deque()
        self.answering: list[AnswerJob] = []
        self.answer_rate = ServiceRate()  # tokens per second, of all answers together
        self.answer_length = 0.0  # tokens of an answer, a running mean
        self.answer_tokens = 0  # reserved by conversations that are waiting or being answered
        self.counters = EngineCounters()
        self.changed = threading.Condition()
        self.closed = False
        self.broken: BaseException | None = None
        self.counted_until = 0.0  # of the time at work
        if generation is not None and embedding.concurrent and self.on_cpu and self.cores > 1:
            self.lanes = [Lane([self.scores], answers=True), Lane([self.embeddings], answers=False)]
        else:
            self.lanes = [Lane([self.embeddings, self.scores], answers=True)]
        self.threads = [
            threading.Thread(target=self.run, args=[lane], name=f"vladva-engine-{number}", daemon=True)
            for number, lane in enumerate(self.lanes)
        ]
        for thread in self.threads:
            thread.start()

    @property
    def on_cpu(self) -> bool:
        """Whether the model computes on a CPU."""
        return str(self.device) == "cpu"

    @property
    def stepped(self) -> TakesSteps:
        """What runs conversations. Raises ValueError for a model that only embeds."""
        if self.generation is None:
            raise ValueError("the model only embeds")
        return self.generation

    # ------------------------------------------------------------------------------------------------ for the replica

    def refusal(self, queue: ItemQueue, cost: int, items: int) -> Failure | None:
        """Why so many items that cost so much cannot be taken on, or None where they can."""
        refusal = self.refuse(cost, queue.cost, self.wait_s(queue, items))
        return refusal and self.for_everybody(refusal, self.wait_s(queue), queue.next_done - time.monotonic())

    def wait_s(self, queue: ItemQueue, items: int = 1) -> float:
        """How long so many items that arrive now are expected to wait for others."""
        return queue.times.seconds_for(queue.ahead_of(items), self.batch_budget(queue))

    def batch_budget(self, queue: ItemQueue) -> int:
        """Cost at which a batch is full: one that answers wait for is small, so that none waits long for its token."""
        waited_for = self.answering and queue in self.lanes[0].queues
        return self.limits.step_tokens if waited_for else self.limits.batch_tokens

    def answer_refusal(self, tokens: int) -> Failure | None:
        """Why a conversation of so many tokens, answer included, cannot be taken on, or None where it can."""
        wait_s = self.answer_wait_s()
        refusal = self.refuse(tokens, self.answer_tokens, wait_s)
        return refusal and self.for_everybody(refusal, wait_s)

    def refuse(self, cost: int, held: int, wait_s: float) -> Failure | None:
        """Why work cannot be taken on beside `held` tokens, `wait_s` of which come first."""
        refusal = CLOSED if self.closed else self.limits.refusal(cost, held, wait_s)
        self.counters.refused += refusal is not None and refusal.status == 429
        return refusal

    def for_everybody(self, refusal: Failure, least_wait_s: float, unchanged_s: float = 0.0) -> Failure:
        """A refusal that says for how long anybody would be refused, where even the least would wait for too long."""
        too_long_s = least_wait_s - self.limits.queue_s
        if refusal.status != 429 or too_long_s <= 0:
            return refusal
        return replace(refusal, full_s=max(too_long_s, unchanged_s), full_by=self.name)

    def answer_wait_s(self) -> float:
        """How long a conversation that arrives now is expected to wait for a place."""
        if not self.waiting:
            return 0.0
        expected = sum(min(job.sampling.max_tokens, self.answer_length or math.inf) for job in list(self.waiting))
        return self.answer_rate.seconds_for(expected)

    @contextmanager
    def hold_answer(self, tokens: int) -> Iterator[None]:
        """Count a conversation of so many tokens as accepted until it is answered, or nobody waits for it any more."""
        self.answer_tokens += tokens
        try:
            yield
        finally:
            self.answer_tokens -= tokens

    async def items(
        self, queue: ItemQueue, items: Sequence[Encoded], deadline_s: float, held: Held | None = None
    ) -> list[Any] | Failure:
        """A result or a `Failure` for every item, in order; they are dropped where the caller is cancelled.

        held: what is left of the request that they are of.
        """
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[ItemJob] = loop.create_future()
        now = time.monotonic()
        job = ItemJob(
            deque(enumerate(items)),
            [None] * len(items),
            lambda job: call_soon(loop, settle, finished, job),
            now,
            now + deadline_s,
            len(items),
            held,
        )
        try:
            with self.changed:
                if self.closed:
                    return CLOSED
                queue.jobs.append(job)
                self.changed.notify_all()
            return (await finished).results
        finally:
            job.cancelled = True

    async def answer(
        self, encoded: Encoded, sampling: TokenSampling, deadline_s: float
    ) -> AsyncGenerator[Said | Failure, None]:
        """What is said, step by step, the steps that the caller did not wait for together."""
        import torch

        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Said | Failure] = asyncio.Queue()
        seed = int.from_bytes(os.urandom(8), "little") >> 1 if sampling.seed is None else sampling.seed
        job = AnswerJob(
            encoded,
            sampling,
            lambda event: call_soon(loop, events.put_nowait, event),
            time.monotonic() + deadline_s,
            self.text(sampling.stop),
            torch.Generator(self.device).manual_seed(seed),
            len(encoded.ids) + sampling.max_tokens,
        )
        try:
            with self.changed:
                if self.closed:
                    yield CLOSED
                    return
                self.waiting.append(job)
                self.changed.notify_all()
            while True:
                event = await events.get()
                while isinstance(event, Said) and event.reason is None and not events.empty():
                    event = joined(event, events.get_nowait())
                yield event
                if isinstance(event, Failure) or event.reason is not None:
                    return
        finally:
            job.cancelled = True

    def load(self) -> EngineLoad:
        """What the engine is busy with."""
        queues = (self.embeddings, self.scores)
        return EngineLoad(
            queued_cost=sum(queue.cost for queue in queues),
            queued_items=sum(len(job.items) for queue in queues for job in list(queue.jobs)),
            waiting=len(self.waiting),
            answering=len(self.answering),
            wait_s=self.wait_s(self.embeddings),
            counters=self.counters,
        )

    def close(self) -> None:
        """Fail what is left, and end the threads."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        for thread in self.threads:
            thread.join()

    # ---------------------------------------------------------------------------------------------------- the threads

    def run(self, lane: Lane) -> None:
        """Step after step."""
        try:
            while self.wait_for_work(lane):
                self.step(lane)
        except BaseException as error:
            logger.exception("the engine broke down")
            self.broken = error
        with self.changed:
            self.closed = True
            self.changed.notify_all()
        self.fail_all(lane)

    def has_work(self, lane: Lane) -> bool:
        """Whether there is anything to do in a lane."""
        return any(queue.jobs for queue in lane.queues) or (lane.answers and bool(self.answering or self.waiting))

    def wait_for_work(self, lane: Lane) -> bool:
        """Return True when there is work, False when the engine is closed."""
        with self.changed:
            idle = False
            while not self.closed and not self.has_work(lane):
                idle = True
                self.changed.wait()
            closed = self.closed
        if idle and not closed and not (lane.answers and self.waiting) and self.limits.batch_wait_s:
            time.sleep(self.limits.batch_wait_s)
        return not closed

    def step(self, lane: Lane) -> None:
        """One step of all kinds of work of a lane."""
        from vladva.models.packed.cpu_linear import use_cores

        lane.began = time.monotonic()
        if self.on_cpu:
            busy = sum(other.began is not None or self.has_work(other) for other in self.lanes)
            use_cores(max(1, self.cores // busy))
        self.drop(lane)
        if lane.answers:
            self.admit()
            if self.answering:
                self.advance()
        for queue in lane.queues:
            self.run_batch(queue, self.batch_budget(queue))
        with self.changed:
            now = time.monotonic()
            first = min(one.began for one in self.lanes if one.began is not None)
            self.counters.busy_s += now - max(first, self.counted_until)
            self.counted_until = now
            self.counters.steps += 1
            lane.began = None

    def drop(self, lane: Lane) -> None:
        """Forget what is cancelled or late."""
        now = time.monotonic()
        late: list[AnswerJob] = []
        with self.changed:
            for queue in lane.queues:
                for job in [job for job in queue.jobs if job.cancelled or now > job.deadline]:
                    queue.jobs.remove(job)
                    self.counters.cancelled += 1
                    for number, _ in job.items:
                        job.results[number] = LATE
                    job.done(job)
            if lane.answers:
                late = [one for one in (*self.waiting, *self.answering) if one.cancelled or now > one.deadline]
        for one in late:
            self.counters.cancelled += 1
            self.finish(one, LATE)

    def admit(self) -> None:
        """Give conversations a place, in order, while there are places and cache."""
        held = sum(self.stepped.reserved(job.reserved) for job in self.answering)
        while self.waiting and len(self.answering) < self.limits.conversations:
            job = self.waiting[0]
            tokens = self.stepped.reserved(job.reserved)
            if self.answering and held + tokens > self.limits.cache_tokens:
                return
            self.waiting.popleft()
            try:
                job.progress = self.stepped.begin(job.encoded, job.reserved, adapter=job.sampling.adapter)
            except Exception:
                logger.exception("a conversation cannot be begun")
                job.say(INTERNAL)
                continue
            held += tokens
            self.answering.append(job)

    def advance(self) -> None:
        """A forward for all conversations: their next tokens, and prompts up to the budget."""
        began = time.monotonic()
        parts: list[tuple[AnswerJob, int]] = []
        room = self.limits.step_tokens
        for job in self.answering:
            assert job.progress is not None
            if job.progress.last is not None:
                parts.append((job, 1))
                room -= 1
        room = max(room, 1)  # prompts get on, however many answers there are
        for job in self.answering:
            assert job.progress is not None
            if job.progress.last is None and room > 0:
                parts.append((job, min(room, job.progress.unread)))
                room -= job.progress.unread
                self.counters.prompt_tokens += parts[-1][1]
        made = 0
        for (job, _), logits in zip(parts, self.forward(parts), strict=True):
            if isinstance(logits, Failure):
                self.finish(job, logits)
            elif logits is not None:
                self.say_next(job, logits)
                made += 1
        if made:
            self.counters.answer_tokens += made
            self.answer_rate.record(made, time.monotonic() - began)

    def forward(self, parts: Sequence[tuple[AnswerJob, int]]) -> list[Any]:
        """Logits [V], None or a `Failure` for every conversation: an error is the failure of the one that causes it."""
        try:
            return list(self.stepped.step([(job.progress, tokens) for job, tokens in parts if job.progress]))
        except Exception:
            if len(parts) == 1:
                logger.exception("a conversation cannot be answered")
                return [INTERNAL]
            return [self.forward([part])[0] for part in parts]

    def say_next(self, job: AnswerJob, logits: "torch.Tensor") -> None:
        """Choose the next token, and say what is certain now."""
        from vladva.models.generation import choose_token

        sampling = job.sampling
        token = choose_token(logits, sampling.temperature, sampling.top_p, job.generator)
        assert job.progress is not None
        job.progress.last = token
        job.made += 1
        ended = token in self.ends
        text = "" if ended else job.text.add(token)
        reason = None
        if ended or job.text.stopped:
            reason = "stop"
        elif job.made == sampling.max_tokens:
            reason = "length"
        if reason is None:
            if text:
                job.say(Said(text, job.made))
            return
        if not job.text.stopped:
            text += job.text.end()
            reason = "stop" if job.text.stopped else reason
        self.answer_length += (job.made - self.answer_length) * (0.1 if self.answer_length else 1.0)
        self.finish(job, Said(text, job.made, reason))

    def finish(self, job: AnswerJob, event: Said | Failure) -> None:
        """Free the place of a conversation, and say the last thing."""
        if job.progress is None:
            with self.changed:
                self.waiting.remove(job)
        else:
            self.answering.remove(job)
            self.stepped.end(job.progress)
        job.say(event)

    def run_batch(self, queue: ItemQueue, budget: int) -> None:
        """One batch of items."""
        batch = next_batch(queue.jobs, budget, self.changed)
        if not batch:
            return
        items = [item for _, _, item in batch]
        cost = sum(item.cost for item in items)
        queue.next_done = time.monotonic() + queue.times.of_batch(cost)
        results = self.results(queue, items)
        now = time.monotonic()
        began = max(queue.last_done, min(job.arrived for job, _, _ in batch))
        queue.times.record(cost, now - began)
        queue.last_done = now
        with self.changed:
            self.counters.batches += 1
            self.counters.batch_items += len(items)
            self.counters.batch_cost += cost
        for (job, number, item), result in zip(batch, results, strict=True):
            job.results[number] = result
            if job.held:
                job.held.cost -= item.cost
                job.held.items -= 1
            job.missing -= 1
            if not job.missing:
                job.done(job)

    def results(self, queue: ItemQueue, items: Sequence[Encoded]) -> list[Any]:
        """A result or a `Failure` for every item: an error is the failure of the item that causes it."""
        try:
            return list(queue.forward(items))
        except Exception as error:
            if len(items) == 1:
                logger.exception("an item cannot be computed")
                return [INTERNAL]
            # By halves: what does not fit the device's memory together is computed in as few batches as possible.
            logger.warning("a batch of %d items failed and is halved: %s", len(items), type(error).__name__)
            middle = len(items) // 2
            return [*self.results(queue, items[:middle]), *self.results(queue, items[middle:])]

    def fail_all(self, lane: Lane) -> None:
        """Nothing waits for an engine that has ended."""
        with self.changed:
            for queue in lane.queues:
                for job in queue.jobs:
                    for number, _ in job.items:
                        job.results[number] = CLOSED
                    job.done(job)
                queue.jobs.clear()
            if not lane.answers:
                return
            for answer in [*self.waiting, *self.answering]:
                answer.say(CLOSED)
            self.waiting.clear()
            self.answering.clear()


def next_batch(jobs: "deque[ItemJob]", budget: int, lock: threading.Condition) -> list[tuple[ItemJob, int, Encoded]]:
    """Items up to a cost of `budget`, one of each job in turn; the first one whatever it costs."""
    batch: list[tuple[ItemJob, int, Encoded]] = []
    with lock:
        while jobs:
            job = jobs[0]
            number, item = job.items[0]
            if batch and item.cost > budget:
                break
            budget -= item.cost
            job.items.popleft()
            batch.append((job, number, item))
            jobs.popleft()
            if job.items:
                jobs.append(job)
    return batch


def joined(first: Said, second: Said | Failure) -> Said | Failure:
    """Two things said one after the other as one."""
    return second if isinstance(second, Failure) else Said(first.text + second.text, second.tokens, second.reason)


def settle(future: "asyncio.Future[ItemJob]", job: ItemJob) -> None:
    """Give a future its result, where it still waits for one."""
    if not future.done():
        future.set_result(job)


def call_soon(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    """Call a function in the event loop, from another thread; a loop that is closed has nobody who waits."""
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        logger.debug("the event loop is closed")
