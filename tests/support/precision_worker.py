"""What a bfloat16 model's engine keeps in float32: gradients over many chunks, and the scalars of the loss.

python -m tests.support.precision_worker CHECKPOINT OUT
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from tests.support import ranks
from tests.support.train_options_worker import Case, build, config_of
from vladva.config import RunConfig
from vladva.models.batch import MicroBatch
from vladva.train import engine as engine_file
from vladva.train.device_chunk import on_device
from vladva.train.engine import Engine, deepspeed_config
from vladva.train.grad_cache import Outputs, Pass, forward

REPEATS = 9  # nine times a gradient is not to be had by adding in bfloat16
STAGES = (0, 1, 2, 3)


def config_at(checkpoint: str, stage: int) -> RunConfig:
    """A run of one worker with nine chunks a step."""
    config = config_of(checkpoint, Case(world=1, model=(("dtype", "bfloat16"),), train=(("zero_stage", stage),)))
    train = replace(config.train, global_batch=REPEATS * config.train.chunk_size)
    return replace(config, train=train)


def embedded(engine: Engine, chunk: MicroBatch) -> Outputs:
    """A chunk through the model, without captions."""
    there = on_device(chunk, engine.device, with_pixels=True)
    return forward(engine, Pass(chunk, 1.0, 0), there, there.pixels, captions=False, caption_tokens=None)


def gradients(engine: Engine, chunk: MicroBatch, repeats: int) -> dict[str, torch.Tensor]:
    """The gradients after the same backward so many times, as the optimizer gets them."""
    from deepspeed.utils import safe_get_full_grad

    for number in range(repeats):
        found = embedded(engine, chunk)
        surrogate = (found.image * 0.37).sum() + (found.text * 0.11).sum() + found.scalars.sum()
        engine.backward(surrogate, last=number == repeats - 1)
    names = [name for name in engine.trainable if "lora_B" in name][:4]
    return {
        name: (p.grad if engine.stage == 0 else safe_get_full_grad(p)).detach().float().clone()
        for name, p in ((name, engine.trainable[name]) for name in names)
    }


def added_up(checkpoint: str, stage: int) -> float:
    """How far nine times a gradient is from nine gradients added up, relative to the largest."""
    config = config_at(checkpoint, stage)
    model, chunks = build(config, "plain")
    engine = Engine(model, config)
    many = gradients(engine, chunks[0], REPEATS)
    model, chunks = build(config, "plain")
    once = gradients(Engine(model, replace(config, train=replace(config.train, global_batch=3))), chunks[0], 1)
    assert all(gradient.any() for gradient in once.values())
    return max(
        float((many[name] - REPEATS * once[name]).abs().max() / (REPEATS * once[name]).abs().max()) for name in once
    )


def scalar_path(checkpoint: str, stage: int) -> list[float]:
    """The log scale over steps that push it up to its limit, over it, and down again, by a thousandth each."""
    config = config_at(checkpoint, stage)
    model, chunks = build(config, "plain")
    model.log_scale.data.fill_(math.log(100) - 0.0025)
    engine = Engine(model, config)
    values = [engine.scalars.item()]
    for direction in (-1, -1, -1, -1, 1, 1, 1, 1, 1, 1, 1, 1):
        for number in range(engine.micro_steps):
            found = embedded(engine, chunks[0])
            loss = direction * found.scalars.sum() + 0.0 * (found.image.sum() + found.text.sum())
            engine.backward(loss, last=number == engine.micro_steps - 1)
        engine.step(1e-3)
        values.append(engine.scalars.item())
    return values


def measure(rank: int, checkpoint: str, out: Path) -> None:
    found: dict[str, Any] = {}
    for stage in STAGES:
        found[f"added up, ZeRO-{stage}"] = added_up(checkpoint, stage)
        found[f"scalar, ZeRO-{stage}"] = scalar_path(checkpoint, stage)

    def rounded(config: RunConfig) -> dict[str, Any]:
        settings = deepspeed_config(config)
        settings["zero_optimization"]["stage"] = config.train.zero_stage  # DeepSpeed's own 1
        return {
            name: value for name, value in settings.items() if name not in ("data_types", "communication_data_type")
        }

    engine_file.deepspeed_config = rounded
    for stage in (1, 2):
        found[f"added up, ZeRO-{stage}, wrong"] = added_up(checkpoint, stage)
    (out / "precision.json").write_text(json.dumps(found))


def main() -> None:
    ranks.run(1, measure, sys.argv[1], Path(sys.argv[2]))


if __name__ == "__main__":
    main()
