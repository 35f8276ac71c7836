"""Devices: a process that asked for no GPU finds none; the defaults take one where the cluster has it.

The GPU is Ray's word alone: this machine has none, so a process that was given it must say that torch does not see it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from vladva.core.devices import NO_GPU, assigned_device
from vladva.models.resolve import dtype_for
from vladva.recipes import llava_1_5_7b
from vladva.recipes import tiny as tiny_recipe

PROGRAM = """
import json, os, ray
os.environ.pop("CUDA_VISIBLE_DEVICES", None)
ray.init("local", num_cpus=4, num_gpus=1, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
from vladva.core import devices, ray_tasks

def look():
    try:
        device = devices.assigned_device()
    except ValueError as error:
        device = str(error)
    import torch
    return device, os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count()

print(json.dumps({
    "before": ray.get(ray.remote(num_gpus=0)(lambda: os.environ.get("CUDA_VISIBLE_DEVICES")).remote()),
    "without": ray.get(ray.remote(num_gpus=0)(look).remote()),
    "with": ray.get(ray.remote(num_gpus=1)(look).remote()),
    "wanted": [devices.gpus_for(None), devices.gpus_for(None, actors=2), devices.gpus_for(0), devices.gpus_for(0.25)],
    "pool": [ray_tasks.actor_pool(3, 1).min_size, ray_tasks.actor_pool(3, 1, 1).min_size,
             ray_tasks.actor_pool(3, 1, 0.5).min_size],
}))
"""


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What processes see on a cluster with one GPU."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.ray
def test_ray_hides_no_gpu_from_who_asked_for_none_so_we_do(seen: dict[str, Any]) -> None:
    assert seen["before"] is None, "Ray hides GPUs again"
    assert seen["without"] == ["cpu", "", 0]


@pytest.mark.ray
def test_who_was_given_a_gpu_takes_it_or_says_why_not(seen: dict[str, Any]) -> None:
    device, visible, count = seen["with"]
    assert visible == "0"
    if count:
        assert device == "cuda"
    else:
        assert device.startswith(f"Ray gave this process GPU 0 of {os.uname().nodename}, but torch")


@pytest.mark.ray
def test_defaults_take_the_gpus_there_are(seen: dict[str, Any]) -> None:
    assert seen["wanted"] == [1, 0.5, 0, 0.25]
    assert seen["pool"] == [3, 1, 2]


def test_without_ray_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NO_GPU:
        monkeypatch.setenv(name, "1")  # put back afterwards
    assert assigned_device() == "cpu"
    assert {name: os.environ[name] for name in NO_GPU} == NO_GPU


def test_on_gpus_the_dtype_is_the_runs_own(tmp_path: Path) -> None:
    recipe = replace(tiny_recipe(), storage=str(tmp_path))
    (tmp_path / recipe.name / "checkpoints" / "step-2").mkdir(parents=True)
    (tmp_path / recipe.name / "config.json").write_text(json.dumps(recipe.to_json()))
    assert dtype_for(recipe.uri, 1) == dtype_for(f"{recipe.uri}/checkpoints/step-2", 1) == "float32"
    large = replace(llava_1_5_7b(), name=recipe.name, storage=str(tmp_path))
    (tmp_path / recipe.name / "config.json").write_text(json.dumps(large.to_json()))
    assert dtype_for(recipe.uri, 1) == "bfloat16"
    assert dtype_for(recipe.uri, 0) == "float32"
    assert dtype_for("llava-hf/llava-1.5-7b-hf", 1) == "bfloat16"


def test_workers_of_a_run_without_gpus_start_with_all_of_them_hidden(tmp_path: Path) -> None:
    """Ray Train asks torch for devices before the loop begins."""
    from vladva.train.launch import make_trainer

    recipe = replace(tiny_recipe(), storage=str(tmp_path))
    assert make_trainer(recipe).run_config.worker_runtime_env == {"env_vars": NO_GPU}
    on_gpus = replace(recipe, cluster=replace(recipe.cluster, gpus_per_worker=1))
    assert make_trainer(on_gpus).run_config.worker_runtime_env == {}
