"""Configurations: validated at construction, with messages that name the field and the fix; equal after JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vladva.config import ClusterConfig, RunConfig, TrackingConfig, TrainConfig
from vladva.recipes import RECIPES, tiny
from vladva.train.run_claim import MAY_CHANGE, claim_run, flatten


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_recipe_survives_json(recipe: Callable[[], RunConfig]) -> None:
    config = recipe()
    assert RunConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_an_unknown_key_is_named() -> None:
    content = tiny().to_json()
    content["train"]["stepz"] = 3
    with pytest.raises(ValueError, match=r"unknown key train\.stepz"):
        RunConfig.from_json(content)


@pytest.mark.parametrize(
    ("train", "cluster", "message"),
    [
        (TrainConfig(steps=1, global_batch=64, chunk_size=24), ClusterConfig(), r"use 48"),
        (TrainConfig(steps=1, global_batch=64, chunk_size=16), ClusterConfig(workers=3), r"use 1, 2, 4 workers"),
        (TrainConfig(steps=0), ClusterConfig(), r"train\.steps is 0"),
    ],
)
def test_impossible_combinations_fail_with_the_fix(train: TrainConfig, cluster: ClusterConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(tiny(), train=train, cluster=cluster)


def test_nothing_to_train_is_refused() -> None:
    config = tiny()
    with pytest.raises(ValueError, match="nothing to train"):
        replace(config, model=replace(config.model, soft_prompts=False, lora_rank=0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonesuch"], "unknown recipe 'nonesuch'"),
        (["tiny", "--train.stepz", "3"], "--train.stepz"),
        (["tiny", "--cluster.workers", "3"], "is more than the 2 chunks of a global batch"),
        (["tiny", "--train.chunk-size", "16", "--cluster.workers", "3"], "use 1, 2, 4 workers"),
        (["tiny", "--cluster.min-workers", "3"], "cluster.min_workers 3 is more than cluster.workers 2"),
        pytest.param(["tiny", "--data.uri", "/nowhere/at/all"], "/nowhere/at/all", marks=pytest.mark.ray),
    ],
)
def test_the_command_line_says_what_is_wrong_without_a_traceback(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    command = [
        sys.executable,
        "jobs/train.py",
        *arguments,
        *(["--storage", str(tmp_path)] if len(arguments) > 1 else []),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list(tmp_path.iterdir())


def test_a_run_saved_before_losses_had_options_is_the_same_run() -> None:
    """The loss as it was saved then: the two losses' own settings were fields."""
    content = tiny().to_json()
    del content["tracking"]
    loss = content["loss"]
    del loss["options"]
    assert RunConfig.from_json({**content, "loss": loss | {"directions": "symmetric", "bias": -10.0}}) == tiny()
    one_way = RunConfig.from_json({**content, "loss": loss | {"directions": "one-way", "bias": -10.0}})
    assert one_way.loss.options == ("directions=one-way",)
    sigmoid = loss | {"contrastive": "sigmoid", "directions": "symmetric", "bias": -3.0}
    assert RunConfig.from_json({**content, "loss": sigmoid}).loss.options == ("bias=-3.0",)
    with pytest.raises(ValueError, match=r"unknown key loss\.directionz"):
        RunConfig.from_json({**content, "loss": loss | {"directionz": "one-way"}})


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (("s3://a=0.5", "s3://a=0.5"), "names a folder twice"),
        (("s3://a",), "is not URI=WEIGHT"),
        (("s3://a=0.00001", "s3://b=1"), "in whole numbers"),
    ],
)
def test_a_wrong_mix_is_refused_even_without_asserts(mix: tuple[str, ...], message: str) -> None:
    program = f"from vladva.config import DataConfig; DataConfig(uri='', mix={mix!r})"
    done = subprocess.run([sys.executable, "-O", "-c", program], capture_output=True, text=True, check=False)
    assert "ValueError" in done.stderr
    assert message in done.stderr


def test_help_tells_the_options_of_the_job_and_of_the_recipe() -> None:
    for arguments, expected in (
        (["--help"], ["--dry-run", "llava"]),
        (["tiny", "--help"], ["--dry-run", "--train.steps"]),
    ):
        command = [sys.executable, "jobs/train.py", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert all(each in done.stdout for each in expected), arguments


def test_what_may_change_between_a_run_and_its_resumption_is_listed_key_by_key(tmp_path: Path) -> None:
    config = replace(tiny(), storage=str(tmp_path))
    known = flatten(config.to_json()).keys()
    assert known >= MAY_CHANGE
    claim_run(config)
    claim_run(replace(config, tracking=TrackingConfig(mlflow=True), train=replace(config.train, keep_last=9)))
    with pytest.raises(ValueError, match=r"train\.chunk_size was 32, is 16"):
        claim_run(replace(config, train=replace(config.train, chunk_size=16)))
    with pytest.raises(ValueError, match=r"loss\.options was \[\], is \['directions=one-way'\]"):
        claim_run(replace(config, loss=replace(config.loss, options=("directions=one-way",))))
