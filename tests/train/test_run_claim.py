"""A run's folder: kept for its recipe, longer on request, and a start for others. No cluster but for the last test."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.support.checkpoints import build_llava
from vladva.config import ClusterConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from vladva.core import storage
from vladva.models import checkpoint
from vladva.recipes import tiny as tiny_recipe
from vladva.train.audit import audit
from vladva.train.engine import learning_rate
from vladva.train.launch import train
from vladva.train.run_claim import claim_run, pin_initial_weights
from vladva.train.tracking import read_metrics


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    """A run of four steps that has begun."""
    recipe = replace(tiny_recipe(), storage=str(tmp_path))
    recipe = replace(recipe, train=replace(recipe.train, steps=4))
    claim_run(recipe)
    return recipe


def steps(run: RunConfig, count: int) -> RunConfig:
    return replace(run, train=replace(run.train, steps=count))


def save_state(run: RunConfig, step: int, **changes: Any) -> str:
    """A checkpoint of nothing but its state."""
    uri = storage.join(run.uri, "checkpoints", f"step-{step}")
    config = run.to_json()
    config["model"] |= changes
    storage.write_json(storage.join(uri, "state.json"), {"step": step, "files": {}, "config": config})
    return uri


def test_a_run_gets_longer_only_on_request(run: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"train\.steps was 4, is 8\); add --extend to go on to more steps"):
        claim_run(steps(run, 8))
    told: list[str] = []
    claim_run(steps(run, 8), extend=True, tell=told.append)
    assert "goes on from 4 to 8 steps" in told[0]
    assert "it rises again" in told[0]
    assert json.loads((Path(run.uri) / "config.json").read_text())["train"]["steps"] == 8
    claim_run(steps(run, 8), tell=told.append)  # interrupted, and the same command again, with or without the flag
    claim_run(steps(run, 8), extend=True, tell=told.append)
    assert len(told) == 1


def test_a_run_gets_no_shorter_and_no_other_recipe(run: RunConfig) -> None:
    with pytest.raises(ValueError, match=r"train\.steps was 4, is 2\); a run gets no shorter; choose another --name"):
        claim_run(steps(run, 2), extend=True)
    other = replace(steps(run, 8), optim=OptimConfig(lr=1.0))
    with pytest.raises(ValueError, match=r"\(optim\.lr was 0\.003, is 1\.0\); choose another --name, with --init-from"):
        claim_run(other, extend=True)
    with pytest.raises(ValueError, match=r"train\.steps was 4, is 8, optim\.lr was"):
        claim_run(other)
    assert json.loads((Path(run.uri) / "config.json").read_text())["train"]["steps"] == 4


def test_weights_are_those_of_the_newest_checkpoint_when_the_new_run_begins(run: RunConfig) -> None:
    new = replace(run, name="new", init_from=run.uri, optim=OptimConfig(lr=1.0))
    with pytest.raises(ValueError, match="has no complete checkpoint"):
        pin_initial_weights(new)
    old = save_state(run, 2)
    claim_run(pin_initial_weights(new))
    save_state(run, 4)
    assert pin_initial_weights(new).init_from == old  # as it began
    claim_run(pin_initial_weights(new))
    assert pin_initial_weights(replace(new, name="newer", init_from=f"{run.uri}/")).init_from.endswith("step-4")
    assert pin_initial_weights(replace(new, name="newer", init_from=old)).init_from == old
    with pytest.raises(ValueError, match="init_from was"):
        claim_run(pin_initial_weights(replace(new, init_from=f"{run.uri}/checkpoints/step-4")))
    with pytest.raises(ValueError, match="is this run itself"):
        pin_initial_weights(
            replace(run, storage=str(Path(run.storage) / "x"), init_from=str(Path(run.storage) / "x" / run.name))
        )


@pytest.mark.parametrize(
    ("key", "value"), [("checkpoint", "other"), ("lora_rank", 8), ("lora_alpha", 4), ("soft_prompts", False)]
)
def test_weights_of_another_model_are_refused(run: RunConfig, key: str, value: object) -> None:
    save_state(run, 2, **{key: value})
    new = replace(run, name="new", init_from=run.uri)
    with pytest.raises(ValueError, match=rf"do not fit this run's model \(model\.{key} is {value} there and "):
        pin_initial_weights(new)


def test_weights_fit_another_dtype_and_dropout(run: RunConfig) -> None:
    uri = save_state(run, 2, dtype="bfloat16", lora_dropout=0.5)
    assert pin_initial_weights(replace(run, name="new", init_from=run.uri)).init_from == uri


def adapter(run: RunConfig) -> dict[str, Any]:
    return load_file(checkpoint.fetch_adapter(checkpoint.latest(run.uri)) / "adapter_model.safetensors")


@pytest.mark.slow
def test_a_finished_run_goes_on_and_another_begins_with_its_weights(
    ray_cluster: None, scenes: Path, tmp_path: Path
) -> None:
    run = RunConfig(
        "old",
        str(tmp_path),
        ModelConfig(build_llava(tmp_path / "llava"), lora_rank=4),
        DataConfig(str(scenes / "train"), run_length=2),
        TrainConfig(steps=2, global_batch=8, chunk_size=4, checkpoint_every=1, audit=True),
        optim=OptimConfig(lr=1e-2),
        cluster=ClusterConfig(workers=1, cpus_per_worker=0.5),
    )
    train(run)
    longer = steps(run, 4)
    told: list[str] = []
    train(longer, extend=True, tell=told.append)
    assert any("goes on from 2 to 4 steps" in line for line in told)
    rates = [row["lr"] for row in read_metrics(run.uri)]
    expected = [learning_rate(step, 2 if step < 2 else 4, run.optim) for step in range(4)]
    assert rates == pytest.approx(expected)
    report = audit(run.uri)
    assert report.ok
    assert report.figures()["delivered"] == 32

    # So small a rate changes nothing: what is saved is what the run began with, the temperature included.
    still = replace(run, optim=OptimConfig(lr=1e-30), loss=LossConfig(matryoshka=(8,)))
    still = replace(still, train=replace(still.train, steps=1))
    new, bare = replace(still, name="new", init_from=run.uri), replace(still, name="bare")
    train(new)
    train(bare)
    assert read_metrics(new.uri)[0]["temperature"] == pytest.approx(read_metrics(run.uri)[-1]["temperature"], rel=1e-2)
    assert all((adapter(new)[name] == value).all() for name, value in adapter(run).items())
    assert any((adapter(bare)[name] != value).any() for name, value in adapter(run).items())
