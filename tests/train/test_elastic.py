"""Workers that come and go: every number of them trains on the same batches, and a run outlives a node it loses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support import elastic_worker as worker
from vladva.config import RunConfig
from vladva.data.examples import Example
from vladva.models.batch import MicroBatch
from vladva.models.preprocessor import Preprocessor
from vladva.recipes import tiny as tiny_recipe
from vladva.train.loop import chunks_of_steps

CHUNKS = 8


@pytest.fixture(scope="module")
def config() -> RunConfig:
    """Eight chunks a step."""
    recipe = tiny_recipe()
    train = replace(recipe.train, global_batch=8 * CHUNKS, chunk_size=8)
    return replace(recipe, train=train, cluster=replace(recipe.cluster, workers=CHUNKS, min_workers=1))


@pytest.fixture(scope="module")
def chunk(tiny: str) -> MicroBatch:
    return Preprocessor(tiny).collate(0, [Example("a", "a red circle", "a circle", None)])


def dealt(chunk: MicroBatch, first: int, last: int, rank: int, world: int) -> Iterator[MicroBatch]:
    """What the stream gives one of W workers: every W-th chunk of the stream, wherever the stream begins."""
    return (replace(chunk, number=number) for number in range(first + rank, last, world))


@pytest.mark.parametrize("world", range(1, CHUNKS + 1))
def test_every_number_of_workers_gets_the_same_batches(config: RunConfig, chunk: MicroBatch, world: int) -> None:
    start, steps = 5, 4
    first, last = start * CHUNKS, (start + steps) * CHUNKS + world
    shares = [
        list(chunks_of_steps(dealt(chunk, first, last, rank, world), config, start, rank, world))[:steps]
        for rank in range(world)
    ]
    for number, of_step in enumerate(zip(*shares, strict=True), start=start):
        chunks = sorted(batch.number for share in of_step for batch in share)
        assert chunks == list(range(number * CHUNKS, (number + 1) * CHUNKS))
        assert {len(share) for share in of_step} <= {CHUNKS // world, -(-CHUNKS // world)}


@pytest.mark.parametrize(("first", "rank"), [(0, 1), (8, 0)])
def test_a_chunk_of_another_worker_or_step_stops_the_run(
    config: RunConfig, chunk: MicroBatch, first: int, rank: int
) -> None:
    with pytest.raises(AssertionError):
        next(chunks_of_steps(dealt(chunk, first, 16, rank, 3), config, 0, 0, 3))


def test_a_run_survives_the_loss_of_an_announced_node(tmp_path: Path) -> None:
    """No checkpoint is due before the end: what it goes on from is the one that the announcement caused."""
    done = subprocess.run(
        [sys.executable, "-m", worker.__name__, str(tmp_path)], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr[-5000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert 0 < result["saved_after"] < worker.STEPS
    curves = result["curves"]
    assert len(curves["elastic"]) == worker.STEPS
    assert curves["elastic"] == pytest.approx(curves["steady"], rel=1e-4)
