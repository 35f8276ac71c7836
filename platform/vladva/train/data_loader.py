"""Chunks: the run's batches in plan order, as a Ray data set of one row a chunk.

Chunk g of a run belongs to optimizer step g // M. A task makes a few chunks after one another: it reads their samples
with ranged reads, those of the next chunk while it decodes and collates this one. Each chunk is one row and one block,
handed on as soon as it is made; it crosses the object store once, to the worker that trains on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig
from vladva.data.sampler import SampleFinder

if TYPE_CHECKING:
    import ray.data

    from vladva.data.examples import Example
    from vladva.data.sampler import SampleRange
    from vladva.data.sidecar import SampleRef
    from vladva.models.batch import MicroBatch
    from vladva.models.preprocessor import Preprocessor

CHUNKS_PER_TASK = 4  # starting a task costs as much as decoding a few images


def chunk_stream(config: RunConfig, first_step: int) -> ray.data.Dataset:
    """The chunks from step `first_step` on, one row and one block each, so that block i goes to worker i % W.

    Ray Data leaves out what is over when all workers have as many: a run whose W may not divide its chunks gets a few
    more than it has steps for.
    """
    import ray

    first, last = (step * config.chunks_per_batch for step in (first_step, config.train.steps))
    if config.cluster.min_workers is not None:
        last += config.cluster.workers
    content = ray.put(config.to_json())
    num_tasks = max(1, -(-(last - first) // CHUNKS_PER_TASK))
    tasks = ray.data.range(num_tasks, override_num_blocks=num_tasks)
    arguments = {"first": first, "last": last, "config": content}
    stream = tasks.flat_map(read_chunks_of_task, fn_kwargs=arguments)  # type: ignore[arg-type]  # no fn_kwargs in it
    stream.context.target_max_block_size = 1  # byte: a block is full with its first row
    return stream


def read_chunks_of_task(row: dict[str, Any], *, first: int, last: int, config: Any) -> Iterator[dict[str, Any]]:
    """The task: row `id` of the input stands for the next few chunks from `first` on."""
    import json

    import ray

    start = first + int(row["id"]) * CHUNKS_PER_TASK
    reader = chunk_reader(json.dumps(ray.get(config)))
    for batch in reader.batches(range(start, min(start + CHUNKS_PER_TASK, last))):
        yield batch.to_row()


@lru_cache(maxsize=2)
def chunk_reader(config: str) -> ChunkReader:
    """One reader a process: index and tokenizer are loaded once."""
    import json

    return ChunkReader(RunConfig.from_json(json.loads(config)))


class ChunkReader:
    """Chunk number -> Batch."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.find = SampleFinder(config)
        self.preprocessor: Preprocessor = run_preprocessor(config)

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

    def fetch(self, number: int) -> list[tuple[SampleRange, SampleRef, bytes]]:
        """The chunk's samples with their files, as they are in the shards."""
        from vladva.data.shard_index import read_mixed_samples

        samples = self.find(number)
        contents = read_mixed_samples([(self.find.indexes[run.source].data_uri, ref) for run, ref in samples])
        return [(run, ref, content) for (run, ref), content in zip(samples, contents, strict=True)]

    def collate(self, number: int, samples: list[tuple[SampleRange, SampleRef, bytes]]) -> MicroBatch:
        """The chunk from its samples."""
        return self.preprocessor.collate(number, self.examples(number, samples))

    def examples(self, number: int, samples: list[tuple[SampleRange, SampleRef, bytes]]) -> list[Example]:
        """The chunk's samples, decoded, with the captions that are used."""
        with_captions = self.has_captions(number)
        return [self.example(*sample, with_captions) for sample in samples]

    def example(self, run: SampleRange, ref: SampleRef, content: bytes, with_captions: bool) -> Example:
        """A sample as its data set's epoch uses it; the long caption only where the step takes the caption loss."""
        from vladva.core.images import decode_image
        from vladva.data.examples import Example, choose_captions, choose_negatives, read_text

        data = self.config.data
        if (ref.width == 0) != data.texts_only:
            found = "has an image" if data.texts_only else "has no image"
            raise ValueError(f"{ref.id} {found}, but data.texts_only is {data.texts_only}, for all samples")
        drawn_by = {"seed": self.config.seed, "epoch": run.epoch, "sample_id": ref.id}
        short, long = choose_captions(
            ref.captions,
            ref.caption_tokens,
            short_below=data.short_below,
            long_below=data.long_below,
            **drawn_by,
        )
        image = decode_image(content) if ref.width else self.cut(read_text(content))
        short = None if short is None else self.cut(short)
        long = long if ref.width and with_captions else None
        negatives = choose_negatives(ref.negatives, data.hard_negatives, **drawn_by)
        return Example(self.find.name(run.source, ref.id), image, short, long, tuple(map(self.cut, negatives)))

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

    model = config.model
    return Preprocessor(
        model.checkpoint,
        image_prompt=model.image_prompt,
        text_prompt=model.text_prompt,
        soft_prompts=model.soft_prompts,
        max_image_tokens=model.max_image_tokens,
    )
