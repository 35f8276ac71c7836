"""The memory plan: sums done by hand, and activations against what autograd really keeps."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.support.checkpoints import build_llava
from vladva.config import ClusterConfig, LossConfig
from vladva.models.adapter import add_adapter
from vladva.models.batch import as_tensors
from vladva.models.embedding_model import EmbeddingModel, checkpoint_activations
from vladva.models.packed.training import pack_training
from vladva.recipes import RECIPES, llava_1_5_7b, qwen2_vl_2b, tiny
from vladva.train.data_loader import run_preprocessor
from vladva.train.engine import deepspeed_config
from vladva.train.memory_plan import (
    GIB,
    activation_bytes,
    check_device,
    check_memory,
    layer_bytes,
    plan_memory,
    settings_of,
)

RECORDED = json.loads((Path(__file__).parents[1] / "gpu/rehearsal/recorded.json").read_text())


def test_llava_7b_by_hand() -> None:
    """8 x 1,170 tokens in bfloat16, LoRA 16: what each part is, from the published sizes of the model."""
    config = replace(llava_1_5_7b(), loss=LossConfig(next_token_weight=1.0), cluster=ClusterConfig(workers=32))
    plan = plan_memory(config)
    lora = 16 * 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    soft = 2 * 8 * 4096  # seven words and a colon
    assert plan.trainable == lora + soft + 1
    assert plan.parameters == pytest.approx(7.063e9, rel=1e-3)
    assert (plan.image_tokens, plan.text_tokens) == (576 + 32 + 500, 30 + 32)
    assert plan.tokens_per_step == 1024 * 1170
    assert plan.device["weights"] == 2 * (plan.parameters + plan.trainable)
    assert plan.device["optimizer"] == 12 * plan.trainable // 32
    assert plan.device["gradients"] == 4 * plan.trainable // 32
    assert plan.device["gradients of a pass"] == 2 * plan.trainable
    layer = 2 * (4 * 4096 + 4 * 4096 + 3 * 4096 + 3 * 11008 + 7 * 16) + 8
    assert plan.device["activations"] == 8 * 1170 * 32 * layer
    again = plan_memory(replace(config, train=replace(config.train, activation_checkpointing=True)))
    assert again.device["activations"] == 8 * 1170 * 32 * 4096 * 2
    assert again.device["one layer again"] == 8 * 1170 * (layer + 2 * (4 * 11008 + 4 * 4096))
    assert plan.device["image features"] == 32 * 1108 * 4096 * 2
    with_dropout = plan_memory(replace(config, model=replace(config.model, lora_dropout=0.1)))
    assert (plan.plain, with_dropout.plain) == (None, "LoRA dropout")
    assert with_dropout.device["token table"] == 2 * 2 * 32064 * 4096
    assert with_dropout.device["activations"] > 1.5 * plan.device["activations"]
    # Qwen2-VL's LM head is its token table: another copy, and a gradient in float32.
    qwen = qwen2_vl_2b()
    tied = plan_memory(replace(qwen, model=replace(qwen.model, lora_dropout=0.1)))
    assert tied.device["token table"] == 151936 * 1536 * (2 * 2 + 2 + 4)


def test_zero_and_offload_move_what_they_should() -> None:
    def plan(stage: int, **options: bool) -> dict[str, int]:
        config = replace(llava_1_5_7b(), cluster=ClusterConfig(workers=4))
        return plan_memory(replace(config, train=replace(config.train, zero_stage=stage, **options))).device

    zero, one, two, three = map(plan, range(4))
    assert zero["optimizer"] == pytest.approx(4 * one["optimizer"] * 8 / 12, rel=1e-6)  # no float32 copy at stage 0
    assert one["gradients"] == two["gradients"]  # bfloat16: stage 1 is stage 2
    assert two["weights"] == pytest.approx(4 * three["weights"], rel=1e-6)
    assert three["gathered weights"] == 2 * 10**9
    assert "optimizer" not in plan(2, offload=True)


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_fits_what_it_asks_for(recipe: str) -> None:
    config = RECIPES[recipe]()
    plan = check_memory(config)
    assert plan.total > 0
    small = replace(config, cluster=replace(config.cluster, device_memory_gib=0.001))
    with pytest.raises(ValueError, match="no setting makes it fit"):
        check_memory(small)


def test_every_gpu_recipe_has_been_rehearsed() -> None:
    on_gpus = {f"train {name}" for name, recipe in RECIPES.items() if recipe().cluster.gpus_per_worker}
    assert on_gpus <= set(RECORDED)


def test_a_device_that_is_smaller_than_the_recipe_says_is_refused() -> None:
    check_device(llava_1_5_7b(), int(79.1 * GIB))
    with pytest.raises(ValueError, match=r"this device has 44\.5 GiB, .*_gib is 79: use a recipe for"):
        check_device(llava_1_5_7b(), int(44.5 * GIB))


def test_the_advice_is_the_first_that_helps() -> None:
    config = replace(llava_1_5_7b(), cluster=replace(llava_1_5_7b().cluster, device_memory_gib=24))
    with pytest.raises(ValueError, match=r"activations .*; train\.activation_checkpointing True makes it \d\d\.\d GiB"):
        check_memory(config)


def test_images_are_planned_as_large_as_the_run_allows() -> None:
    qwen = qwen2_vl_2b()
    assert plan_memory(qwen).image_tokens == 1280 + 32 + 500
    # The published files of Qwen2-VL allow 16,384; LLaVA-Next takes at most one tile and 2 x 2, with newlines.
    unlimited = replace(qwen, model=replace(qwen.model, max_image_tokens=None))
    assert plan_memory(unlimited).image_tokens >= 16_384 * 0.98
    next_model = replace(llava_1_5_7b().model, checkpoint="llava-hf/llama3-llava-next-8b-hf")
    assert plan_memory(replace(llava_1_5_7b(), model=next_model)).image_tokens == 576 + 48 * (48 + 1) + 32 + 500


def test_deepspeeds_bucket_is_set_and_planned() -> None:
    config = qwen2_vl_2b()
    bucket = deepspeed_config(config)["zero_optimization"]["reduce_bucket_size"]
    assert plan_memory(config).device["collectives"] == 4 * bucket  # summed in float32


@pytest.mark.parametrize("case", [name for name in RECORDED if name.startswith("train ")])
def test_the_plan_is_what_the_rehearsal_found_or_a_little_more(case: str) -> None:
    """Within +15% and -0% of the fake tensors' peak, all layers and samples as long as they can be."""
    run = RECIPES[case.removeprefix("train ")]()
    chunks = min(2, run.chunks_per_worker)  # as the rehearsal has them
    batch = chunks * run.train.chunk_size * run.cluster.workers
    plan = plan_memory(replace(run, train=replace(run.train, global_batch=batch)))
    found = RECORDED[case]["all layers"]["peak"]
    planned = plan.total - plan.device["reserve"]  # which is for what is no tensor
    assert found <= planned <= 1.15 * found, f"{planned / found:.3f} of {found / GIB:.1f} GiB"


@pytest.mark.slow
def test_the_dry_run_prints_a_table_or_refuses_in_one_line() -> None:
    def dry_run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "jobs/train.py", "tiny", "--dry-run", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    done = dry_run("--cluster.device-memory-gib", "0.5")
    assert done.returncode == 2
    assert "activations" in done.stdout
    assert len(done.stderr.splitlines()) == 1
    assert "error: tiny-vladva needs" in done.stderr
    assert "Traceback" not in done.stderr


def kept_bytes(model: EmbeddingModel, texts: list[str]) -> tuple[int, int]:
    """Bytes that autograd keeps of a forward of texts besides weights and inputs, and the number of tokens."""
    tokens = as_tensors(model.preprocessor.texts(texts), "cpu")
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        embeddings = model(tokens)[0]
    assert embeddings.requires_grad
    return sum(storages.values()), tokens["ids"].numel()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_activations_are_what_autograd_keeps(tmp_path: Path, dropout: float) -> None:
    base = tiny()
    checkpoint = build_llava(tmp_path, width=128)
    model_config = replace(base.model, checkpoint=checkpoint, lora_rank=4, lora_dropout=dropout)
    config = replace(base, model=model_config, loss=LossConfig(next_token_weight=0.0))
    model = EmbeddingModel(model_config, run_preprocessor(config))
    model.requires_grad_(False)
    add_adapter(model, model_config)
    settings = settings_of(checkpoint).get_text_config()
    plain = pack_training(model, config)
    assert plain == ("LoRA dropout" if dropout else None)
    texts = [f"{word} a red ring and a blue star, " * 6 for word in ("so", "then", "now", "as")]
    found, tokens = kept_bytes(model.train(), texts)
    longest = tokens // len(texts)
    expected = tokens * activation_bytes(settings, config, longest, plain)
    if plain is None:  # of its last layer only the ends go on
        expected -= tokens * layer_bytes(settings, config, longest, plain) * 0.8
    assert found == pytest.approx(expected, rel=0.15)

    checkpoint_activations(model)
    model.train()
    again, _ = kept_bytes(model, texts)
    # Besides the layers' inputs, which the layers hold themselves; a packed last layer is small and keeps what it has.
    assert again < 0.25 * expected
