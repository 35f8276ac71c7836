"""Recipes: each function returns the complete configuration of a run; `jobs/train.py NAME` runs it.

Every value can be overridden on the command line (`--train.steps 50`); a variant worth keeping is a function that calls
another and replaces a few values.
"""

from __future__ import annotations

from vladva.config import ClusterConfig, DataConfig, LossConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig


def tiny() -> RunConfig:
    """The packaged tiny LVLM on generated scenes: two CPU workers, a few minutes."""
    return RunConfig(
        name="tiny-vladva",  # not the name of its base model: clients ask for either
        storage=".vladva",
        model=ModelConfig(checkpoint="tiny"),
        data=DataConfig(uri=".vladva/scenes/train"),
        optim=OptimConfig(lr=3e-3),
        loss=LossConfig(next_token_every=8),
        train=TrainConfig(steps=260, global_batch=64, chunk_size=32, checkpoint_every=65),
        cluster=ClusterConfig(workers=2, cpus_per_worker=0.5),  # leaves room for readers on two cores
    )


def llava_1_5_7b() -> RunConfig:
    """VladVA on LLaVA-1.5-7B: global batch 1024, 7 epochs of 8.1M pairs, on 32 GPUs of 80 GB."""
    return RunConfig(
        name="llava-1.5-7b",
        storage="s3://CHANGE-ME/runs",
        model=ModelConfig(checkpoint="llava-hf/llava-1.5-7b-hf", dtype="bfloat16"),
        data=DataConfig(uri="s3://CHANGE-ME/pairs"),
        train=TrainConfig(steps=55_000, global_batch=1024, chunk_size=16, checkpoint_every=500),
        cluster=ClusterConfig(workers=32, cpus_per_worker=8, gpus_per_worker=1),
    )


def llava_1_5_13b() -> RunConfig:
    """VladVA on LLaVA-1.5-13B: as the 7B, in smaller chunks and with the weights partitioned (ZeRO-3)."""
    return RunConfig(
        name="llava-1.5-13b",
        storage="s3://CHANGE-ME/runs",
        model=ModelConfig(checkpoint="llava-hf/llava-1.5-13b-hf", dtype="bfloat16"),
        data=DataConfig(uri="s3://CHANGE-ME/pairs"),
        train=TrainConfig(steps=55_000, global_batch=1024, chunk_size=8, zero_stage=3, checkpoint_every=500),
        cluster=ClusterConfig(workers=32, cpus_per_worker=8, gpus_per_worker=1),
    )


RECIPES = {recipe.__name__: recipe for recipe in (tiny, llava_1_5_7b, llava_1_5_13b)}
