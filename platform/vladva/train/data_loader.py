"""Chunks: the run's batches in plan order, as Ray data sets of one row a chunk.

Chunk g of a run belongs to optimizer step g // M. A task makes a few chunks after one another: it reads their samples
with ranged reads, those of the next chunk while it decodes and collates this one. Each chunk is one row and one block,
handed on as soon as it is made; it crosses the object store once, to the worker that trains on it.

Ray Data lays out every task of a data set before the first one starts, and keeps statistics of all blocks to its end.
So a run is read as windows of a bounded number of tasks, a data set each, one after the other: the first chunk comes as
fast, and takes as much memory, in a run of a million steps as in one of sixty.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from queue import Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

from vladva.config import RunConfig
from vladva.core.errors import InvalidSampleError
from vladva.core.object_store import TransientStorageError
from vladva.data.sample_vectors import open_teachers
from vladva.data.sampler import SampleFinder

if TYPE_CHECKING:
    import ray.data
    from ray.actor import ActorHandle

    from vladva.data.examples import Example
    from vladva.data.sampler import SampleRange
    from vladva.data.sidecar import SampleRef
    from vladva.models.batch import MicroBatch, Replacement
    from vladva.models.preprocessor import Preprocessor

T = TypeVar("T")
Content = bytes | InvalidSampleError
"""A file as it is in its shard, or what keeps it from being read."""

STAND_INS = 16  # samples that are tried in the place of one that cannot be used
CHUNKS_PER_TASK = 4  # starting a task costs as much as decoding a few images
WORKERS_PER_DEALER = 64  # a dealer hands on more than a hundred chunks a second, so two to each
OBJECT_STORE_SHARE = 0.5  # of the object store that Ray Data takes at most, as its own default is
LOOK_AGAIN_S = 0.5  # how often a thread that waits for room looks whether anybody still wants its rows


# --- the stream ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChunkStream:
    """The chunks of a run from optimizer step `first_step` on, for `workers` workers.

    Worker r gets chunks first + r, first + r + W, ... in order. A process that deals takes some milliseconds a chunk,
    so where there are many workers there are several dealers, each with workers of neighbouring ranks, and so nodes, of
    its own: row i of a dealer's window goes to its worker i % n. Who deals does not change what is dealt. After the
    last step come as many chunks as make their number a multiple of W, which nobody uses.
    """

    config: RunConfig
    first_step: int
    workers: int
    tasks_per_window: int = 256
    workers_per_dealer: int = WORKERS_PER_DEALER

    @property
    def first(self) -> int:
        """Number of the first chunk."""
        return self.first_step * self.config.chunks_per_batch

    @property
    def last(self) -> int:
        """Number after that of the last chunk."""
        count = (self.config.train.steps - self.first_step) * self.config.chunks_per_batch
        return self.first + -(-count // self.workers) * self.workers

    @property
    def window_size(self) -> int:
        """Chunks of a window: as many for each worker."""
        return -(-self.tasks_per_window * CHUNKS_PER_TASK // self.workers) * self.workers

    @property
    def num_windows(self) -> int:
        """Windows from the first to the last chunk."""
        return -(-(self.last - self.first) // self.window_size)

    @property
    def num_dealers(self) -> int:
        """As few as have no more workers each than they should."""
        return -(-self.workers // self.workers_per_dealer)

    def ranks(self, dealer: int) -> range:
        """The workers of a dealer."""
        return range(*(number * self.workers // self.num_dealers for number in (dealer, dealer + 1)))

    def dealer_of(self, rank: int) -> int:
        """The dealer of a worker."""
        return next(number for number in range(self.num_dealers) if rank in self.ranks(number))

    def chunk_numbers(self, window: int, dealer: int, rows: range | None = None) -> Sequence[int]:
        """The chunks of a dealer's window in the order of its rows; `rows`: of those alone, as far as there are."""
        ranks = self.ranks(dealer)
        first = self.first + window * self.window_size
        rounds = (min(first + self.window_size, self.last) - first) // self.workers
        every = range(rounds * len(ranks))
        return [
            first + row // len(ranks) * self.workers + ranks[row % len(ranks)]
            for row in (every if rows is None else every[rows.start : rows.stop])
        ]

    def window(self, number: int, dealer: int = 0) -> ray.data.Dataset:
        """A dealer's chunks of one window, one row and one block each, in order."""
        import ray

        num_tasks = -(-len(self.chunk_numbers(number, dealer)) // CHUNKS_PER_TASK)
        tasks = ray.data.range(num_tasks, override_num_blocks=num_tasks)
        arguments = {"stream": ray.put(self), "window": number, "dealer": dealer}
        chunks = tasks.flat_map(read_chunks_of_task, fn_kwargs=arguments)  # type: ignore[arg-type]  # not in its types
        chunks.context.target_max_block_size = 1  # byte: a block is full with its first row
        chunks.context.execution_options.preserve_order = True
        if self.num_dealers > 1:  # each would take what the cluster has for itself
            chunks.context.execution_options.resource_limits = self.limits(ray.cluster_resources())
        return chunks

    def limits(self, has: dict[str, float]) -> ray.data.ExecutionResources:
        """A dealer's part of the CPUs, and of the memory that Ray Data takes of the object store of such a cluster."""
        import ray

        stored = has["object_store_memory"] * OBJECT_STORE_SHARE / self.num_dealers
        return ray.data.ExecutionResources.for_limits(
            cpu=max(1.0, has["CPU"] / self.num_dealers), object_store_memory=stored
        )

    def start(self, name: str, dealer: int = 0) -> ActorHandle:
        """Start a dealer of a stream of this name, on this node; returns the handle it lives by."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        options = {"name": f"{name}-{dealer}", "num_cpus": 0, "scheduling_strategy": here}
        started: Any = ray.remote(_Dealer).options(**options).remote(self, dealer)
        ray.get(started.ready.remote())  # or a worker would look for a name that is not there yet
        return started

    def share(self, name: str, rank: int, ahead: int) -> Iterator[MicroBatch]:
        """The chunks of one worker, whose dealer was started under this name.

        ahead: chunks that are fetched before they are asked for, from now on; they bridge the start of the next window.
        """
        from vladva.models import batch  # noqa: F401  (imported here: not by a thread beside the caller's imports)

        return fetch_ahead(self._share(f"{name}-{self.dealer_of(rank)}", rank), ahead)

    def _share(self, name: str, rank: int) -> Iterator[MicroBatch]:
        import ray

        from vladva.core.ray_tasks import cause_of
        from vladva.models.batch import MicroBatch

        try:
            dealer: Any = ray.get_actor(name)
        except ValueError as error:  # its owner is gone, which is no mistake of the user's
            raise RuntimeError(f"the chunk stream {name} has ended") from error
        half = self.window_size // self.workers // 2
        following = dealer.split.remote(0, rank)
        try:
            for window in range(1, self.num_windows + 1):
                split: ray.data.DataIterator = ray.get(following)
                for number, row in enumerate(split.iter_rows()):
                    if number == half and window < self.num_windows:
                        following = dealer.split.remote(window, rank)  # its processes start meanwhile
                    yield MicroBatch.from_row(row)
        except ray.exceptions.RayError as error:
            raise cause_of(error) from error


class _Dealer:
    """The windows of a stream, dealt to some of its workers. An actor."""

    def __init__(self, stream: ChunkStream, number: int) -> None:
        self.stream = stream
        self.number = number
        self.ranks = stream.ranks(number)
        self.splits: dict[int, list[ray.data.DataIterator]] = {}

    def ready(self) -> None:
        """Return when this actor is there."""

    def split(self, window: int, rank: int) -> ray.data.DataIterator:
        """The rows of a worker. No worker begins a window before all of this dealer have come to its start."""
        if window not in self.splits:
            rows = self.stream.window(window, self.number)
            self.splits[window] = rows.streaming_split(len(self.ranks), equal=True)
        self.splits = {number: split for number, split in self.splits.items() if number >= window - 1}
        return self.splits[window][self.ranks.index(rank)]


def fetch_ahead(items: Iterator[T], count: int) -> Iterator[T]:
    """The items, of which a thread fetches up to `count` before they are asked for; an error comes in its place.

    It begins at once, and ends with the iterator.
    """
    queue: Queue[tuple[T, None] | tuple[None, BaseException]] = Queue(max(1, count))
    unwanted = Event()

    def put(entry: tuple[T, None] | tuple[None, BaseException]) -> bool:
        while not unwanted.is_set():
            try:
                queue.put(entry, timeout=LOOK_AGAIN_S)
            except Full:
                continue
            return True
        return False

    def fetch() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    return
            put((None, StopIteration()))
        except BaseException as error:
            put((None, error))

    def take() -> Iterator[T]:
        try:
            yield cast("T", None)  # nobody's: what has not begun would not come to its end either
            while True:
                item, error = queue.get()
                if isinstance(error, StopIteration):
                    return
                if error is not None:
                    raise error
                yield cast("T", item)
        finally:
            unwanted.set()

    taken = take()
    next(taken)
    Thread(target=fetch, daemon=True, name="chunks").start()
    return taken


# --- the tasks -------------------------------------------------------------------------------------------------------


def read_chunks_of_task(row: dict[str, Any], *, stream: Any, window: int, dealer: int) -> Iterator[dict[str, Any]]:
    """The task: row `id` of the input stands for the next few chunks of a dealer's window."""
    import ray

    start = int(row["id"]) * CHUNKS_PER_TASK
    described: ChunkStream = ray.get(stream)
    reader = chunk_reader(json.dumps(described.config.to_json()))
    numbers = described.chunk_numbers(window, dealer, range(start, start + CHUNKS_PER_TASK))
    for batch in reader.batches(numbers):
        yield batch.to_row()


@lru_cache(maxsize=2)
def chunk_reader(config: str) -> ChunkReader:
    """One reader a process: index and tokenizer are loaded once."""
    return ChunkReader(RunConfig.from_json(json.loads(config)))


class PlannedSample(NamedTuple):
    """A sample in its place in a chunk: the run that it is from, its number in its data set, and its file."""

    run: SampleRange
    number: int
    ref: SampleRef
    content: Content
    positive: Content | None
    """The image of its positive, where that is one."""


class ChunkReader:
    """Chunk number -> MicroBatch.

    Training does not end for one sample. One that cannot be read, decoded or given to the model is replaced by another
    of its data set, drawn from seed, epoch and its number: the same one whatever the number of workers, and when a run
    goes on.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.find = SampleFinder(config)
        self.preprocessor: Preprocessor = run_preprocessor(config)
        self.teachers = open_teachers(config, self.find.indexes)

    def __call__(self, number: int) -> MicroBatch:
        return self.collate(number, self.fetch(number))

    def batches(self, numbers: Iterable[int]) -> Iterator[MicroBatch]:
        """The chunks of these numbers, in order; the bytes of the next one are read meanwhile."""
        with ThreadPoolExecutor(1) as ahead:
            waiting = None
            for number in numbers:
                fetched = ahead.submit(self.fetch, number)
                if waiting:
                    yield self.collate(waiting[0], waiting[1].result())
                waiting = number, fetched
            if waiting:
                yield self.collate(waiting[0], waiting[1].result())

    def fetch(self, number: int) -> list[PlannedSample]:
        """The chunk's samples with their files, as they are in the shards, or with what keeps them from being read."""
        found = self.find(number)
        numbers = [run.first + i for run in self.find.schedule.chunk(number) for i in range(run.count)]
        contents = self.read([(run.source, ref) for run, ref in found])
        rows = zip(found, numbers, contents, strict=True)
        return [PlannedSample(run, sample, ref, *content) for (run, ref), sample, content in rows]

    def read(self, samples: Sequence[tuple[int, SampleRef]]) -> list[tuple[Content, Content | None]]:
        """The files of (data set, sample) pairs, and of their positives that are images.

        Raises TransientStorageError, which is no fault of a sample.
        """
        from vladva.data.image_refs import fetch_images

        uris = [self.find.indexes[source].data_uri for source, _ in samples]
        own = [ref.image(uri) for uri, (_, ref) in zip(uris, samples, strict=True)]
        theirs = [ref.positive(uri) for uri, (_, ref) in zip(uris, samples, strict=True)]
        # In the order of the shards, where a sample's members are neighbours.
        wanted = [ref for pair in zip(own, theirs, strict=True) for ref in pair if ref is not None]
        found = iter(fetch_images(wanted))
        return [(next(found), None if ref is None else next(found)) for ref in theirs]

    def collate(self, number: int, samples: Sequence[PlannedSample]) -> MicroBatch:
        """The chunk from its samples. For those that cannot be used others stand in, which the batch names."""
        examples, replaced = self.checked(number, samples, alone=False)
        try:
            batch = self.preprocessor.collate(number, examples)
        except Exception as error:  # what the model cannot take shows when the chunk is put together: find out which
            examples, replaced = self.checked(number, samples, alone=True)
            if not replaced:
                raise RuntimeError(f"chunk {number}: each sample can be used, but not all together") from error
            batch = self.preprocessor.collate(number, examples)
        return replace(batch, replaced=json.dumps(replaced))

    def examples(self, number: int, samples: Sequence[PlannedSample]) -> list[Example]:
        """The chunk's samples, decoded, with the captions that are used."""
        return self.checked(number, samples, alone=False)[0]

    def checked(
        self, number: int, samples: Sequence[PlannedSample], *, alone: bool
    ) -> tuple[list[Example], list[Replacement]]:
        """The chunk's examples, and which of them stand in for others.

        alone: each sample is collated by itself, too, which finds those that the model cannot take.
        """
        from vladva.models.batch import Replacement

        examples, replaced = [], []
        for position, sample in enumerate(samples):
            self.check_kind(sample.ref)
            example = self.usable(number, sample, alone=alone)
            if isinstance(example, str):
                replaced.append(Replacement(position, self.find.name(sample.run.source, sample.ref.id), example))
                example = self.stand_in(number, sample, example)
            examples.append(example)
        return examples, replaced

    def usable(self, number: int, sample: PlannedSample, *, alone: bool) -> Example | str:
        """The sample, decoded and checked, or the reason why it cannot be used."""
        try:
            if isinstance(sample.content, InvalidSampleError):
                raise sample.content
            if isinstance(sample.positive, InvalidSampleError):
                raise sample.positive
            example = self.example(sample.run, sample.ref, sample.content, self.has_captions(number))
            example = self.with_pair(example, sample.ref, sample.positive)
            if self.teachers:
                example = replace(example, teacher=self.teachers[sample.run.source](sample.number, example.caption))
            if alone:
                self.preprocessor.collate(number, [example])
        except (TransientStorageError, MemoryError):
            raise
        except Exception as error:  # whatever a decoder or a model's preprocessing stumbles over
            return str(error) if isinstance(error, InvalidSampleError) else f"{type(error).__name__}: {error}"
        return example

    def stand_in(self, number: int, sample: PlannedSample, reason: str) -> Example:
        """The first of the samples that the plan draws for this one and that can be used. Raises ValueError."""
        run = sample.run
        for attempt in range(STAND_INS):
            drawn = self.find.schedule.stand_in(run.source, run.epoch, sample.number, attempt)
            [ref] = self.find.indexes[run.source].samples(drawn, 1)
            [content] = self.read([(run.source, ref)])
            example = self.usable(number, PlannedSample(run, drawn, ref, *content), alone=True)
            if not isinstance(example, str):
                return example
        raise ValueError(
            f"{self.find.indexes[run.source].data_uri}: {sample.ref.id} cannot be used ({reason}), nor can any of "
            f"{STAND_INS} samples drawn to stand in for it (the last is {ref.id}: {example}); is the data still there, "
            f"and does it suit the model?"
        )

    def check_kind(self, ref: SampleRef) -> None:
        """Raise ValueError for an image where the run is of texts, and the other way round."""
        if (ref.width == 0) != self.config.data.texts_only:
            found = "has no image" if ref.width == 0 else "has an image"
            raise ValueError(f"{ref.id} {found}, but data.texts_only is {self.config.data.texts_only}, for all samples")
        if ref.pair is not None and not self.config.data.mixed_inputs:
            raise ValueError(
                f"{ref.id} has a query or a positive of its own: set data.mixed_inputs to train on such pairs"
            )

    def example(self, run: SampleRange, ref: SampleRef, content: bytes, with_captions: bool) -> Example:
        """A sample as its data set's epoch uses it; the long caption only where the step takes the caption loss."""
        from vladva.core.images import decode_image
        from vladva.data.examples import Example, choose_captions, choose_negatives, read_text

        data = self.config.data
        seed = self.config.seed
        short, long = choose_captions(
            ref.captions,
            ref.caption_tokens,
            short_below=data.short_below,
            long_below=data.long_below,
            seed=seed,
            epoch=run.epoch,
            sample_id=ref.id,
        )
        image = decode_image(content) if ref.width else self.cut(read_text(content))
        caption = None if short is None else ref.captions.index(short)
        short = None if short is None else self.cut(short)
        long = long if ref.width and with_captions else None
        negatives = choose_negatives(ref.negatives, data.hard_negatives, seed=seed, epoch=run.epoch, sample_id=ref.id)
        return Example(
            self.find.name(run.source, ref.id), image, short, long, tuple(map(self.cut, negatives)), caption=caption
        )

    def with_pair(self, example: Example, ref: SampleRef, positive: bytes | None) -> Example:
        """The example with what its sample says of the two sides of the pair. `positive`: an encoded image."""
        from vladva.core.images import decode_image
        from vladva.core.item_content import ItemContent

        pair = ref.pair
        if pair is None:
            return example
        contrasted = None
        if positive is not None:
            text = pair.positive_text and self.cut(pair.positive_text)
            contrasted = ItemContent(text, decode_image(positive), pair.positive_instruction)
        elif example.short is not None and pair.positive_instruction:
            contrasted = ItemContent(example.short, None, pair.positive_instruction)
        return replace(
            example,
            short=example.short if positive is None else None,
            words=pair.query_text and self.cut(pair.query_text),
            instruction=pair.query_instruction,
            positive=contrasted,
        )

    def cut(self, text: str) -> str:
        """The text's first `data.max_text_tokens` tokens."""
        limit = self.config.data.max_text_tokens
        return text if limit is None else self.preprocessor.first_tokens(text, limit)

    def has_captions(self, number: int) -> bool:
        """Whether the chunk's step takes the caption loss."""
        loss = self.config.loss
        return loss.next_token_weight > 0 and number // self.config.chunks_per_batch % loss.next_token_every == 0


def run_preprocessor(config: RunConfig) -> Preprocessor:
    """The preprocessing that a run trains with."""
    from vladva.models.preprocessor import Preprocessor

    return Preprocessor.of(config.model)
