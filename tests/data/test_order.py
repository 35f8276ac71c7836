"""Batches of neighbours: each sample once an epoch, in whatever order; the near ones together; the audit proves it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from tests.support.small_corpora import run_over, scan_here, write_corpus
from vladva.config import DataConfig, RunConfig
from vladva.data.epoch_plan import EpochPlan
from vladva.data.order import OrderedPlan, read_order, write_order
from vladva.data.sampler import SampleFinder, Sampler
from vladva.data.shard_index import ShardIndex
from vladva.train.audit import check_chunks
from vladva.train.audit_log import ChunkRecord

# (samples, chunk, neighbourhood, chunks of a batch): smaller than a chunk, as a chunk, two chunks, the whole batch.
LAYOUTS = [(203, 8, 4, 4), (203, 8, 8, 4), (203, 8, 16, 4), (203, 8, 32, 4), (32, 8, 32, 4), (1001, 4, 12, 3)]


def samples_of(runs: list[tuple[int, int]]) -> list[int]:
    return [first + i for first, count in runs for i in range(count)]


@pytest.mark.parametrize(("size", "chunk", "near", "per_batch"), LAYOUTS)
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_every_sample_comes_once_and_neighbours_come_together(
    size: int, chunk: int, near: int, per_batch: int, epoch: int
) -> None:
    samples_N = np.random.default_rng(1).permutation(size)
    sampler = Sampler((size,), (1,), 7, chunk, near, per_batch, order=samples_N)
    plan = sampler.plan(0, epoch)
    assert isinstance(plan, OrderedPlan)
    chunks = [samples_of(plan.chunk(number)) for number in range(plan.num_chunks)]
    assert {len(each) for each in chunks} == {chunk}
    counts = Counter(sample for each in chunks for sample in each) + Counter(samples_of(plan.left_out()))
    assert counts == Counter(range(size))
    # By a twin: the window of the order that is used, on a ring, cut into neighbourhoods at the epoch's shift.
    used = size // (chunk * per_batch) * chunk * per_batch
    window = np.roll(samples_N, -(epoch * (size - used) % size))[:used]
    batch_of = {sample: number // per_batch for number, each in enumerate(chunks) for sample in each}
    cut = np.roll(window, -EpochPlan(size, 7, epoch, chunk, near, per_batch)._shift).reshape(-1, near)
    assert all(len({batch_of[sample] for sample in group.tolist()}) == 1 for group in cut)
    if used // near > 8 and near > 1:  # negative control: cut elsewhere, neighbourhoods are torn
        torn = np.roll(cut.ravel(), near // 2).reshape(-1, near)
        assert any(len({batch_of[sample] for sample in group.tolist()}) > 1 for group in torn)


def test_epochs_have_other_neighbourhoods_side_by_side() -> None:
    sampler = Sampler((256,), (1,), 7, 8, 16, 4, order=np.arange(256)[::-1].copy())
    first, second = ([samples_of(sampler.plan(0, epoch).chunk(n)) for n in range(32)] for epoch in (0, 1))
    assert first != second


@pytest.fixture
def config(tmp_path: Path, tiny: str) -> RunConfig:
    """Seventy samples in an order of their own, two epochs and a bit."""
    uri = str(tmp_path / "data")
    write_corpus(uri, 70)
    scan_here(uri)
    order = str(tmp_path / "order.parquet")
    write_order(order, np.random.default_rng(3).permutation(70), ShardIndex.open(uri))
    run = run_over(DataConfig(uri, order=order, neighbourhood=8), tmp_path, tiny, steps=9, batch=16, chunk=4)
    assert SampleFinder(run).schedule.run_length == 8
    return run


def records(config: RunConfig) -> list[ChunkRecord]:
    find = SampleFinder(config)
    chunks = config.train.steps * config.chunks_per_batch
    return [
        ChunkRecord(number // config.chunks_per_batch, number, [ref.id for _, ref in find(number)])
        for number in range(chunks)
    ]


def test_the_audit_proves_it(config: RunConfig) -> None:
    report = check_chunks(records(config), SampleFinder(config), config.train.steps)
    assert report.ok, report.problems()
    assert report.figures()["epochs"] == 2
    assert report.figures()["delivered"] == 9 * 16
    # Negative controls: a sample in place of another; and the right samples in an order that is not the plan's.
    wrong = records(config)
    wrong[3] = wrong[3]._replace(ids=[wrong[0].ids[0], *list(wrong[3].ids)[1:]])
    report = check_chunks(wrong, SampleFinder(config), config.train.steps)
    assert not report.ok
    assert report.figures()["duplicated"] == report.figures()["missing"] == 1
    plain = replace(config, data=replace(config.data, order="", run_length=4))
    assert check_chunks(records(config), SampleFinder(plain), config.train.steps).figures()["wrong_steps"] > 5


def test_another_order_is_other_data(config: RunConfig, tmp_path: Path) -> None:
    """A run does not go on with another order: its fingerprint is not that of its checkpoints."""
    index = ShardIndex.open(config.data.uri)
    before = SampleFinder(config).fingerprint
    assert SampleFinder(config).fingerprint == before
    write_order(config.data.order, np.arange(70), index)
    assert SampleFinder(config).fingerprint != before
    assert SampleFinder(replace(config, data=replace(config.data, order=""))).fingerprint not in (before, "")


def test_what_is_no_order_is_refused(config: RunConfig, tmp_path: Path) -> None:
    index = ShardIndex.open(config.data.uri)
    twice = np.arange(70)
    twice[5] = 6
    write_order(config.data.order, twice, index)
    with pytest.raises(ValueError, match="each of 70 samples once"):
        read_order(config.data.order, index)
    write_corpus(str(tmp_path / "other"), 71)
    scan_here(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="of other shards"):
        read_order(config.data.order, ShardIndex.open(str(tmp_path / "other")))
    with pytest.raises(ValueError, match=r"there is no .*--order makes one"):
        read_order(str(tmp_path / "nothing"), index)


@pytest.mark.parametrize(
    ("changes", "message"), [({"neighbourhood": 5}, "neighbourhood 5 must"), ({"mix": ("a=1",)}, "one data set")]
)
def test_impossible_settings_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_over(DataConfig("data", **({"order": "order", "neighbourhood": 4} | changes)), "runs")


def test_runs_are_pieces_that_follow_one_another() -> None:
    plan = OrderedPlan(EpochPlan(8, 0, 0, 8, 8, 1), np.array([4, 5, 6, 1, 0, 2, 3, 7]))
    runs = plan.chunk(0)
    assert sorted(samples_of(runs)) == list(range(8))
    assert all(second[0] != first[0] + first[1] for first, second in pairwise(runs) if first[0] < second[0])
