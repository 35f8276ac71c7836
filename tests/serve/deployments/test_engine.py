"""The engine's answers are those of each conversation by itself, whatever else it does; and what it does when."""

from __future__ import annotations

import asyncio
import gc
import random
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, aclosing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import numpy as np
import pytest
import torch

from serve.deployments.engine import EngineLimits, ItemQueue, ModelEngine, Said, TokenSampling
from serve.deployments.runner import EmbedsBatches, Encoded, OpenConversation, TakesSteps
from serve.deployments.runners import PackedRunner, PlainRunner, runners_of
from serve.deployments.service_rate import ServiceRate
from serve.protocol.errors import Failure
from tests.support import families
from tests.support.wire import noise_image
from vladva.models.generation import AnswerText, choose_token

if TYPE_CHECKING:
    from vladva.models.embedder import Embedder

T = TypeVar("T")
LIMITS = EngineLimits(
    batch_tokens=2000,
    step_tokens=64,
    batch_wait_s=0.0,
    conversations=6,
    cache_tokens=4096,
    queued_tokens=50_000,
    queue_s=30,
)
QUESTIONS = [
    "what is it",
    "Describe the image in detail.",
    "a red circle",
    "hello there, how many shapes",
    "x",
]


def prompt(embedder: Embedder, number: int) -> Encoded:
    """A question, every other one about an image."""
    images = [noise_image(number)] if number % 2 else []
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": QUESTIONS[number % len(QUESTIONS)]}]
    ids = embedder.preprocessor.render([{"role": "user", "content": content}], [image.size for image in images])
    return Encoded(ids, embedder.preprocessor.pixels(images) if images else None, len(ids))


def text_item(embedder: Embedder, text: str) -> Encoded:
    """A text to embed."""
    ids = embedder.preprocessor.text_prompt(text)
    return Encoded(ids, None, len(ids))


def sampling(number: int) -> TokenSampling:
    """Greedy, or drawn with a seed; the adapter on, or off."""
    return TokenSampling(
        max_tokens=5 + 7 * (number % 3),
        temperature=[0.0, 1.2, 0.7][number % 3],
        top_p=[1.0, 0.9][number % 2],
        seed=number,
        adapter=number % 4 == 1,
    )


def ends_of(embedder: Embedder) -> set[int]:
    """Tokens that end an answer."""
    ends = embedder.model.base.generation_config.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends)


def alone(embedder: Embedder, encoded: Encoded, how: TokenSampling) -> Said:
    """The answer, one conversation in the model and nothing else, by transformers' forward."""
    runner = PlainRunner(embedder)
    progress = runner.begin(encoded, len(encoded.ids) + how.max_tokens, adapter=how.adapter)
    generator = torch.Generator().manual_seed(how.seed or 0)
    text, tokens = AnswerText(embedder.preprocessor.tokenizer, how.stop), 0
    said = ""
    while tokens < how.max_tokens:
        progress.last = choose_token(runner.advance(progress), how.temperature, how.top_p, generator)
        tokens += 1
        if progress.last in ends_of(embedder):
            return Said(said + text.end(), tokens, "stop")
        said += text.add(progress.last)
        if text.stopped:
            return Said(said, tokens, "stop")
    said += text.end()
    return Said(said, tokens, "stop" if text.stopped else "length")


class BothModes(EmbedsBatches, TakesSteps, Protocol):
    """A runner that does all."""


class Recorded:
    """A runner that notes what it is asked for, and can be held up."""

    def __init__(self, runner: BothModes) -> None:
        self.runner = runner
        self.batches: list[list[Encoded]] = []
        self.steps: list[list[tuple[OpenConversation, int]]] = []
        self.asked = 0  # batches that were begun
        self.cores: dict[str, list[int]] = {"embed": [], "step": []}  # that each forward had
        self.go = threading.Event()
        self.go.set()
        self.go_on = threading.Event()  # the same of steps
        self.go_on.set()

    @property
    def concurrent(self) -> bool:
        return self.runner.concurrent

    def embed(self, items: Sequence[Encoded]) -> np.ndarray:
        self.asked += 1
        self.cores["embed"].append(torch.get_num_threads())
        self.go.wait(30)
        self.batches.append(list(items))
        return self.runner.embed(items)

    def next_token_logits(self, items: Sequence[Encoded]) -> torch.Tensor:
        return self.runner.next_token_logits(items)

    def reserved(self, tokens: int) -> int:
        return self.runner.reserved(tokens)

    def begin(self, encoded: Encoded, tokens: int, *, adapter: bool) -> OpenConversation:
        return self.runner.begin(encoded, tokens, adapter=adapter)

    def step(self, parts: Sequence[tuple[OpenConversation, int]]) -> list[torch.Tensor | None]:
        self.cores["step"].append(torch.get_num_threads())
        self.go_on.wait(30)
        self.steps.append([(progress, progress.unread) for progress, _ in parts])
        if any(progress.encoded.cost < 0 for progress, _ in parts):
            raise RuntimeError("a conversation that breaks every forward that it is in")
        return self.runner.step(parts)

    def end(self, progress: OpenConversation) -> None:
        self.runner.end(progress)


def engine_of(embedder: Embedder, runner: BothModes, limits: EngineLimits = LIMITS, cores: int = 1) -> ModelEngine:
    """An engine on a runner; items are scored by the logit of token 7."""
    tokenizer = embedder.preprocessor.tokenizer
    return ModelEngine(
        runner,
        runner,
        limits,
        ends=ends_of(embedder),
        text=lambda stop: AnswerText(tokenizer, stop),
        score=lambda logits: logits[:, 7].tolist(),
        cores=cores,
    )


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small products: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def recorded(embedder: Embedder) -> Recorded:
    return Recorded(PackedRunner(embedder))


@pytest.fixture(params=[1, 2], ids=["one core", "two cores"])
def engine(embedder: Embedder, recorded: Recorded, request: pytest.FixtureRequest) -> Iterator[ModelEngine]:
    """With one thread for all work, and with one for items to embed and one for the rest."""
    engine = engine_of(embedder, recorded, cores=request.param)
    yield engine
    engine.close()
    assert not engine.answering
    assert not engine.waiting
    assert engine.broken is None


async def answered(
    engine: ModelEngine, encoded: Encoded, how: TokenSampling, leave_after: int = 10**9
) -> Said | Failure:
    """The whole answer, or what there was of it when the caller left."""
    whole = Said("", 0)
    async with aclosing(engine.answer(encoded, how, 60)) as events:
        async for event in events:
            if isinstance(event, Failure):
                return event
            whole = Said(whole.text + event.text, event.tokens, event.reason)
            if event.tokens >= leave_after:
                break
    return whole


def run(work: Coroutine[Any, Any, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, 120))


async def until(condition: Callable[[], bool]) -> None:
    """Return when it holds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        await asyncio.sleep(0.005)


def test_answers_made_together_are_those_made_alone(
    embedder: Embedder, engine: ModelEngine, recorded: Recorded
) -> None:
    """Joining and leaving at random, greedy and drawn, adapter on and off, with embeddings between them."""
    numbers = random.Random(0)
    asked = [(prompt(embedder, number), sampling(number)) for number in range(18)]
    expected = [alone(embedder, *one) for one in asked]
    texts = [f"{text} {i}" for i in range(4) for text in QUESTIONS]
    vectors = embedder.embed_texts(texts)
    leaving = {number: numbers.randint(1, 4) for number in numbers.sample(range(18), 5)}

    async def one(number: int) -> Said | Failure:
        await asyncio.sleep(numbers.random() * 0.3)
        return await answered(engine, *asked[number], leave_after=leaving.get(number, 10**9))

    async def embed(part: int) -> list[Any] | Failure:
        await asyncio.sleep(numbers.random() * 0.3)
        items = [text_item(embedder, text) for text in texts[part::4]]
        return await engine.items(engine.embeddings, items, 60)

    async def work() -> tuple[list[Any], list[Any]]:
        answers = [asyncio.create_task(one(number)) for number in range(18)]
        embeddings = [asyncio.create_task(embed(part)) for part in range(4)]
        results = await asyncio.gather(*answers), await asyncio.gather(*embeddings)
        await until(lambda: not engine.answering)
        return results

    answers, embeddings = run(work())
    for number, (found, right) in enumerate(zip(answers, expected, strict=True)):
        if number in leaving:
            assert right.text.startswith(found.text)
        else:
            assert found == right
    for part, found in enumerate(embeddings):
        np.testing.assert_allclose(np.stack(found), vectors[part::4], atol=1e-5)
    # How many meet in a step depends on how fast the machine is: some do, and never more than the limit.
    assert 1 < max(len(step) for step in recorded.steps) <= LIMITS.conversations
    # What equality is worth: another seed, and the other setting of the adapter, give other answers.
    assert alone(embedder, asked[1][0], TokenSampling(12, 1.2, 0.9, 99, adapter=True)) != expected[1]
    assert isinstance(recorded.runner, PackedRunner)
    assert recorded.runner.generation.cache.in_use == 0


def test_usage_and_reason_are_of_the_tokens_that_were_made(embedder: Embedder, engine: ModelEngine) -> None:
    """Also where encoding the text again gives another number of tokens."""
    encoded = prompt(embedder, 1)
    differing = 0
    for seed in range(12):
        how = TokenSampling(max_tokens=6, temperature=2.0, seed=seed)
        found, right = run(answered(engine, encoded, how)), alone(embedder, encoded, how)
        assert found == right
        assert isinstance(found, Said)
        assert found.reason == "stop" or found.tokens == 6
        differing += embedder.preprocessor.count_tokens([found.text]) != [found.tokens]
    assert differing > 0
    whole = alone(embedder, encoded, TokenSampling(200))
    assert whole.reason == "stop"
    assert run(answered(engine, encoded, TokenSampling(whole.tokens))) == whole  # the end token is the last allowed one
    cut = run(answered(engine, encoded, TokenSampling(whole.tokens - 1)))
    assert (cut.text, cut.tokens, cut.reason) == (whole.text, whole.tokens - 1, "length")


def test_a_stop_string_frees_the_place(embedder: Embedder, engine: ModelEngine) -> None:
    encoded = prompt(embedder, 1)
    whole = alone(embedder, encoded, TokenSampling(200))
    word = whole.text.split()[2]
    found = run(answered(engine, encoded, TokenSampling(200, stop=[word])))
    assert found.text == whole.text[: whole.text.index(word)]
    assert found.reason == "stop"
    assert found.tokens < whole.tokens


def test_a_new_conversation_waits_for_no_other(embedder: Embedder, engine: ModelEngine, recorded: Recorded) -> None:
    """Its first token is there three steps after it came, while others go on."""

    async def work() -> tuple[int, int]:
        long = [asyncio.create_task(answered(engine, prompt(embedder, 2), endless(n))) for n in range(5)]
        await until(lambda: len(recorded.steps) > 5)
        before = len(recorded.steps)
        async with aclosing(engine.answer(prompt(embedder, 3), TokenSampling(3), 60)) as events:
            await anext(events)
            steps = next(i for i, step in enumerate(recorded.steps) if any(p.encoded.pixels for p, _ in step))
        assert len(engine.answering) >= 5
        for task in long:
            task.cancel()
        await until(lambda: not engine.answering)
        return before, steps

    engine.ends = set()
    before, joined = run(work())
    assert joined - before <= 3


def endless(seed: int, tokens: int = 400) -> TokenSampling:
    """An answer that goes on."""
    return TokenSampling(tokens, temperature=2.0, seed=seed)


def test_items_gather_while_the_model_is_busy_and_keep_their_order(
    embedder: Embedder, engine: ModelEngine, recorded: Recorded
) -> None:
    """Thirty-two callers of one item each: after the first, all that came meanwhile share a batch."""
    items = [text_item(embedder, f"number {i}") for i in range(33)]

    async def work() -> None:
        recorded.go.clear()
        tasks = [asyncio.create_task(engine.items(engine.embeddings, [items[0]], 60))]
        await until(lambda: recorded.asked == 1)
        for item in items[1:]:
            tasks.append(asyncio.create_task(engine.items(engine.embeddings, [item], 60)))
            await asyncio.sleep(0)
        recorded.go.set()
        await asyncio.gather(*tasks)

    run(work())
    assert [len(batch) for batch in recorded.batches] == [1, 32]
    assert recorded.batches[1] == items[1:]


def test_what_does_not_fit_is_first_in_the_next_batch_and_small_requests_pass_large_ones(
    embedder: Embedder, engine: ModelEngine, recorded: Recorded
) -> None:
    ids = embedder.preprocessor.text_prompt("x")

    def item(cost: int) -> Encoded:
        return Encoded(ids, None, cost)

    large, wide, small = [item(900) for _ in range(5)], item(1500), item(10)

    async def work() -> None:
        recorded.go.clear()
        tasks = [asyncio.create_task(engine.items(engine.embeddings, [item(1)], 60))]
        await until(lambda: recorded.asked == 1)
        for one in (large, [wide], [small]):
            tasks.append(asyncio.create_task(engine.items(engine.embeddings, one, 60)))
            await asyncio.sleep(0)
        recorded.go.set()
        await asyncio.gather(*tasks)

    run(work())
    _, second, third, *_ = recorded.batches
    assert second == [large[0]]  # 900, and 1,500 do not fit into 2,000
    assert third[:2] == [wide, small]
    assert sum(len(batch) for batch in recorded.batches) == 8


@pytest.mark.parametrize("cores", [1, 2])
def test_on_two_cores_answers_go_on_while_a_batch_is_computed(
    embedder: Embedder, recorded: Recorded, cores: int
) -> None:
    """On one they wait for it. Each kind of work has both cores while there is no other."""
    engine = engine_of(embedder, recorded, cores=cores)
    item = text_item(embedder, "a")

    async def work() -> bool:
        await engine.items(engine.embeddings, [item], 60)
        await until(lambda: all(lane.began is None for lane in engine.lanes))  # its step ends after its result
        await answered(engine, prompt(embedder, 2), TokenSampling(3))
        recorded.go.clear()
        embedding = asyncio.create_task(engine.items(engine.embeddings, [item], 60))
        await until(lambda: recorded.asked == 2)
        answer = asyncio.create_task(answered(engine, prompt(embedder, 2), TokenSampling(8)))
        done, _ = await asyncio.wait({answer}, timeout=30 if cores == 2 else 0.5)
        assert not embedding.done()
        recorded.go.set()
        if cores == 2:  # what comes while a step is under way shares the cores with it
            recorded.go_on.clear()
            steps = len(recorded.cores["step"])
            later = asyncio.create_task(answered(engine, prompt(embedder, 2), TokenSampling(2)))
            await until(lambda: len(recorded.cores["step"]) == steps + 1)
            await engine.items(engine.embeddings, [item], 60)
            assert recorded.cores["embed"][-1] == 1
            recorded.go_on.set()
            await later
        said = await answer
        assert isinstance(said, Said)
        assert said.tokens == 8
        await embedding
        return bool(done)

    engine.ends = set()
    try:
        assert run(work()) is (cores == 2)
    finally:
        engine.close()
    assert recorded.cores["embed"][0] == recorded.cores["step"][0] == cores
    if cores == 2:
        assert 1 in recorded.cores["step"]
    assert engine.counters.busy_s > 0


def test_the_time_at_work_is_counted_once(embedder: Embedder, recorded: Recorded) -> None:
    """However many threads are at work in it."""
    engine = engine_of(embedder, recorded, cores=2)

    async def work() -> float:
        began = time.monotonic()
        embed = [engine.items(engine.embeddings, [text_item(embedder, f"{n}")] * 20, 60) for n in range(5)]
        await asyncio.gather(answered(engine, prompt(embedder, 2), endless(0, 60)), *embed)
        return time.monotonic() - began

    engine.ends = set()
    whole = run(work())
    engine.close()
    assert 0.5 * whole < engine.counters.busy_s <= whole


def test_a_cancelled_request_is_not_computed(embedder: Embedder, engine: ModelEngine, recorded: Recorded) -> None:
    async def work() -> None:
        recorded.go.clear()
        first = asyncio.create_task(engine.items(engine.embeddings, [text_item(embedder, "a")], 60))
        await until(lambda: recorded.asked == 1)
        second = asyncio.create_task(engine.items(engine.embeddings, [text_item(embedder, "b")] * 3, 60))
        late = asyncio.create_task(engine.items(engine.embeddings, [text_item(embedder, "c")] * 2, 0.01))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.sleep(0.05)
        recorded.go.set()
        await first
        assert [failure.status for failure in await late] == [408, 408]

    run(work())
    assert [len(batch) for batch in recorded.batches] == [1]


def test_one_bad_conversation_fails_alone(embedder: Embedder, engine: ModelEngine) -> None:
    bad = prompt(embedder, 1)
    bad = Encoded(bad.ids, bad.pixels, -1)

    async def work() -> list[Any]:
        return await asyncio.gather(
            answered(engine, prompt(embedder, 2), TokenSampling(8)),
            answered(engine, bad, TokenSampling(8)),
            answered(engine, prompt(embedder, 3), TokenSampling(8)),
        )

    first, broken, last = run(work())
    assert first == alone(embedder, prompt(embedder, 2), TokenSampling(8))
    assert last == alone(embedder, prompt(embedder, 3), TokenSampling(8))
    assert isinstance(broken, Failure)
    assert broken.status == 500


def test_a_score_is_of_the_base_model_while_others_answer(embedder: Embedder, engine: ModelEngine) -> None:
    prompts = [prompt(embedder, number) for number in range(4)]
    expected = PlainRunner(embedder).next_token_logits(prompts)[:, 7]

    async def work() -> list[Any] | Failure:
        talking = asyncio.create_task(answered(engine, prompt(embedder, 1), TokenSampling(20, adapter=True)))
        scores = await engine.items(engine.scores, prompts, 60)
        await talking
        return scores

    np.testing.assert_allclose(run(work()), expected.numpy(), atol=1e-4)


def test_a_queue_is_bounded_by_time_as_it_is_measured(embedder: Embedder, engine: ModelEngine) -> None:
    queue: ItemQueue = engine.embeddings
    assert engine.refusal(queue, 1000, 10) is None  # nothing is known yet
    queue.times.record(2000, 10.0)
    with queue.hold(3900, 39):
        assert engine.refusal(queue, 1000, 50) is None  # two batches: 20 s
    with queue.hold(8100, 81):
        refused = engine.refusal(queue, 1000, 100)
        assert refused is not None
        assert (refused.status, refused.code) == (429, "overloaded")
        assert "50.0 s of it before this" in refused.message
        for _ in range(50):
            queue.times.record(2000, 1.0)  # ten times as fast now
        assert engine.refusal(queue, 1000, 100) is None
    assert engine.refusal(queue, LIMITS.queued_tokens + 1, 1).status == 413


def test_a_refusal_says_for_how_long_anybody_would_be_refused(embedder: Embedder, engine: ModelEngine) -> None:
    """Until the least would not wait too long, or the batch that is computed is done; nothing of the large alone."""
    queue: ItemQueue = engine.embeddings
    queue.times.record(2000, 10.0)
    with queue.hold(8100, 81):
        large = engine.refusal(queue, 1000, 100)
        assert large is not None
        assert (large.status, large.full_s) == (429, None)  # one item would come after one of the others
    with ExitStack() as held:
        for _ in range(8):
            held.enter_context(queue.hold(1000, 1))
        one = engine.refusal(queue, 100, 1)  # four batches: 40 s, 10 more than it may be
        assert one is not None
        assert (one.full_s, one.full_by) == (pytest.approx(10.0), engine.name)
        queue.next_done = time.monotonic() + 12
        one = engine.refusal(queue, 100, 1)
        assert one is not None
        assert one.full_s == pytest.approx(12.0, abs=0.5)


def test_a_small_request_is_not_refused_for_a_large_one(embedder: Embedder, engine: ModelEngine) -> None:
    """They take turns: of a request of 800 items one comes before a request of one."""
    queue: ItemQueue = engine.embeddings
    queue.times.record(2000, 10.0)
    room = LIMITS.queued_tokens * 3 // 4
    with queue.hold(room, 800):
        assert engine.refusal(queue, 20, 1) is None
        assert engine.refusal(queue, 8000, 400).status == 429  # of time, and of memory
    with queue.hold(room, 1):
        assert engine.refusal(queue, 20, 1).status == 429  # before this it is the other one's turn


def test_what_is_done_is_not_waited_for(embedder: Embedder, engine: ModelEngine, recorded: Recorded) -> None:
    recorded.go.clear()
    items = [text_item(embedder, f"a text of some length, {number}") for number in range(200)]
    cost = sum(item.cost for item in items)
    left = []

    async def work() -> None:
        with engine.embeddings.hold(cost, len(items)) as held:
            asking = asyncio.create_task(engine.items(engine.embeddings, items, 30, held))
            await until(lambda: recorded.asked == 1)
            left.append((held.cost, held.items))
            recorded.go.set()
            await asking
            left.append((held.cost, held.items))

    run(work())
    assert left == [(cost, 200), (0, 0)]
    assert engine.embeddings.cost == 0


def test_work_counts_until_it_is_done_or_dropped(engine: ModelEngine) -> None:
    queue: ItemQueue = engine.embeddings
    with queue.hold(LIMITS.queued_tokens - 10, 1), engine.hold_answer(LIMITS.queued_tokens - 10):
        assert engine.refusal(queue, 10, 1) is None
        assert engine.answer_refusal(10) is None
        for refused in (engine.refusal(queue, 11, 1), engine.answer_refusal(11)):
            assert refused is not None
            assert (refused.status, refused.retry_after) == (429, 1)
    with pytest.raises(ZeroDivisionError), queue.hold(60, 1):
        _ = 1 / 0
    assert (queue.cost, engine.answer_tokens) == (0, 0)


def test_a_service_rate_forgets() -> None:
    rate = ServiceRate()
    assert rate.seconds_for(100) == 0
    rate.record(100, 1)
    assert rate.seconds_for(50) == pytest.approx(0.5)
    for _ in range(100):
        rate.record(200, 1)
    assert rate.seconds_for(200) == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen3_vl"])
def test_every_family_has_a_runner(family: str, tmp_path: Path) -> None:
    from vladva.models.embedder import load_embedder

    embedder = load_embedder(families.build(family, tmp_path))
    runner, also = runners_of(embedder)
    assert also is runner
    assert isinstance(runner, PlainRunner if family == "qwen3_vl" else PackedRunner)
    engine = engine_of(embedder, runner)
    engine.ends = set()
    prompts = [prompt(embedder, number) for number in (1, 2)]

    async def work() -> list[Any]:
        return await asyncio.gather(*[answered(engine, one, TokenSampling(4)) for one in prompts])

    found = run(work())
    engine.close()
    embedder.model.base.generation_config.eos_token_id = -1
    assert found == [alone(embedder, one, TokenSampling(4)) for one in prompts]


def test_an_engine_that_breaks_down_fails_what_waits(embedder: Embedder, recorded: Recorded) -> None:
    engine = engine_of(embedder, recorded)

    def breaks(*_: Any) -> None:
        raise SystemExit("the thread ends")

    engine.advance = breaks  # type: ignore[method-assign]
    failed = run(answered(engine, prompt(embedder, 1), TokenSampling(4)))
    assert isinstance(failed, Failure)
    assert failed.status == 503
    assert isinstance(engine.broken, SystemExit)
    assert engine.refusal(engine.embeddings, 1, 1).status == 503


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks at the process's mappings")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_runner_lets_go_of_the_files_that_the_weights_came_from(dtype: str, tmp_path: Path) -> None:
    """A mapped file takes memory for all that was read of it, until no tensor lies in it: weights would count twice."""
    from vladva.models.embedder import Embedder, load_embedder

    folder = families.build("llava", tmp_path)
    if dtype == "bfloat16":
        load_embedder(folder, dtype=dtype).model.base.save_pretrained(folder)
    expected = load_embedder(folder, dtype=dtype).embed_texts(["a red circle"])
    embedder = load_embedder(folder, dtype=dtype)
    assert isinstance(embedder, Embedder)
    maps = Path("/proc/self/maps")
    assert folder in maps.read_text()  # as it is loaded
    gc.collect()  # the other model
    runner = PackedRunner(embedder)
    assert folder not in maps.read_text()
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(runner.embed([text_item(embedder, "a red circle")]), expected, atol=tolerance)
    engine = engine_of(embedder, runner)
    said = run(answered(engine, prompt(embedder, 1), TokenSampling(4)))
    engine.close()
    assert isinstance(said, Said)
