"""The cases by name, and how one is run: with few layers, and, from one more of either kind, with all."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from tests.gpu.rehearsal.cases import FEW, Measured, embedding, extrapolate, generation, losses, training_step
from tests.gpu.rehearsal.fake_cuda import FakeCuda
from tests.support.published import Depth, depth_of
from vladva.losses.contrastive import loss_names
from vladva.models.backbones import real_config
from vladva.recipes import RECIPES

Run = Callable[[FakeCuda, Depth], Measured]
LLAVA, QWEN = "llava-hf/llava-1.5-7b-hf", "Qwen/Qwen2-VL-2B-Instruct"
EMBEDDED = (LLAVA, QWEN, "llava-hf/llava-1.5-13b-hf", "llava-hf/llama3-llava-next-8b-hf")
BATCH = {"images": 16, "texts": 256}
SERVED = {"images": 1, "texts": 8}  # small batches: there the launches are what takes the time
USUAL = (  # recipes that are run with samples of usual lengths, too, for README's table
    *("llava_1_5_7b", "llava_1_5_7b_24gb", "llava_1_5_13b", "qwen2_vl_2b"),
    *("e5_v_llava_next_8b", "vlm2vec_qwen2_vl_2b"),
)
QUICK = (
    "train llava_1_5_7b",
    "train qwen2_vl_2b",
    "train e5_v_llava_1_5_7b",
    f"embed images {QWEN}",
    f"embed texts {QWEN}",
    f"embed images {LLAVA}",
    f"serve texts {QWEN}",
    f"serve texts {LLAVA}",
    f"generate {QWEN}",
    f"generate {LLAVA}",
    *(f"loss {name}" for name in loss_names()),
)


def all_cases() -> dict[str, tuple[str, Run]]:
    """Name -> checkpoint (none where layers do not matter), and what is run."""
    cases: dict[str, tuple[str, Run]] = {}
    for name, recipe in RECIPES.items():
        run = recipe()
        if run.cluster.gpus_per_worker:
            cases[f"train {name}"] = run.model.checkpoint, partial(training_step, run=run, longest=True)
            if name in USUAL:
                cases[f"usual {name}"] = run.model.checkpoint, partial(training_step, run=run, longest=False)
    # What no recipe does: padded tokens where packed ones could be, and all chunks in one pass.
    seven = RECIPES["llava_1_5_7b"]()
    once = replace(seven, train=replace(seven.train, global_batch=32 * 8, chunk_size=8, gradient_cache=False))
    cases["plain llava_1_5_7b"] = LLAVA, partial(training_step, run=seven, longest=True, plain=True)
    cases["single pass llava_1_5_7b"] = LLAVA, partial(training_step, run=once, longest=True)
    for checkpoint in EMBEDDED:
        for side, size in BATCH.items():
            case = partial(embedding, checkpoint=checkpoint, side=side, size=size)
            cases[f"embed {side} {checkpoint}"] = checkpoint, case
    for checkpoint in (LLAVA, QWEN):
        for side, size in SERVED.items():
            case = partial(embedding, checkpoint=checkpoint, side=side, size=size, adapter=True)
            cases[f"serve {side} {checkpoint}"] = checkpoint, case
    for checkpoint in (LLAVA, QWEN):
        cases[f"generate {checkpoint}"] = checkpoint, partial(generation, checkpoint=checkpoint)
    for name in loss_names():
        cases[f"loss {name}"] = "", partial(losses, name=name)
    return cases


def run_case(mode: FakeCuda, case: tuple[str, Run], *, quick: bool, whole: bool = False) -> dict[str, Any]:
    """What a case takes with few layers, and with all of them: extrapolated or, if `whole`, run as well."""

    def measured(depth: Depth) -> Measured:
        found = run(mode, depth)
        gc.collect()  # models are circles of references
        assert mode.counts.live == 0, f"{mode.counts.live} bytes are left of the last case"
        return found

    checkpoint, run = case
    few = measured(FEW)
    parts = {"few layers": few.to_json()}
    if quick or not checkpoint:
        return parts
    depth = depth_of(real_config(checkpoint))
    text, vision = measured((FEW[0] + 1, FEW[1])), measured((FEW[0], FEW[1] + 1))
    parts["all layers"] = extrapolate(few, text, vision, depth).to_json()
    if whole:
        parts["run with all layers"] = measured(depth).to_json()
    return parts
