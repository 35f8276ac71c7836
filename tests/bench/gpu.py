#!/usr/bin/env python3
"""Training, embedding and serving on a GPU: models of the published shapes with random weights, nothing downloaded.

    make gpu                              the tests of tests/gpu, then this, in at most ten minutes
    python tests/bench/gpu.py             on the GPU of this machine
    python tests/bench/gpu.py --tiny      the same code on small shapes, on a CPU too: that it runs, not how fast

For each model: pairs a second of training, at two chunk sizes; images and texts a second of embedding, ours and by
transformers as E5-V calls it (padding on the left, all layers' hidden states, logits and all), in turns; of one loaded
model that both generates and embeds, time to the first token, tokens a second for several conversations, embeddings a
second. Utilisation is against the rate of a bfloat16 matrix product, measured here; FLOPs are counted, not estimated,
and of transformers' way ours are taken: what it computes besides is no use.

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.published import Lengths, chunk, depth_of, small_shapes, stand_in_preprocessor, with_depth
from vladva.losses.contrastive import find_loss
from vladva.models.adapter import add_adapter
from vladva.models.backbones import real_config
from vladva.models.batch import MicroBatch, as_tensors
from vladva.models.embedding_model import EmbeddingModel, checkpoint_activations
from vladva.models.packed.generation import PackedGeneration
from vladva.models.packed.inference import PackedInference, embedding_forward
from vladva.models.packed.row_linear import SharedDecoder
from vladva.recipes import RECIPES
from vladva.train.engine import Engine
from vladva.train.setup import make_backward

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vladva.config import RunConfig

GRID = (17, 23)  # image tokens of 640 x 480, where an image's size matters
SECONDS = 600.0  # after so many, what is left is left out, and named


@dataclass(frozen=True)
class Scale:
    """How much is run: on a GPU, or to see that it runs."""

    device: torch.device
    tiny: bool

    def pick(self, full: Any, tiny: Any) -> Any:
        """One of the two."""
        return tiny if self.tiny else full


@dataclass(frozen=True)
class Model:
    """A recipe's model, and the sizes of chunks that it is trained with here."""

    recipe: str
    chunk_sizes: tuple[int, int]
    checkpointing: tuple[bool, bool]


MODELS = (
    Model("qwen2_vl_2b", (8, 32), (False, False)),
    Model("llava_1_5_7b", (8, 32), (False, True)),
)


# ---------------------------------------------------------------------------------------------------------- measuring


def seconds_of(work: Callable[[], Any], scale: Scale, rounds: int) -> float:
    """Median time of a call, after one that warms up."""
    times = []
    for number in range(rounds + 1):
        wait(scale)
        began = time.perf_counter()
        work()
        wait(scale)
        if number:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def wait(scale: Scale) -> None:
    """Until the device has done all that it was given."""
    if scale.device.type == "cuda":
        torch.cuda.synchronize()


def flops_of(work: Callable[[], Any]) -> float:
    """FLOPs of products and attention in a call."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())


def product_rate(scale: Scale) -> float:
    """FLOP a second of a bfloat16 matrix product, the best of a few."""
    size = scale.pick(8192, 256)
    left, right = (torch.randn(size, size, device=scale.device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(scale.pick(30, 3)):
        wait(scale)
        began = time.perf_counter()
        left @ right
        wait(scale)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / min(times[1:])


def peak_gib(scale: Scale) -> float | None:
    """Most memory that was taken on the device since the last call; None on a CPU."""
    if scale.device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return round(peak, 2)


# -------------------------------------------------------------------------------------------------------------- models


def config_of(run: RunConfig, scale: Scale) -> PreTrainedConfig:
    """The published configuration, or a small one of its kind."""
    config = real_config(run.model.checkpoint)
    return small_shapes(config) if scale.tiny else with_depth(config, depth_of(config))


def build(run: RunConfig, scale: Scale, *, train: bool) -> EmbeddingModel:
    """The model of a run with a new adapter and random weights."""
    torch.manual_seed(0)
    scalars = find_loss(run.loss).scalars()
    preprocessor: Any = stand_in_preprocessor(config_of(run, scale), soft=run.model.soft_prompts)
    with scale.device:
        model = EmbeddingModel(run.model, preprocessor, scalars={name: each.start for name, each in scalars.items()})
        for name, scalar in scalars.items():
            model.get_parameter(name).requires_grad_(scalar.learned)
        model.lvlm.requires_grad_(False)
        add_adapter(model, run.model)
    if run.train.activation_checkpointing:
        checkpoint_activations(model)
    return model.to(scale.device).train(train)


def batch_of(model: EmbeddingModel, run: RunConfig, size: int, scale: Scale, *, long: int = 0) -> MicroBatch:
    """Pairs of usual lengths: short captions of 20 tokens, long ones of `long`."""
    return chunk(model.preprocessor, 0, size, Lengths(20, long, scale.pick(GRID, (3, 4))), run.data)


def free() -> None:
    """Let go of the last model: it is a circle of references."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------------ training


def training(run: RunConfig, scale: Scale, chunk_size: int, checkpointing: bool, rate: float) -> dict[str, Any]:
    """Optimizer steps of two chunks with a gradient cache, by DeepSpeed, as the loop makes them."""
    size = scale.pick(chunk_size, 2)
    run = replace(
        run,
        data=replace(run.data, run_length=1),
        train=replace(run.train, global_batch=2 * size, chunk_size=size, activation_checkpointing=checkpointing),
        cluster=replace(run.cluster, workers=1),
    )
    engine = Engine(build(run, scale, train=True), run)
    chunks = [batch_of(engine.model, run, size, scale, long=scale.pick(200, 8))] * 2
    backward = make_backward(run)

    def step() -> None:
        backward(engine, chunks)
        engine.step(1e-4)

    peak_gib(scale)
    took = seconds_of(step, scale, scale.pick(3, 1))
    peak, flops = peak_gib(scale), flops_of(step)
    return {
        "chunk_size": size,
        "activation_checkpointing": checkpointing,
        "pairs_per_s": 2 * size / took,
        "utilisation": flops / took / rate,
        "tflop_per_pair": flops / 2 / size / 1e12,
        "peak_gib": peak,
    }


# ----------------------------------------------------------------------------------------------------------- embedding


def embedding(model: EmbeddingModel, run: RunConfig, scale: Scale, rate: float) -> dict[str, Any]:
    """Images and texts a second, ours and by transformers as E5-V calls it, in turns."""
    model.lvlm = model.lvlm.merge_and_unload()
    forward, figures = embedding_forward(model), {}
    for side, size in (("images", scale.pick(32, 2)), ("texts", scale.pick(512, 4))):
        batch = batch_of(model, run, size, scale)
        tokens = as_tensors(batch.image if side == "images" else batch.text, scale.device)
        pixels = as_tensors(batch.pixels, scale.device) if side == "images" and batch.pixels is not None else None
        theirs = e5_v_inputs(model, tokens, pixels)

        def ours(tokens: Any = tokens, pixels: Any = pixels) -> torch.Tensor:
            with torch.inference_mode():
                return forward(tokens, pixels)

        def e5_v(inputs: dict[str, Any] = theirs) -> torch.Tensor:
            with torch.inference_mode():
                states = model.base(**inputs, output_hidden_states=True, return_dict=True).hidden_states
                return torch.nn.functional.normalize(states[-1][:, -1].float(), dim=-1)

        distance = (ours() - e5_v()).norm(dim=-1).max().item()
        rounds = scale.pick(5, 1)
        took, took_theirs = seconds_of(ours, scale, rounds), seconds_of(e5_v, scale, rounds)
        flops = flops_of(ours)
        figures |= {
            f"{side}_per_s": size / took,
            f"{side}_utilisation": flops / took / rate,
            f"{side}_vs_e5_v": took_theirs / took,
            f"{side}_largest_distance": distance,
        }
    return figures | {"peak_gib": peak_gib(scale)}


def e5_v_inputs(model: EmbeddingModel, tokens: dict[str, Any], pixels: dict[str, Any] | None) -> dict[str, Any]:
    """What a Hugging Face model takes: prompts padded on the left, so that all end in the last column."""
    inputs = model.inputs(tokens, pixels)
    width = tokens["ids"].shape[1]
    columns = torch.arange(width, device=tokens["ids"].device)
    source = columns - (width - tokens["prompt_lengths"][:, None])  # [B, T]; negative where there is padding
    at = source.clamp(min=0)
    moved = {
        "input_ids": tokens["ids"].gather(1, at).masked_fill(source < 0, 0),
        "attention_mask": (source >= 0).long(),
    }
    if "position_ids" in inputs:  # [3, B, T]
        moved["position_ids"] = inputs["position_ids"].gather(2, at.expand(3, *at.shape))
    return inputs | moved


# ------------------------------------------------------------------------------------------------------------- serving


def serving(model: EmbeddingModel, run: RunConfig, scale: Scale) -> dict[str, Any]:
    """Conversations about images with the adapter off, and embeddings with it on, of one loaded model."""
    decoder = SharedDecoder(model)
    forward = PackedInference(model, decoder)
    generation = PackedGeneration(model, decoder, forward.vision)
    batch = batch_of(model, run, 1, scale)
    answer = scale.pick(64, 3)
    ids = batch.image.ids[0, : batch.image.prompt_lengths[0]].tolist()
    figures: dict[str, Any] = {}
    for streams in (1, 8, 64):
        first, rate = conversations(generation, ids, batch, streams, answer, scale)
        figures |= {f"first_token_s_{streams}": first, f"tokens_per_s_{streams}": rate}
    texts = as_tensors(batch_of(model, run, scale.pick(64, 4), scale).text, scale.device)

    def embed() -> None:
        with torch.inference_mode():
            forward(texts, None)

    figures["embeddings_per_s"] = len(texts["ids"]) / seconds_of(embed, scale, scale.pick(5, 1))
    return figures | {"peak_gib": peak_gib(scale)}


def conversations(
    generation: PackedGeneration, ids: list[int], batch: MicroBatch, streams: int, answer: int, scale: Scale
) -> tuple[float, float]:
    """Seconds until all have their first token (for one: until it has), and tokens a second of all from then on."""
    times = []
    for _ in range(2):  # the first time warms up
        slots = [generation.cache.take(len(ids) + answer) for _ in range(streams)]
        wait(scale)
        began = time.perf_counter()
        said, prompts = [], []
        for slot in slots:
            prompt = generation.prompt(ids, batch.pixels)
            logits = generation([prompt.chunk(slot, generation.image_token, len(ids), adapter=False)])
            said.append(int(logits.argmax()))
            prompts.append(prompt)
        first = time.perf_counter() - began
        began = time.perf_counter()
        for _ in range(answer - 1):
            together = zip(prompts, slots, said, strict=True)
            logits = generation([prompt.answer(slot, token, adapter=False) for prompt, slot, token in together])
            said = logits.argmax(-1).tolist()
        times.append((first, streams * (answer - 1) / (time.perf_counter() - began)))
        for slot in slots:
            generation.cache.release(slot)
    return times[-1]


# ---------------------------------------------------------------------------------------------------------------- main


def measure(scale: Scale) -> dict[str, Any]:
    """All figures; those for which there was no time are named."""
    began, rate = time.perf_counter(), product_rate(scale)
    figures: dict[str, Any] = {"product_tflop_per_s": rate / 1e12, "left_out": []}

    def do(name: str, work: Callable[[], dict[str, Any]]) -> None:
        if time.perf_counter() - began > SECONDS * 0.8:
            figures["left_out"].append(name)
            return
        figures[name] = work()
        free()
        print(f"{name}: {figures[name]}", flush=True)

    for each in MODELS:
        run = RECIPES[each.recipe]()
        for size, again in zip(each.chunk_sizes, each.checkpointing, strict=True):
            do(
                f"train {each.recipe} {size}",
                lambda run=run, size=size, again=again: training(run, scale, size, again, rate),
            )
        do(f"serve {each.recipe}", lambda run=run: serving(build(run, scale, train=False), run, scale))
        do(f"embed {each.recipe}", lambda run=run: embedding(build(run, scale, train=False), run, scale, rate))
    return figures


def rounded(value: Any) -> Any:
    """Numbers to four digits that say something."""
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="small shapes")
    options = parser.parse_args()
    if not torch.cuda.is_available() and not options.tiny:
        print(f"torch {torch.__version__} finds no GPU on this machine; --tiny runs on its CPU", file=sys.stderr)
        sys.exit(2)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    name = torch.cuda.get_device_name(0) if device.type == "cuda" else "CPU"
    about = {"device": name, "torch": torch.__version__, "tiny": options.tiny}
    print(json.dumps(about | rounded(measure(Scale(device, options.tiny)))))


if __name__ == "__main__":
    main()
