#!/usr/bin/env python
"""How fast a training step is: against the usual two forwards, against sentence-transformers, against the machine.

    pip install -c constraints.txt -e '.[bench]'
    tests/bench/train_step.py [--rounds 4]

A random LLaVA of 186M parameters in bfloat16 with LoRA 16, short captions of 26 tokens with their prompt, long ones of
40 to 120. All contenders take the same token ids; preparing them is not measured. Rounds are interleaved, the last line
is JSON with medians:

    vs_two_forward            time of a forward for the contrastive loss, another for the caption loss with the LM head
                              over all positions, and AdamW, over the time of our step
    vs_sentence_transformers  time of CachedMultipleNegativesSymmetricRankingLoss and AdamW over that of our gradient
                              cache, both without caption loss, in chunks of 8
    flop_utilisation          FLOP/s of our step over the rate of a large bfloat16 matrix product, which is measured in
                              every round, too; see `useful_flop` for what is counted
    memory_growth             peak memory of a process that makes a step with a global batch of 512, over that of one
                              that makes 16 with 32, as many chunks: a heap grows with what it has been through, too;
                              gradient cache in chunks of 8, with caption loss
    memory_growth_one_step    the same after one step with 32
    padding_*                 share of padding in the peers' tokens; ours have none

About ten minutes on two quiet cores, eight of them for memory_growth.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_llava import LONG, build_random_llava, images, texts
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from vladva.config import DataConfig, LossConfig, ModelConfig, RunConfig, TrainConfig
from vladva.data.examples import Example
from vladva.models.adapter import add_adapter
from vladva.models.batch import MicroBatch, as_tensors
from vladva.models.embedding_model import EmbeddingModel, caption_labels
from vladva.models.packed.packing import pack
from vladva.models.preprocessor import Preprocessor
from vladva.train.data_loader import run_preprocessor
from vladva.train.engine import Engine
from vladva.train.grad_cache import prompts_only
from vladva.train.setup import make_backward

PAIRS, CACHED_PAIRS, MOST_PAIRS, CHUNK, RATE = 16, 32, 512, 8, 1e-4


def config_of(checkpoint: str, pairs: int, chunk: int, next_token_weight: float) -> RunConfig:
    """A step of `pairs` on one worker; a gradient cache where it has several chunks."""
    return RunConfig(
        name="bench",
        storage="unused",
        model=ModelConfig(checkpoint=checkpoint, dtype="bfloat16"),
        data=DataConfig(uri="unused", run_length=1),
        loss=LossConfig(next_token_weight=next_token_weight),
        train=TrainConfig(steps=100, global_batch=pairs, chunk_size=chunk),
    )


def chunks_of(preprocessor: Preprocessor, pairs: int, chunk: int, *, long: bool) -> list[MicroBatch]:
    """Random pairs, collated."""
    pictures = images(min(pairs, 32))
    shorts, longs = texts(pairs), texts(pairs, LONG, seed=1) if long else [None] * pairs
    rows = [Example(str(i), pictures[i % 32], shorts[i], longs[i]) for i in range(pairs)]
    return [preprocessor.collate(i // chunk, rows[i : i + chunk]) for i in range(0, pairs, chunk)]


def build(config: RunConfig) -> EmbeddingModel:
    """The model with a new adapter."""
    torch.manual_seed(0)
    model = EmbeddingModel(config.model, run_preprocessor(config), scalars={"log_scale": 2.66})
    model.requires_grad_(False)
    model.log_scale.requires_grad_(True)
    add_adapter(model, config.model)
    return model.train()


def our_step(checkpoint: str, pairs: int, chunk: int, next_token_weight: float) -> tuple[Callable[[], None], Engine]:
    """An optimizer step as the training loop makes it, on batches in memory."""
    config = config_of(checkpoint, pairs, chunk, next_token_weight)
    engine = Engine(build(config), config)
    batches = chunks_of(engine.model.preprocessor, pairs, chunk, long=next_token_weight > 0)
    backward = make_backward(config)

    def step() -> None:
        backward(engine, batches)
        engine.step(RATE)

    return step, engine


def two_forward_step(checkpoint: str, pairs: int) -> Callable[[], None]:
    """The usual way: nothing shared between the two losses, logits of every position, by transformers itself."""
    config = config_of(checkpoint, pairs, pairs, 1.0)
    model = build(config).bfloat16()
    (batch,) = chunks_of(model.preprocessor, pairs, pairs, long=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)
    pixels = as_tensors(batch.pixels, "cpu")
    prompts, captions, short = (
        prompts_only(batch.image, as_tensors(batch.image, "cpu")),
        as_tensors(batch.image, "cpu"),
        as_tensors(batch.text, "cpu"),
    )
    rows = torch.arange(pairs)

    def embed(tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None) -> torch.Tensor:
        hidden = model.base.model(**model.inputs(tokens, pixels), use_cache=False).last_hidden_state
        return normalize(hidden[rows, tokens["prompt_lengths"] - 1].float(), dim=-1)

    def step() -> None:
        logits = embed(prompts, pixels) @ embed(short, None).T * model.log_scale.exp()
        contrastive = (cross_entropy(logits, rows) + cross_entropy(logits.T, rows)) / 2
        caption = model.base(**model.inputs(captions, pixels), labels=caption_labels(captions), use_cache=False).loss
        (contrastive + caption).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def sentence_transformers_step(checkpoint: str, pairs: int, chunk: int) -> Callable[[], None]:
    """Its cached symmetric loss in chunks of the same size, on the token ids and pixels that we have, too."""
    from peft import LoraConfig
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules.transformer import Transformer
    from sentence_transformers.sentence_transformer import losses, modules

    from vladva.models.backbones import LANGUAGE_LINEARS

    lvlm = Transformer(checkpoint, model_kwargs={"dtype": torch.bfloat16})
    pooling = modules.Pooling(lvlm.get_embedding_dimension(), "lasttoken")
    model = SentenceTransformer(modules=[lvlm, pooling, modules.Normalize()], device="cpu")
    model.add_adapter(LoraConfig(r=16, lora_alpha=16, target_modules=LANGUAGE_LINEARS))
    model.train()
    loss = losses.CachedMultipleNegativesSymmetricRankingLoss(model, mini_batch_size=chunk)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE)

    preprocessor = Preprocessor(checkpoint)
    (batch,) = chunks_of(preprocessor, pairs, pairs, long=False)
    ours = EmbeddingModel(ModelConfig(checkpoint=checkpoint, dtype="bfloat16"), preprocessor)
    features = []
    for tokens, pixels in ((batch.image, as_tensors(batch.pixels, "cpu")), (batch.text, None)):
        features.append({**ours.inputs(as_tensors(tokens, "cpu"), pixels), "modality": "message"})

    def step() -> None:
        loss([dict(side) for side in features], None).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def useful_flop(engine: Engine, batches: list[MicroBatch]) -> float:
    """FLOP that the two losses of a step, and their gradients, cannot do without.

    No padding, no recomputation, no gradients of frozen weights; beginnings that prompts share once; in the last layer
    only keys and values of tokens that are neither a prompt's end nor before a caption's token.
    """
    base = engine.model.base

    def linear(module: nn.Module, *, lora: bool) -> int:
        found = ((name, m) for name, m in module.named_modules() if isinstance(m, nn.Linear))
        return sum(m.weight.numel() for name, m in found if ("lora_" in name) == lora)

    def by_token(module: nn.Module) -> int:
        return 4 * linear(module, lora=False) + 6 * linear(module, lora=True)

    language = base.model.language_model
    last = language.layers[-1]
    of_all = by_token(last.self_attn.k_proj) + by_token(last.self_attn.v_proj)
    flop = 0.0
    for batch in batches:
        for side in (batch.image, batch.text):
            packed = pack(side.ids, side.lengths, np.arange(len(side.ids)), base.config.image_token_id)
            labelled = int((side.lengths - side.prompt_lengths).sum())
            flop += packed.num_unique * (by_token(language) - by_token(last) + of_all)
            flop += (len(side.ids) + labelled) * (by_token(last) - of_all)
            flop += 4 * labelled * base.lm_head.weight.numel()
            attention = int((side.lengths**2).sum()) * language.config.hidden_size  # causal: half of all pairs
            flop += 3 * 2 * attention * language.config.num_hidden_layers
    pictures = sum(len(batch.ids) for batch in batches)
    patches = (base.config.vision_config.image_size // base.config.vision_config.patch_size) ** 2
    seen = linear(base.model.vision_tower, lora=False) + linear(base.model.multi_modal_projector, lora=False)
    return flop + 2 * pictures * patches * seen


def padding(batch: MicroBatch, *names: str) -> float:
    """Share of padding in the token ids of these sides, as the peers take them."""
    sides = [getattr(batch, name) for name in names]
    return 1 - sum(int(side.lengths.sum()) for side in sides) / sum(side.ids.size for side in sides)


def matrix_product(size: int = 2048) -> Callable[[], None]:
    """2 size^3 FLOP in bfloat16."""
    a, b = (torch.randn(size, size, dtype=torch.bfloat16) for _ in range(2))

    def product() -> None:
        torch.mm(a, b)

    return product


def after(step: Callable[[], None]) -> int:
    """Highest resident memory of this process after a step, in bytes."""
    step()
    # Not getrusage's, which begins with that of the process that started this one.
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1)) * 1024


def peak_memory(checkpoint: str, pairs: int) -> list[float]:
    """Highest resident memory of a process of its own after each step, in bytes; steps until it has seen 512 pairs."""
    command = [sys.executable, __file__, "--checkpoint", checkpoint, "--memory-of", str(pairs)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def measure(checkpoint: str, rounds: int) -> dict[str, Any]:
    """All contenders, interleaved."""
    single, engine = our_step(checkpoint, PAIRS, PAIRS, 1.0)
    contenders = {
        "ours": single,
        "two_forward": two_forward_step(checkpoint, PAIRS),
        "ours_cached": our_step(checkpoint, CACHED_PAIRS, CHUNK, 0.0)[0],
        "sentence_transformers": sentence_transformers_step(checkpoint, CACHED_PAIRS, CHUNK),
        "matrix_product": matrix_product(),
    }
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, contender in contenders.items():
            began = time.perf_counter()
            contender()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - began)
        print({name: round(seconds[-1], 3) for name, seconds in times.items() if seconds}, flush=True)
    median = {name: statistics.median(seconds) for name, seconds in times.items()}
    preprocessor = engine.model.preprocessor
    (step,), (texts,) = (
        chunks_of(preprocessor, PAIRS, PAIRS, long=True),
        chunks_of(preprocessor, CACHED_PAIRS, CACHED_PAIRS, long=False),
    )
    flop = useful_flop(engine, [step])
    rate = 2 * 2048**3 / median["matrix_product"]
    return {
        "vs_two_forward": median["two_forward"] / median["ours"],
        "vs_sentence_transformers": median["sentence_transformers"] / median["ours_cached"],
        "flop_utilisation": flop / median["ours"] / rate,
        "padding_two_forward": padding(step, "image", "text"),
        "padding_sentence_transformers": padding(texts, "image", "text"),
        "pairs_per_s": PAIRS / median["ours"],
        "cached_pairs_per_s": CACHED_PAIRS / median["ours_cached"],
        "gflop_per_s": flop / median["ours"] / 1e9,
        "matrix_product_gflop_per_s": rate / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--checkpoint", default="", help="folder of the model, if it has been built before")
    parser.add_argument("--memory-of", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    if options.memory_of:
        step, _ = our_step(options.checkpoint, options.memory_of, CHUNK, 1.0)
        print([after(step) for _ in range(MOST_PAIRS // options.memory_of)])
        return
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or build_random_llava(Path(folder))
        figures = measure(checkpoint, options.rounds)
        print(json.dumps(figures), flush=True)
        small, (large,) = (peak_memory(checkpoint, pairs) for pairs in (32, MOST_PAIRS))
        print([round(peak / 2**30, 3) for peak in (*small, large)])
        figures |= {"memory_growth": large / small[-1], "memory_growth_one_step": large / small[0]}
        figures |= {"peak_gib_of_512": large / 2**30}
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
