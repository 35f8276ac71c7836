"""Training from mistakes on a real cluster: weighted negatives, a teacher's mask, mined negatives and an order at once.

Two workers without interruption, and one worker that goes on from the middle of that run, are the same run.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.checkpoints import build_llava
from tests.train.test_loop import adapter_of
from vladva.config import ClusterConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from vladva.core import storage
from vladva.data.scan import scan
from vladva.data.shard_index import ShardIndex
from vladva.mine.negatives import MINED, MiningConfig, mine
from vladva.mine.neighbours import order_samples
from vladva.mine.teacher import teach
from vladva.models.resolve import describe, preprocessor_of
from vladva.train.audit import audit
from vladva.train.launch import train
from vladva.train.tracking import read_metrics

STEPS = 4
FIGURES = ("contrastive_loss", "false_negatives", "duplicates", "effective_negatives")


@pytest.fixture(scope="module")
def config(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> RunConfig:
    """Four steps of four chunks of four pairs on shards that the base model has mined, in an order that it has made."""
    base = build_llava(tmp_path_factory.mktemp("llava"))
    out, data = tmp_path_factory.mktemp("mined"), str(scenes / "train")
    scan(data, preprocessor_of(describe(base, adapter=False, dtype="float32")[0]).count_tokens)
    summary = mine(base, data, str(out), MiningConfig(margin=0.0, relative=1.0), actors=1)
    assert summary.negatives > 0
    order_samples(storage.join(str(out), MINED, "table"), ShardIndex.open(data), str(out / "order.parquet"))
    return RunConfig(
        name="two-workers",
        storage=str(tmp_path_factory.mktemp("runs")),
        model=ModelConfig(checkpoint=base, lora_rank=4),
        data=DataConfig(
            uri=str(out), run_length=2, order=str(out / "order.parquet"), neighbourhood=8, hard_negatives=2
        ),
        loss=LossConfig(
            contrastive="hardness_weighted",
            options=("hardness=4",),
            next_token_weight=0.0,
            false_negatives_above=0.8,
        ),
        optim=OptimConfig(lr=1e-2, warmup_fraction=0.3),
        train=TrainConfig(steps=STEPS, global_batch=16, chunk_size=4, checkpoint_every=2, keep_last=3, audit=True),
        cluster=ClusterConfig(workers=2, cpus_per_worker=0.5),
    )


@pytest.fixture(scope="module")
def finished(config: RunConfig) -> RunConfig:
    """The run with two workers, complete."""
    train(config, teach=teach)
    return config


def figures(config: RunConfig) -> list[list[float]]:
    return [[row[name] for name in FIGURES] for row in read_metrics(config.uri)]


def test_the_log_counts_what_the_teacher_masks(finished: RunConfig) -> None:
    rows = read_metrics(finished.uri)
    assert sum(row["false_negatives"] for row in rows) > 0
    assert max(row["effective_negatives"] for row in rows) > 15  # hard negatives are among them


def test_a_run_without_vectors_is_refused(finished: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"start the run with jobs/train\.py"):
        train(replace(finished, name="untaught"))


def test_one_worker_goes_on_with_the_run_of_two(finished: RunConfig) -> None:
    resumed = replace(finished, name="resumed", cluster=ClusterConfig(workers=1, cpus_per_worker=0.5))
    shutil.copytree(finished.uri, resumed.uri)
    shutil.rmtree(Path(resumed.uri) / "checkpoints" / "step-4")
    (Path(resumed.uri) / "config.json").unlink()
    train(resumed, teach=teach)
    for one, other in zip(figures(finished), figures(resumed), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    first, second = adapter_of(finished), adapter_of(resumed)
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-4
    for run in (finished, resumed):
        report = audit(run.uri)
        assert report.ok, report.problems()
        assert report.figures()["delivered"] == STEPS * 16


def test_another_order_is_refused(finished: RunConfig) -> None:
    """Negative control: the same samples in their own order are another run."""
    with pytest.raises(ValueError, match=r"data\.order was"):
        train(replace(finished, data=replace(finished.data, order="")), teach=teach)
