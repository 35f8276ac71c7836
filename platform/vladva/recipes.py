"""Recipes: each function returns the complete configuration of a run; `jobs/train.py NAME` runs it.

Every value can be overridden on the command line (`--train.steps 50`); a variant worth keeping is a function that calls
another and replaces a few values.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from collections.abc import Sequence
from dataclasses import replace

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


def tiny_e5_v() -> RunConfig:
    """E5-V's way on the tiny LVLM: sentences only (`jobs/scenes.py --triplets` draws them), then used on images."""
    return replace(
        tiny(),
        name="tiny-e5-v",
        model=replace(E5_V_MODEL, checkpoint="tiny", dtype="float32"),
        data=replace(E5_V_DATA, uri=".vladva/triplets"),
        loss=E5_V_LOSS,
        optim=OptimConfig(lr=1e-3),
    )


def tiny_composed() -> RunConfig:
    """Image and words to an image on the tiny LVLM (`jobs/scenes.py --composed` draws the pairs)."""
    base = tiny()
    return replace(
        base,
        name="tiny-composed",
        data=replace(base.data, uri=".vladva/composed/train", mixed_inputs=True),
        loss=replace(base.loss, next_token_weight=0.0),  # its samples have no captions
    )


# --- VladVA (method: arXiv 2412.04378; what is not published is a default of ours, see the classes of config.py)


# What a process can have of a card that is sold as 80, 48 and 24 GB (H100, A100; L40S, A6000; L4, A10G).
OF_80_GB, OF_48_GB, OF_24_GB = 79, 44, 22


def llava_1_5_7b() -> RunConfig:
    """VladVA on LLaVA-1.5-7B: global batch 1024, 7 epochs of 8.1M pairs (55,000 steps), on 32 GPUs of 80 GB."""
    return RunConfig(
        name="llava-1.5-7b",
        storage="s3://CHANGE-ME/runs",
        model=ModelConfig(checkpoint="llava-hf/llava-1.5-7b-hf", dtype="bfloat16"),
        data=DataConfig(uri="s3://CHANGE-ME/pairs"),
        train=TrainConfig(steps=55_000, global_batch=1024, chunk_size=8, checkpoint_every=500),
        # Workers wait for their device, and readers need the other CPUs of the node.
        cluster=ClusterConfig(workers=32, cpus_per_worker=1, gpus_per_worker=1, device_memory_gib=OF_80_GB),
    )


def llava_1_5_7b_48gb() -> RunConfig:
    """As llava_1_5_7b, on GPUs of 48 GB: smaller chunks, which cost no work, only larger products."""
    seven = with_small_chunks(llava_1_5_7b(), 4)
    return replace(seven, cluster=replace(seven.cluster, device_memory_gib=OF_48_GB))


def llava_1_5_7b_24gb() -> RunConfig:
    """As llava_1_5_7b, on GPUs of 24 GB: activations are computed again, a third more work."""
    seven = with_small_chunks(llava_1_5_7b(), 4)
    return replace(
        seven,
        train=replace(seven.train, activation_checkpointing=True),
        cluster=replace(seven.cluster, device_memory_gib=OF_24_GB),
    )


def llava_1_5_13b() -> RunConfig:
    """VladVA on LLaVA-1.5-13B: as the 7B, in chunks of half the size."""
    seven = with_small_chunks(llava_1_5_7b(), 4)
    return replace(seven, name="llava-1.5-13b", model=replace(seven.model, checkpoint="llava-hf/llava-1.5-13b-hf"))


def llava_1_5_13b_48gb() -> RunConfig:
    """As llava_1_5_13b, on GPUs of 48 GB: activations are computed again, a third more work."""
    thirteen = llava_1_5_13b()
    return replace(
        thirteen,
        train=replace(thirteen.train, activation_checkpointing=True),
        cluster=replace(thirteen.cluster, device_memory_gib=OF_48_GB),
    )


def qwen2_vl_2b() -> RunConfig:
    """VladVA on Qwen2-VL-2B: as LLaVA-1.5-7B."""
    seven = llava_1_5_7b()
    return replace(
        seven,
        name="qwen2-vl-2b",
        # The published files allow 16,384 tokens an image.
        model=replace(seven.model, checkpoint="Qwen/Qwen2-VL-2B-Instruct", max_image_tokens=1280),
    )


def qwen2_vl_2b_48gb() -> RunConfig:
    """As qwen2_vl_2b, on GPUs of 48 GB."""
    two = qwen2_vl_2b()
    return replace(two, cluster=replace(two.cluster, device_memory_gib=OF_48_GB))


def qwen2_vl_2b_24gb() -> RunConfig:
    """As qwen2_vl_2b, on GPUs of 24 GB: chunks of half the size, images of at most 960 tokens."""
    two = with_small_chunks(qwen2_vl_2b(), 4)
    return replace(
        two,
        model=replace(two.model, max_image_tokens=960),
        cluster=replace(two.cluster, device_memory_gib=OF_24_GB),
    )


def with_small_chunks(run: RunConfig, size: int) -> RunConfig:
    """The run in chunks of `size` pairs, which are read with one request."""
    return replace(run, data=replace(run.data, run_length=size), train=replace(run.train, chunk_size=size))


# --- E5-V (arXiv 2407.12580): trained on texts alone, used on images


E5_V_MODEL = ModelConfig(
    checkpoint="llava-hf/llama3-llava-next-8b-hf",
    dtype="bfloat16",
    image_prompt="Summary above image in one word: ",
    text_prompt="Summary above sentence in one word: ",
    soft_prompts=False,
    lora_rank=64,
    lora_alpha=16,
    lora_dropout=0.05,
)
E5_V_DATA = DataConfig(
    uri="s3://CHANGE-ME/nli", texts_only=True, hard_negatives=1, max_text_tokens=32, short_below=512, long_below=512
)
E5_V_LOSS = LossConfig(
    options=("directions=one-way",), temperature=0.05, learn_temperature=False, next_token_weight=0.0
)


def e5_v_llava_next_8b() -> RunConfig:
    """E5-V on LLaVA-Next-8B: NLI triplets, global batch 768, 2 epochs of 275,000 (716 steps, 100 of them warm-up).

    A sample is a JSON member of a tar: {"text": sentence, "captions": [entailed], "negatives": [contradicted]}.
    """
    return RunConfig(
        name="e5-v-llava-next-8b",
        storage="s3://CHANGE-ME/runs",
        model=E5_V_MODEL,
        data=E5_V_DATA,
        loss=E5_V_LOSS,
        optim=OptimConfig(lr=4e-4, warmup_fraction=100 / 716),
        train=TrainConfig(steps=716, global_batch=768, chunk_size=16, checkpoint_every=100),
        cluster=ClusterConfig(workers=8, cpus_per_worker=1, gpus_per_worker=1, device_memory_gib=OF_80_GB),
    )


def e5_v_llava_1_5_7b() -> RunConfig:
    """E5-V on LLaVA-1.5-7B: as on LLaVA-Next-8B."""
    eight = e5_v_llava_next_8b()
    model = replace(eight.model, checkpoint="llava-hf/llava-1.5-7b-hf")
    return replace(eight, name="e5-v-llava-1.5-7b", model=model)


# --- VLM2Vec's (arXiv 2410.05160): InfoNCE alone


def vlm2vec_qwen2_vl_2b() -> RunConfig:
    """InfoNCE alone on Qwen2-VL-2B, after VLM2Vec: images to texts, temperature 0.02, global batch 1024, LoRA 16."""
    vladva = qwen2_vl_2b()
    return replace(
        vladva,
        name="vlm2vec-qwen2-vl-2b",
        model=replace(vladva.model, soft_prompts=False),
        loss=LossConfig(
            options=("directions=one-way",), temperature=0.02, learn_temperature=False, next_token_weight=0.0
        ),
        optim=OptimConfig(lr=2e-5),
        train=replace(vladva.train, steps=2_000),
    )


RECIPES = {
    recipe.__name__: recipe
    for recipe in (
        tiny,
        tiny_e5_v,
        tiny_composed,
        llava_1_5_7b,
        llava_1_5_7b_48gb,
        llava_1_5_7b_24gb,
        llava_1_5_13b,
        llava_1_5_13b_48gb,
        qwen2_vl_2b,
        qwen2_vl_2b_48gb,
        qwen2_vl_2b_24gb,
        e5_v_llava_next_8b,
        e5_v_llava_1_5_7b,
        vlm2vec_qwen2_vl_2b,
    )
}


# --- command line


def parse_recipe(arguments: Sequence[str], *, prog: str, options: argparse.ArgumentParser | None = None) -> RunConfig:
    """The recipe that the first argument names, with the overrides that follow. Raises ValueError, in one line.

    options: the command's other options, for `--help`.
    """
    import tyro

    if arguments and not arguments[0].startswith("-") and arguments[0] not in RECIPES:
        raise ValueError(f"unknown recipe {arguments[0]!r}; there are {', '.join(RECIPES)}")
    if options is not None and {"-h", "--help"} & set(arguments):
        options.print_help()
    recipes = {name: ((recipe.__doc__ or name).splitlines()[0], recipe()) for name, recipe in RECIPES.items()}
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.extras.overridable_config_cli(recipes, prog=prog, args=list(arguments))
    except SystemExit as refusal:
        if not refusal.code:  # --help
            raise
        # tyro draws its message in a box; ours are one line.
        lines = [line.strip("│╭╮╰╯─ \n") for line in told.getvalue().splitlines()]
        raise ValueError(" ".join(line for line in lines if line)) from None
