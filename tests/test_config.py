"""Configurations: validated at construction, with messages that name the field and the fix; equal after JSON."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from vladva.config import ClusterConfig, RunConfig, TrainConfig
from vladva.recipes import RECIPES, tiny


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
        (["tiny", "--data.uri", "/nowhere/at/all"], "/nowhere/at/all"),
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
