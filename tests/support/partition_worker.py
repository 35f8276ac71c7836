"""Steps of a run under ZeRO-2 and ZeRO-3 by two workers, and what their weights took while they were loaded.

python -m tests.support.partition_worker CHECKPOINT OUT
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.support import ranks
from tests.support.exactness_worker import Case, batches, config_of
from vladva.config import RunConfig
from vladva.models.embedding_model import EmbeddingModel
from vladva.train import setup
from vladva.train.data_loader import run_preprocessor
from vladva.train.engine import Engine

WORLD, STEPS, RATE = 2, 3, 1e-2
DTYPES = ("float32", "bfloat16")


def run_of(checkpoint: str, stage: int, dtype: str) -> RunConfig:
    """Two chunks a step, of each worker."""
    config = config_of(checkpoint, Case("", WORLD, stage, 2, "cached"))
    return replace(config, model=replace(config.model, dtype=dtype))


def left_whole(model: EmbeddingModel, config: RunConfig, device: torch.device) -> None:
    """In the place of `partition_layers`: DeepSpeed gets the whole model, and partitions it at its start."""
    for parameter in model.lvlm.parameters():  # not buffers: rotary positions stay in float32
        parameter.data = parameter.data.to(device, getattr(torch, config.model.dtype))


def steps(config: RunConfig, rank: int) -> list[list[float]]:
    """The losses and the gradient's norm of each step."""
    model = setup.build_trained_model(config, 0)
    engine, backward = Engine(model, config), setup.make_backward(config)
    chunks = batches(model.preprocessor, config.train.chunk_size)[rank::WORLD]
    found = []
    for _ in range(STEPS):
        loss = backward(engine, chunks)
        found.append([float(loss.contrastive.loss), float(loss.next_token), engine.step(RATE)])
    return found


# ------------------------------------------------------------------------------------------------------------ memory


class Watch:
    """Elements of weights that a worker holds in memory of its own, at most, and bytes that it wrote into files."""

    def __init__(self) -> None:
        self.model: nn.Module | None = None
        self.peak = self.written = 0

    def look(self) -> None:
        """Count now."""
        assert self.model is not None
        places = mapped_files()
        own = 0
        for parameter in self.model.parameters():
            own += getattr(parameter, "ds_tensor", parameter.data[:0]).numel()
            if not any(start <= parameter.data_ptr() < end for start, end, _ in places):
                own += parameter.data.numel()
        self.peak = max(self.peak, own)
        self.written = max(self.written, sum(dirty for *_, dirty in places))


def mapped_files() -> list[tuple[int, int, int]]:
    """Where files of weights are mapped, start and end, and how many bytes there are this process's own."""
    found = []
    for block in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        if ".safetensors" in block:
            start, end = (int(each, 16) for each in block.split(" ", 1)[0].split("-"))
            dirty = re.search(r"Private_Dirty: *(\d+) kB", block)
            assert dirty is not None
            found.append((start, end, 1024 * int(dirty[1])))
    return found


def watched(config: RunConfig, *, mapped: bool = True, copy: bool = True) -> Watch:
    """What it takes to build the model; faults: not `mapped` from its files, no `copy` of what is sent."""
    import deepspeed

    watch = Watch()
    partition, zero_init = setup.partition_layers, deepspeed.zero.Init._zero_init_param
    original_to = torch.Tensor.to

    def partition_layers(model: EmbeddingModel, *rest: Any) -> None:
        if not mapped:
            for parameter in model.lvlm.parameters():
                parameter.data = parameter.data.clone()
        watch.model = model
        watch.look()
        partition(model, *rest)
        watch.look()

    def looking(self: Any, parameter: nn.Parameter) -> None:
        watch.look()
        zero_init(self, parameter)
        watch.look()

    def to(tensor: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        return original_to(tensor, *arguments, **{name: v for name, v in options.items() if name != "copy"})

    changed: list[tuple[Any, str, Callable[..., Any]]] = [
        (setup, "partition_layers", partition_layers),
        (deepspeed.zero.Init, "_zero_init_param", looking),
        *([] if copy else [(torch.Tensor, "to", to)]),
    ]
    before = [(where, name, getattr(where, name)) for where, name, _ in changed]
    for where, name, function in changed:
        setattr(where, name, function)
    try:
        setup.build_trained_model(config, 0)
    finally:
        for where, name, function in before:
            setattr(where, name, function)
    return watch


def measure(rank: int, checkpoint: str, out: Path) -> None:
    found: dict[str, Any] = {}
    for dtype in DTYPES:
        for stage in (2, 3):
            found[f"{dtype}, ZeRO-{stage}"] = steps(run_of(checkpoint, stage, dtype), rank)
        partition_layers, setup.partition_layers = setup.partition_layers, left_whole
        found[f"{dtype}, left whole"] = steps(run_of(checkpoint, 3, dtype), rank)
        setup.partition_layers = partition_layers
    three = run_of(checkpoint, 3, "float16")  # as the file has it
    for name, faults in {"": {}, "not mapped": {"mapped": False}, "no copy": {"copy": False}}.items():
        watch = watched(three, **faults)
        found[f"memory {name}".strip()] = watch.peak, watch.written
    model = EmbeddingModel(three.model, run_preprocessor(three))
    in_layers = {name: p.numel() for name, p in model.named_parameters() if ".layers." in name}
    found["sizes"] = {
        "whole": sum(p.numel() for p in model.parameters()),
        "in layers": sum(in_layers.values()),
        "largest": max(in_layers.values()),
    }
    (out / f"{rank}.json").write_text(json.dumps(found))


def main() -> None:
    ranks.run(WORLD, measure, sys.argv[1], Path(sys.argv[2]))


if __name__ == "__main__":
    main()
