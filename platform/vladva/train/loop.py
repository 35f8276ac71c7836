"""The loop: what every worker of a run does, from its share of the chunk stream to checkpoints.

The driver (launch.py) has checked everything that can be checked before. A run that was interrupted goes on from its
last complete checkpoint, with the same or another number of workers, and is the same run.
"""

from __future__ import annotations

import platform
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig
from vladva.core import storage
from vladva.data.sampler import SampleFinder
from vladva.models import checkpoint
from vladva.models.adapter import save_adapter
from vladva.train.data_loader import ChunkStream
from vladva.train.engine import learning_rate
from vladva.train.negatives import NegativesWatch
from vladva.train.quarantine import TrainingQuarantine
from vladva.train.setup import build_engine, make_backward
from vladva.train.training_log import TrainingLog
from vladva.train.validation import Validation

if TYPE_CHECKING:
    from vladva.models.batch import MicroBatch
    from vladva.train.engine import Engine


def train_worker(settings: dict[str, Any]) -> None:
    """What every worker runs: set up, resume, then one pass over its share of the chunk stream."""
    import ray.train
    import torch

    config = RunConfig.from_json(settings["config"])
    if not storage.exists(storage.join(config.uri, "config.json")):  # written by the driver: a node that came later
        raise ValueError(f"storage {config.storage!r} is not the same on every node: {platform.node()} has no such run")
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    config = replace(config, cluster=replace(config.cluster, workers=world))  # as many as there are
    torch.set_num_threads(max(1, int(config.cluster.cpus_per_worker)))

    # --- data: the stream starts where the newest checkpoint ends; the first chunks are read while the model is loaded
    start, chunks = open_share(config, rank, world)

    # --- model and engine
    engine = build_engine(config, start)
    backward = make_backward(config)
    validation = Validation(config) if config.train.validate_on else None
    negatives = NegativesWatch(config)
    quarantine = TrainingQuarantine(config, sum(SampleFinder(config).schedule.sizes), start)

    # --- loop
    batch = next(chunks)
    leaving: list[str] = []  # nodes that are about to be taken away
    with TrainingLog(config, rank, world, start) as log:
        for step in range(start, config.train.steps):
            began = time.perf_counter()
            if step > start:
                batch = next(chunks)
            waited = time.perf_counter() - began

            torch.manual_seed((config.seed * 1_000_003 + step) * 1_000_003 + rank)  # dropout, the same when resumed
            quarantine.step(step, batch, engine.device)
            losses = backward(engine, batch)
            last = step + 1 == config.train.steps
            negatives.step(losses, last=last)
            rate = learning_rate(step, config.train.steps, config.optim)
            norm = engine.step(rate)

            seconds = time.perf_counter() - began
            scores = {}
            if validation is not None and (last or (step + 1) % config.train.validate_every == 0):
                scores = validation(engine)
            scores["quarantined"] = len(quarantine.rows)
            log.step(step, losses, batch, rate=rate, norm=norm, waited=waited, seconds=seconds, scores=scores)
            notice = ray.train.get_preemption_info()  # the same on every rank
            warned = notice is not None and notice.preempted_node_ids != leaving
            if last or warned or (step + 1) % config.train.checkpoint_every == 0:
                quarantine.write()
                log.write_audit(step + 1)
                write_checkpoint(engine, log.saver, config, step + 1, scores)
            if warned:
                leaving = notice.preempted_node_ids
                log.flush()  # the node may be gone before the next checkpoint waits for this one


def open_share(config: RunConfig, rank: int, world: int) -> tuple[int, Iterator[list[MicroBatch]]]:
    """The step that the run goes on with, and this worker's chunks of each from there on.

    Rank 0 says where the newest checkpoint ends. The first worker of each dealer starts it, on its own node.
    """
    from ray.train.collective import barrier, broadcast_from_rank_zero

    told = (f"chunks-{uuid.uuid4()}", checkpoint.finished_steps(config.uri)) if rank == 0 else None
    name, first_step = broadcast_from_rank_zero(told)
    stream = ChunkStream(config, first_step, world)
    number = stream.dealer_of(rank)
    dealer = stream.start(name, number) if rank == stream.ranks(number)[0] else None
    barrier()  # every dealer is there
    fetched = stream.share(name, rank, ahead=config.chunks_per_worker)

    def share() -> Iterator[MicroBatch]:
        yield from fetched
        _ = dealer  # it ends with its last handle

    return first_step, chunks_of_steps(share(), config, first_step, rank, world)


def chunks_of_steps(
    stream: Iterator[MicroBatch], config: RunConfig, first_step: int, rank: int, world: int
) -> Iterator[list[MicroBatch]]:
    """This worker's chunks of each global batch. Chunk i of the stream must be on worker i % W: it is dealt so.

    Where W does not divide the chunks of a batch, some workers have one less than others.
    """
    expected = first_step * config.chunks_per_batch + rank
    share: list[MicroBatch] = []
    for chunk in stream:
        assert chunk.number == expected, (chunk.number, expected, world, rank)
        share.append(chunk)
        expected += world
        if expected // config.chunks_per_batch > chunk.number // config.chunks_per_batch:
            yield share
            share = []


def write_checkpoint(
    engine: Engine, saver: checkpoint.AsyncSaver | None, config: RunConfig, step: int, scores: dict[str, float]
) -> None:
    """Save after `step` steps. Every rank gathers, rank 0 (with the saver) writes; the upload goes on in training."""
    optimizer = engine.optimizer_state()
    with engine.gathered(), tempfile.TemporaryDirectory() as folder:
        if saver is None:
            return
        save_adapter(engine.model, config.model, Path(folder))
        state = {
            "next_chunk": step * config.chunks_per_batch,
            "seed": config.seed,
            **{name: value.item() for name, value in engine.exact_scalars.items()},
            "config": config.to_json(),
            "data_fingerprint": SampleFinder(config).fingerprint,
            "metrics": scores,
        }
        saver.save(step, adapter_files=Path(folder), optimizer=optimizer, state=state)
