"""One rank of the gradient test: steps of every ZeRO stage and path, saved for comparison with plain PyTorch.

python tests/gradcache_worker.py CHECKPOINT OUT FAULT   (RANK and WORLD_SIZE from the environment)
FAULT: none, or a way of being wrong that the test must catch: no-gather, drop-chunk.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import distributed

from vladva import gradcache
from vladva.batches import Batch
from vladva.chunks import preprocessor_of
from vladva.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.embedder import EmbeddingModel, add_adapter
from vladva.engine import Engine
from vladva.examples import Example
from vladva.losses.info_nce import info_nce
from vladva.scenes import captions, render, scenes

CHUNKS, PAIRS, STEPS, RATE = 4, 3, 2, 1e-2


def config_of(checkpoint: str, workers: int) -> RunConfig:
    """Four chunks of three pairs."""
    return RunConfig(
        name="test",
        storage="unused",
        model=ModelConfig(checkpoint=checkpoint, lora_rank=4),
        data=DataConfig(uri="unused", run_length=1),
        train=TrainConfig(steps=STEPS, global_batch=CHUNKS * PAIRS, chunk_size=PAIRS),
        cluster=ClusterConfig(workers=workers),
    )


def examples() -> list[Example]:
    """Twelve scenes; pair 5 has no long caption, pair 7 no short one, pair 9 repeats the caption of pair 8."""
    pairs = []
    for number, (scene, random) in zip(range(CHUNKS * PAIRS), scenes("train"), strict=False):
        worded = captions(scene, random)
        short, long = worded[0], worded[-1]
        if number == 9:
            short = pairs[8].short
        pairs.append(Example(str(number), render(scene), None if number == 7 else short, None if number == 5 else long))
    return pairs


def build(config: RunConfig) -> tuple[EmbeddingModel, list[Batch]]:
    """The model at its start, LoRA's second factors not zero so that all of them get gradients, and the chunks."""
    torch.manual_seed(0)
    preprocessor = preprocessor_of(config)
    model = EmbeddingModel(config.model, preprocessor, log_scale=2.0)
    model.lvlm.requires_grad_(False)
    add_adapter(model, config.model)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    pairs = examples()
    chunks = [preprocessor.collate(i, pairs[i * PAIRS : (i + 1) * PAIRS]) for i in range(CHUNKS)]
    return model, chunks


def main() -> None:
    checkpoint, out, fault = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank, world = distributed.get_rank(), distributed.get_world_size()
    if fault == "no-gather":
        gradcache.gather = lambda own: own

    for stage in (0, 1, 2, 3) if fault == "none" else (2,):
        for path in (gradcache.single_pass, gradcache.cached):
            base = config_of(checkpoint, world)
            config = replace(base, train=replace(base.train, zero_stage=stage, gradient_cache=path is gradcache.cached))
            model, chunks = build(config)
            engine = Engine(model, config)
            share = chunks[rank::world]
            if fault == "drop-chunk":
                share = [*share[:-1], share[0]]
            losses, norms = [], []
            for _ in range(STEPS):
                step = path(engine, share, info_nce, next_token_weight=0.5)
                losses.append((step.contrastive.loss.item(), step.next_token.item()))
                norms.append(engine.step(RATE))
            with engine.gathered():
                weights = {name: p.detach().clone() for name, p in engine.trainable.items()}
            moments = engine.optimizer_state()
            if rank == 0:
                result = {"weights": weights, "losses": losses, "norms": norms, "moments": moments}
                torch.save(result, out / f"{world}-{stage}-{path.__name__}-{fault}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])
    main()
