"""The training job on a real cluster: the same run for one and two workers, and for an interrupted and resumed one."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.checkpoints import build_llava
from vladva.benchmarks.benchmark import find_benchmark
from vladva.config import ClusterConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from vladva.core.images import decode_image
from vladva.data.image_refs import read_images
from vladva.models import checkpoint
from vladva.models.embedder import load_embedder
from vladva.recipes import tiny as tiny_recipe
from vladva.train.audit import audit
from vladva.train.launch import train
from vladva.train.tracking import read_metrics

STEPS = 6


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, scenes: Path) -> RunConfig:
    """Six steps of four chunks of four pairs, on a LLaVA of 32 wide."""
    return RunConfig(
        name="two-workers",
        storage=str(tmp_path_factory.mktemp("runs")),
        model=ModelConfig(checkpoint=build_llava(tmp_path_factory.mktemp("llava")), lora_rank=4),
        data=DataConfig(uri=str(scenes / "train"), run_length=2, validation_uri=str(scenes)),
        optim=OptimConfig(lr=1e-2, warmup_fraction=0.3),
        train=TrainConfig(
            steps=STEPS,
            global_batch=16,
            chunk_size=4,
            checkpoint_every=2,
            keep_last=3,
            audit=True,
            keep_best="validation/scenes_retrieval/t2i_r10",
            validate_on="scenes_retrieval",
            validate_every=2,
        ),
        cluster=ClusterConfig(workers=2, cpus_per_worker=0.5),
    )


@pytest.fixture(scope="module")
def finished(ray_cluster: None, config: RunConfig) -> RunConfig:
    """The run with two workers, complete."""
    train(config)
    return config


def curve(config: RunConfig) -> list[tuple[float, float]]:
    """Both losses of every step."""
    return [(row["contrastive_loss"], row["next_token_loss"]) for row in read_metrics(config.uri)]


def validations(config: RunConfig) -> dict[int, dict[str, float]]:
    """Scores of the validation, by step."""
    rows = {
        row["step"]: {k: v for k, v in row.items() if k.startswith("validation/")} for row in read_metrics(config.uri)
    }
    return {step: scores for step, scores in rows.items() if scores}


def adapter_of(config: RunConfig) -> dict:
    return load_file(checkpoint.fetch_adapter(checkpoint.latest(config.uri)) / "adapter_model.safetensors")


def assert_same_run(a: RunConfig, b: RunConfig) -> None:
    assert len(curve(a)) == len(curve(b)) == STEPS
    for one, other in zip(curve(a), curve(b), strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    assert validations(a) == validations(b)
    first, second = adapter_of(a), adapter_of(b)
    assert first.keys() == second.keys()
    assert max((first[k] - second[k]).abs().max().item() for k in first) < 1e-4


def test_a_run_leaves_what_the_design_says(finished: RunConfig) -> None:
    folder = Path(finished.uri)
    assert RunConfig.from_json(json.loads((folder / "config.json").read_text())) == finished
    rows = read_metrics(finished.uri)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert {"loss", "temperature", "in_batch_accuracy", "effective_negatives", "pairs_per_s", "lr", "grad_norm"} <= set(
        rows[0]
    )
    assert {"in_batch_recall_i2t", "in_batch_recall_t2i", "tokens_per_s_per_worker", "peak_memory_gib"} <= set(rows[0])
    assert rows[0]["effective_negatives"] == pytest.approx(15)
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["step-2", "step-4", "step-6"]
    assert list((folder / "tensorboard").glob("events*"))


def test_validation_is_what_evaluation_finds_later(finished: RunConfig, scenes: Path) -> None:
    """64 images over two workers in batches of four: the scores are those of the saved model, embedded anew."""
    task = find_benchmark("scenes_retrieval").read(str(scenes))
    embedder = load_embedder(finished.uri)
    pictures = [decode_image(data) for data in read_images(task.images)]
    expected = task.score(embedder.embed_texts(task.texts), embedder.embed_images(pictures)).scores
    found = validations(finished)
    assert sorted(found) == [1, 3, 5]
    assert {name.rpartition("/")[2]: score for name, score in found[5].items()} == pytest.approx(expected, abs=1 / 64)
    state = json.loads((Path(checkpoint.latest(finished.uri)) / "state.json").read_text())
    assert {name: score for name, score in state["metrics"].items() if "/" in name} == found[5]


def test_the_loss_falls(finished: RunConfig) -> None:
    losses = [sum(pair) for pair in curve(finished)]
    assert losses[-1] < losses[0]


def test_one_worker_makes_the_same_run(finished: RunConfig, config: RunConfig) -> None:
    alone = replace(config, name="one-worker", cluster=ClusterConfig(workers=1, cpus_per_worker=0.5))
    train(alone)
    assert_same_run(alone, finished)


def test_a_resumed_run_equals_the_uninterrupted_one_with_other_workers_and_stage(
    finished: RunConfig, config: RunConfig
) -> None:
    resumed = replace(
        config,
        name="resumed",
        train=replace(config.train, zero_stage=3),
        cluster=ClusterConfig(workers=1, cpus_per_worker=0.5),
    )
    shutil.copytree(finished.uri, resumed.uri)
    for step in (4, 6):
        shutil.rmtree(Path(resumed.uri) / "checkpoints" / f"step-{step}")
    (Path(resumed.uri) / "config.json").unlink()
    train(resumed)
    assert_same_run(resumed, finished)
    for run, attempts in ((finished, 1), (resumed, 2)):
        report = audit(run.uri)
        assert report.ok
        assert (report.attempts, report.figures()["delivered"]) == (attempts, STEPS * 16)


def test_another_recipe_in_the_same_folder_is_refused(finished: RunConfig) -> None:
    other = replace(finished, optim=replace(finished.optim, lr=5.0))
    with pytest.raises(ValueError, match=r"optim\.lr was 0\.01, is 5\.0\); choose another --name"):
        train(other)


def test_a_run_does_not_go_on_with_other_samples(ray_cluster: None, finished: RunConfig, tmp_path: Path) -> None:
    """The same shards but for one, put in their place."""
    other = replace(finished, name="other", data=replace(finished.data, uri=str(tmp_path / "shards")))
    shutil.copytree(finished.data.uri, other.data.uri)
    (tmp_path / "shards" / "000000.tar").unlink()
    shutil.copytree(Path(finished.uri) / "checkpoints", Path(other.uri) / "checkpoints")
    with pytest.raises(ValueError, match=r"step-6 was trained on.*choose another --name"):
        train(other)


def test_data_that_cannot_fill_a_batch_is_refused(ray_cluster: None, config: RunConfig, tmp_path: Path) -> None:
    large = replace(config, name="large", train=replace(config.train, global_batch=1024))
    with pytest.raises(ValueError, match="1024"):
        train(large)
    (tmp_path / "nothing").mkdir()
    empty = replace(config, name="empty", data=replace(config.data, uri=str(tmp_path / "nothing")))
    with pytest.raises(ValueError, match="nothing"):
        train(empty)
    assert not Path(large.uri).exists()
    assert not Path(empty.uri).exists()


def test_a_missing_checkpoint_is_named(tmp_path: Path, ray_cluster: None) -> None:
    recipe = tiny_recipe()
    broken = replace(recipe, storage=str(tmp_path), model=replace(recipe.model, checkpoint="/no/such/model"))
    with pytest.raises(ValueError, match="/no/such/model"):
        train(broken)
