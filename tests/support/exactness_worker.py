"""Steps of every backbone under ZeRO 0 to 3, one and two workers, one and four chunks; and in plain PyTorch.

python -m tests.support.exactness_worker OUT [--full]
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import torch
from torch.nn.functional import cross_entropy, normalize

from tests.support import families, ranks
from vladva.config import ClusterConfig, DataConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from vladva.data.examples import Example
from vladva.data.scenes.captions import captions
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import render
from vladva.models.adapter import add_adapter
from vladva.models.batch import MicroBatch, as_tensors
from vladva.models.embedding_model import EmbeddingModel, caption_labels
from vladva.models.preprocessor import Preprocessor
from vladva.train import collectives, global_batch, grad_cache
from vladva.train.data_loader import run_preprocessor
from vladva.train.engine import Engine
from vladva.train.setup import make_backward

PAIRS, STEPS, RATE, WEIGHT = 8, 2, 1e-2, 0.5
# AdamW's first step is the sign of the gradient, which rounding decides where the gradient is next to nothing. With a
# larger epsilon it is not, and weights can be compared as closely as gradients.
EPSILON = 1e-2
SHAPES = [(64, 64), (96, 64), (40, 120), (64, 64), (150, 50), (64, 100)]  # (width, height) of the images


class Case(NamedTuple):
    """How one global batch is computed."""

    family: str
    world: int
    stage: int
    chunks: int  # a worker
    path: str
    fault: str = "none"

    @property
    def name(self) -> str:
        return "-".join(str(value) for value in self)


FULL = [
    Case(*values)
    for values in itertools.product(families.BUILDERS, (1, 2), (0, 1, 2, 3), (1, 4), ("single_pass", "cached"))
]
# Three workers share four chunks: one has two of them, the others run theirs twice, once at weight zero.
UNEVEN = [
    Case("llava", 3, 0, 2, "cached"),
    Case("llava", 3, 3, 2, "single_pass"),
    Case("qwen2_vl", 3, 2, 2, "single_pass"),
    Case("qwen2_vl", 3, 3, 2, "cached"),
]
FAULTS = [
    Case(family, 2, stage, 4, path, fault)
    for family, stage, path in (("llava", 0, "single_pass"), ("qwen2_vl", 2, "cached"))
    for fault in ("no-gather", "drop-chunk")
] + [Case("llava", 3, 2, 2, "cached", "full-weight")]


def pairs_of(case: Case) -> set[tuple[Any, ...]]:
    """Every two options that the case has together."""
    return set(itertools.combinations(list(enumerate(case)), 2))


def pairwise() -> list[Case]:
    """A part of the full matrix in which every two options come together in some case."""
    missing = set().union(*map(pairs_of, FULL))
    cases, chosen = Random(0).sample(FULL, len(FULL)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(pairs_of(case) & missing)))
        missing -= pairs_of(chosen[-1])
    return chosen


def config_of(folder: str, case: Case) -> RunConfig:
    return RunConfig(
        name="test",
        storage="unused",
        model=ModelConfig(checkpoint=folder, lora_rank=4),
        data=DataConfig(uri="unused", run_length=1),
        loss=LossConfig(next_token_weight=WEIGHT),
        train=TrainConfig(
            steps=STEPS,
            global_batch=PAIRS,
            chunk_size=2 if case.world == 3 else PAIRS // (case.world * case.chunks),
            gradient_cache=case.path == "cached",
            zero_stage=case.stage,  # type: ignore[arg-type]
        ),
        cluster=ClusterConfig(workers=case.world, min_workers=1),
    )


def examples() -> list[Example]:
    """Scenes of several shapes; pair 2 has no long caption, pair 5 no short one, pair 7 repeats the caption of 6."""
    rows = []
    for number, (scene, random) in zip(range(PAIRS), scenes("train"), strict=False):
        worded = captions(scene, random)
        short = rows[6].short if number == 7 else None if number == 5 else worded[0]
        image = render(scene).resize(SHAPES[number % len(SHAPES)])
        rows.append(Example(str(number), image, short, None if number == 2 else worded[-1]))
    return rows


def build(config: RunConfig) -> EmbeddingModel:
    """The model at its start, LoRA's second factors not zero, so that all of them get gradients."""
    torch.manual_seed(0)
    model = EmbeddingModel(config.model, run_preprocessor(config), scalars={"log_scale": 2.0})
    model.requires_grad_(False)
    model.log_scale.requires_grad_(True)
    add_adapter(model, config.model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    return model.train()


def batches(preprocessor: Preprocessor, size: int) -> list[MicroBatch]:
    rows = examples()
    return [preprocessor.collate(i, rows[i * size : (i + 1) * size]) for i in range(PAIRS // size)]


# ---------------------------------------------------------------------------------------------------- plain PyTorch


def plain_steps(folder: str) -> dict[str, Any]:
    """One process, one batch; cross_entropy on the whole matrix, transformers' caption loss in a forward of its own."""
    model = build(config_of(folder, Case("", 1, 0, 1, "single_pass")))
    (whole,) = batches(model.preprocessor, PAIRS)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=RATE, betas=(0.9, 0.98), eps=EPSILON, weight_decay=0.0)
    valid = [i for i in range(PAIRS) if whole.has_short[i]]
    sides = {"image": as_tensors(whole.image, "cpu"), "text": as_tensors(whole.text, "cpu")}
    inputs = {
        "image": without_positions(model, model.inputs(sides["image"], as_tensors(whole.pixels, "cpu"))),
        "text": without_positions(model, model.inputs(sides["text"], None)),
    }
    result: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        vectors = {}
        for side, tokens in sides.items():
            hidden = model.base.model(**inputs[side]).last_hidden_state
            vectors[side] = normalize(hidden[torch.arange(PAIRS), tokens["prompt_lengths"] - 1][valid], dim=-1)
        logits = vectors["image"] @ vectors["text"].T * model.log_scale.exp()
        logits[valid.index(6), valid.index(7)] = logits[valid.index(7), valid.index(6)] = -torch.inf
        target = torch.arange(len(valid))
        contrastive = (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2
        caption = model.base(**inputs["image"], labels=caption_labels(sides["image"])).loss
        (contrastive + WEIGHT * caption).backward()
        result["norms"].append(float(torch.nn.utils.clip_grad_norm_(trainable.values(), 1.0)))
        if step == 0:
            result["gradients"] = {name: p.grad.clone() for name, p in trainable.items()}
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            result["weights"] = {name: p.detach().clone() for name, p in trainable.items()}
        result["losses"].append((float(contrastive), float(caption)))
    return result


def without_positions(model: EmbeddingModel, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs whose positions transformers finds by itself."""
    if "position_ids" not in inputs:
        return inputs
    image = inputs["input_ids"] == model.base.config.image_token_id
    return {n: t for n, t in inputs.items() if n != "position_ids"} | {"mm_token_type_ids": image.int()}


# ------------------------------------------------------------------------------------------------------ vladva's steps


@contextmanager
def broken(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """The function of that name is another one, wherever it is called."""
    modules = [module for module in (collectives, global_batch, grad_cache) if hasattr(module, name)]
    whole = getattr(modules[0], name)
    for module in modules:
        setattr(module, name, function)
    yield
    for module in modules:
        setattr(module, name, whole)


def full_weight(chunks: list[MicroBatch], device: torch.device) -> list[grad_cache.Pass]:
    return [grad_cache.Pass(chunk, 1.0, min(i, len(chunks) - 1)) for i, chunk in enumerate((chunks + chunks[-1:])[:2])]


FAULTY = {"no-gather": ("gather", lambda local: local), "full-weight": ("padded_passes", full_weight)}


def run_cases(rank: int, out: Path, cases: list[Case]) -> None:
    for case in cases:
        began = time.monotonic()
        with broken(*FAULTY[case.fault]) if case.fault in FAULTY else nullcontext():
            result = steps(rank, out, case)
        if rank == 0:
            torch.save(result, out / f"{case.name}.pt")
            print(f"{case.name}: {time.monotonic() - began:.1f} s", flush=True)


def steps(rank: int, out: Path, case: Case) -> dict[str, Any]:
    config = config_of(str(out / case.family), case)
    model = build(config)
    engine, backward = Engine(model, config), make_backward(config)
    for group in engine.optimizer.param_groups:
        group["eps"] = EPSILON
    share = batches(model.preprocessor, config.train.chunk_size)[rank :: case.world]
    if case.fault == "drop-chunk":
        share = [*share[:-1], share[0]]
    result: dict[str, Any] = {"losses": [], "norms": []}
    for step in range(STEPS):
        found = backward(engine, share)
        result["norms"].append(engine.step(RATE))
        result["losses"].append((found.contrastive.loss.item(), found.next_token.item()))
        if step == 0:
            with engine.gathered():
                result["weights"] = {name: p.detach().clone() for name, p in engine.trainable.items()}
            # The first moment is now a tenth of the (clipped) gradient.
            moments = engine.optimizer_state()
            result["gradients"] = {name: moments[f"{name}.exp_avg"] * 10 for name in engine.trainable}
    return result


def main() -> None:
    out = Path(sys.argv[1])
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    torch.set_num_threads(1)  # no threads before ranks.run forks
    for family in families.BUILDERS:
        families.build(family, out / family)
    cases = (FULL if "--full" in sys.argv else pairwise()) + UNEVEN + FAULTS
    for world in (3, 2, 1):
        ranks.run(world, run_cases, out, [case for case in cases if case.world == world])
    for family in families.BUILDERS:
        torch.save(plain_steps(str(out / family)), out / f"{family}.pt")


if __name__ == "__main__":
    main()
