"""A run that changes workers and ZeRO stage on its way, and one that does not, saved for comparison.

python tests/portable_worker.py CHECKPOINT STORAGE DATA
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from tests.support import ranks
from vladva.config import ClusterConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from vladva.models import checkpoint
from vladva.train.data_loader import ChunkReader
from vladva.train.engine import learning_rate
from vladva.train.loop import write_checkpoint
from vladva.train.setup import build_engine, make_backward

HALF, STEPS = 2, 4
# Groups of processes, one after the other: how many workers, and (run, first step, ZeRO stage) of the halves they make.
# With AdamW's own, the first steps are the sign of gradients that rounding decides where they are next to nothing.
EPSILON = 1e-2
# "there" has its first half from "plain".
GROUPS = (
    (2, (("back", 0, 1),)),
    (4, (("plain", 0, 3), ("plain", HALF, 3), ("back", HALF, 3))),
    (2, (("there", HALF, 1), ("bfloat16", 0, 2), ("bfloat16", HALF, 0))),
)


def config_of(lvlm: str, storage: str, data: str, name: str) -> RunConfig:
    return RunConfig(
        name=name,
        storage=storage,
        model=ModelConfig(checkpoint=lvlm, lora_rank=4, dtype="bfloat16" if name == "bfloat16" else "float32"),
        data=DataConfig(uri=data, run_length=1),
        optim=OptimConfig(lr=1e-2, warmup_fraction=0.5),
        train=TrainConfig(steps=STEPS, global_batch=8, chunk_size=2, gradient_cache=True),
    )


def half(rank: int, config: RunConfig, start: int) -> None:
    """Steps `start` to `start + HALF`, from the checkpoint before them to the one after."""
    torch.manual_seed(rank)  # what is not restored differs from run to run
    engine = build_engine(config, start)
    for group in engine.optimizer.param_groups:
        group["eps"] = EPSILON
    saved = checkpoint.read_checkpoint(f"{config.uri}/checkpoints/step-{start}") if start else None
    if saved:
        moments = engine.optimizer_state()
        assert moments.keys() == saved.optimizer.keys()
        worst = max((moments[key] - value).abs().max().item() for key, value in saved.optimizer.items())
        assert worst == 0, f"the optimizer's state differs by {worst}"
    next_chunk = saved.state["next_chunk"] if saved else 0
    reader, backward, losses = ChunkReader(config), make_backward(config), []
    for step in range(start, start + HALF):
        world = distributed.get_world_size()
        numbers = range(next_chunk + rank, next_chunk + config.chunks_per_batch, world)
        found = backward(engine, [reader(number) for number in numbers])
        engine.step(learning_rate(step, STEPS, config.optim))
        next_chunk += config.chunks_per_batch
        losses.append((found.contrastive.loss.item(), found.next_token.item(), found.scalars[0].item()))
    saver = checkpoint.AsyncSaver(config.uri, keep_last=2) if rank == 0 else None
    write_checkpoint(engine, saver, config, start + HALF, {})
    if saver is not None:
        saver.close()
        torch.save(losses, Path(config.uri) / f"losses-{start}.pt")


def halves(rank: int, storage: str, configs: list[tuple[int, RunConfig]]) -> None:
    for start, config in configs:
        source, target = Path(storage) / "plain" / "checkpoints", Path(config.uri) / "checkpoints"
        if rank == 0 and config.name == "there":
            shutil.copytree(source / f"step-{start}", target / f"step-{start}")
        distributed.barrier()
        half(rank, config, start)
        distributed.barrier()


def main() -> None:
    lvlm, storage, data = sys.argv[1:]
    for workers, parts in GROUPS:
        configs = []
        for name, start, stage in parts:
            base = config_of(lvlm, storage, data, name)
            train = replace(base.train, zero_stage=stage)
            configs.append((start, replace(base, train=train, cluster=ClusterConfig(workers=workers))))
        ranks.run(workers, halves, storage, configs)


if __name__ == "__main__":
    main()
