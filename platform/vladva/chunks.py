"""Chunks: the run's batches in plan order, as a Ray data set of one row a chunk.

Chunk g of a run belongs to optimizer step g // M. A task reads the chunk's samples with ranged reads, decodes and
collates them; the row crosses the object store once, to the worker that trains on it.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig

if TYPE_CHECKING:
    import ray.data

    from vladva.batches import Batch, Preprocessor
    from vladva.examples import Example
    from vladva.shards import ShardIndex


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
    rows = ray.data.range(last - first, override_num_blocks=max(1, last - first))
    return rows.map(read_row, fn_kwargs={"first": first, "config": content})


def read_row(row: dict[str, Any], *, first: int, config: Any) -> dict[str, Any]:
    """The task: row `id` of the stream is chunk `first + id` of the run."""
    import json

    import ray

    content = ray.get(config)
    return chunk_reader(json.dumps(content))(first + int(row["id"])).to_row()


@lru_cache(maxsize=2)
def chunk_reader(config: str) -> ChunkReader:
    """One reader a process: index and tokenizer are loaded once."""
    import json

    return ChunkReader(RunConfig.from_json(json.loads(config)))


class ChunkReader:
    """Chunk number -> Batch."""

    def __init__(self, config: RunConfig) -> None:
        from vladva.shards import ShardIndex

        self.config = config
        self.index: ShardIndex = ShardIndex.open(config.data.uri)
        self.preprocessor: Preprocessor = preprocessor_of(config)

    def __call__(self, number: int) -> Batch:
        return self.preprocessor.collate(number, [example for example, _ in self.examples(number)])

    def examples(self, number: int) -> list[tuple[Example, bytes]]:
        """The chunk's examples, each with the file that it was read from, as it is in the shard."""
        from vladva.examples import Example, choose_captions, choose_negatives, decode_image, read_text
        from vladva.shards import read_samples

        data = self.config.data
        epoch, within = self.locate(number)
        runs = self.plan(epoch).chunk(within)
        refs = [ref for first, count in runs for ref in self.index.samples(first, count)]
        examples = []
        for ref, content in zip(refs, read_samples(data.uri, refs), strict=True):
            if (ref.width == 0) != data.texts_only:
                found = "has a picture" if data.texts_only else "has no picture"
                raise ValueError(f"{ref.id} {found}, but data.texts_only is {data.texts_only}, for all samples")
            drawn_by = {"seed": self.config.seed, "epoch": epoch, "sample_id": ref.id}
            short, long = choose_captions(
                ref.captions,
                ref.caption_tokens,
                short_below=data.short_below,
                long_below=data.long_below,
                **drawn_by,
            )
            image = decode_image(content) if ref.width else self.cut(read_text(content))
            short = None if short is None else self.cut(short)
            long = long if ref.width and self.has_captions(number) else None
            negatives = choose_negatives(ref.negatives, data.hard_negatives, **drawn_by)
            examples.append((Example(ref.id, image, short, long, tuple(map(self.cut, negatives))), content))
        return examples

    def cut(self, text: str) -> str:
        """The text's first `data.max_text_tokens` tokens."""
        limit = self.config.data.max_text_tokens
        return text if limit is None else self.preprocessor.first_tokens(text, limit)

    def plan(self, epoch: int) -> Any:
        """The plan of an epoch."""
        from vladva.plan import Plan

        return Plan(
            self.index.num_samples,
            seed=self.config.seed,
            epoch=epoch,
            chunk_size=self.config.train.chunk_size,
            run_length=self.config.data.run_length,
            chunks_per_batch=self.config.chunks_per_batch,
        )

    def has_captions(self, number: int) -> bool:
        """Whether the chunk's step takes the caption loss."""
        loss = self.config.loss
        return loss.next_token_weight > 0 and number // self.config.chunks_per_batch % loss.next_token_every == 0

    def locate(self, number: int) -> tuple[int, int]:
        """Epoch, and number of the chunk within it."""
        return divmod(number, self.plan(0).num_chunks)


def preprocessor_of(config: RunConfig) -> Preprocessor:
    """The preprocessing that a run trains with."""
    from vladva.batches import Preprocessor

    model = config.model
    return Preprocessor(
        model.checkpoint,
        image_prompt=model.image_prompt,
        text_prompt=model.text_prompt,
        soft_prompts=model.soft_prompts,
    )
