"""What is rehearsed: training steps of the recipes, embedding, generation and the losses, each of them measured.

A case runs with two layers of the language model and of the vision tower, then with one more of either; what a layer
adds goes for all others: its FLOPs, kernels, waits and bytes are the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from tests.gpu.rehearsal.fake_cuda import CUDA, Counts, FakeCuda
from tests.gpu.rehearsal.models import StandInEngine, build
from tests.support.published import Depth, Lengths, chunk
from vladva.config import RunConfig
from vladva.losses.contrastive import contrastive_loss, find_loss
from vladva.losses.pairs import select_pairs
from vladva.models.batch import as_tensors
from vladva.models.generation import decode
from vladva.models.packed.inference import embedding_forward
from vladva.models.packed.training import pack_training
from vladva.recipes import RECIPES
from vladva.train import collectives
from vladva.train.setup import make_backward

FEW: Depth = (2, 2)
COLUMNS = 40  # of image tokens, in the largest image that a recipe for Qwen allows
USUAL_GRID = (17, 23)  # those of an image of 640 x 480
LOSS_PAIRS, LOSS_WIDTH = 32_768, 1536
GENERATED = 4  # tokens


@dataclass
class Measured:
    """What a case takes, of one worker; numbers of the whole step unless they say otherwise."""

    units: int  # pairs, images, texts or tokens
    flops: float
    kernels: float
    peak: float  # bytes on the device
    waits: dict[str, float]  # by kind
    places: dict[str, float]  # waits by place
    wide: dict[str, float]  # the largest product in float32 by place, in FLOPs
    attention: dict[str, float] = field(default_factory=dict)  # calls, by kernel and place

    @classmethod
    def of(cls, counts: Counts, units: int) -> Measured:
        """What the counts say."""
        kinds: Counter[str] = Counter()
        for key, number in counts.waits.items():
            kinds[key.split(": ")[0]] += number
        return cls(
            units,
            counts.total_flops,
            counts.kernels,
            counts.peak,
            dict(kinds),
            dict(counts.waits),
            dict(counts.wide),
            dict(counts.attention),
        )

    def to_json(self) -> dict[str, Any]:
        """As a plain dictionary."""
        return asdict(self)


def extrapolate(few: Measured, text: Measured, vision: Measured, depth: Depth) -> Measured:
    """What a model of that depth takes, from what FEW took, and one more layer of its parts."""
    steps = depth[0] - FEW[0], depth[1] - FEW[1]

    def along(name: str) -> Any:
        first, *others = (getattr(each, name) for each in (few, text, vision))
        if not isinstance(first, dict):
            return first + sum(n * (other - first) for n, other in zip(steps, others, strict=True))
        keys = dict.fromkeys([*first, *others[0], *others[1]])
        found = {
            key: first.get(key, 0)
            + sum(n * (other.get(key, 0) - first.get(key, 0)) for n, other in zip(steps, others, strict=True))
            for key in keys
        }
        return {key: number for key, number in found.items() if number}

    names = ("flops", "kernels", "peak", "waits", "places", "attention")
    return replace(few, **{name: along(name) for name in names})


# -------------------------------------------------------------------------------------------------------------- cases


@contextmanager
def workers(number: int) -> Iterator[None]:
    """Collectives of so many workers: what is gathered from the others is as what there is."""

    def all_gather(parts: list[torch.Tensor], own: torch.Tensor) -> None:
        assert own.is_contiguous()
        for part in parts:
            part.copy_(own)

    def into_tensor(out: torch.Tensor, own: torch.Tensor) -> None:
        all_gather(list(out.view(number, *own.shape)), own)

    stand_in = SimpleNamespace(
        is_initialized=lambda: number > 1,
        get_rank=lambda: 0,
        get_world_size=lambda: number,
        all_gather=all_gather,
        all_gather_into_tensor=into_tensor,
        all_reduce=lambda tensor, op=None: None,
        reduce_scatter_tensor=lambda out, whole, op=None: out.copy_(whole.view(number, *out.shape)[0]),
        ReduceOp=torch.distributed.ReduceOp,
    )
    original = collectives.distributed
    collectives.distributed = stand_in  # type: ignore[attr-defined]
    try:
        yield
    finally:
        collectives.distributed = original  # type: ignore[attr-defined]


def lengths_of(run: RunConfig, *, longest: bool) -> Lengths:
    """As long as the run allows, or as real data are: 20 tokens of a short caption, 200 of a long one."""
    short = min(run.data.max_text_tokens or run.data.short_below, run.data.short_below)
    long = run.data.long_below if run.loss.next_token_weight else 0
    if longest:
        return Lengths(short, long, ((run.model.max_image_tokens or 1280) // COLUMNS, COLUMNS))
    return Lengths(min(20, short), min(200, long), USUAL_GRID)


def shortened(run: RunConfig, *, longest: bool) -> RunConfig:
    """The run with fewer chunks in a step: two need as much memory as many, four as much work for a pair, nearly."""
    chunks = min(2 if longest else 4, run.chunks_per_worker)
    return replace(run, train=replace(run.train, global_batch=chunks * run.train.chunk_size * run.cluster.workers))


def training_step(mode: FakeCuda, depth: Depth, *, run: RunConfig, longest: bool, plain: bool = False) -> Measured:
    """A step of a run on one of its workers. plain: on padded tokens, where packed ones could do."""
    run = shortened(run, longest=longest)
    model = build(mode, run, depth, train=True)
    if not plain:
        pack_training(model, run)
    engine: Any = StandInEngine(mode, model, run)
    lengths, preprocessor = lengths_of(run, longest=longest), model.preprocessor
    chunks = [chunk(preprocessor, i, run.train.chunk_size, lengths, run.data) for i in range(run.chunks_per_worker)]
    mode.counts.restart()
    with mode, workers(run.cluster.workers):
        make_backward(run)(engine, chunks)
    return Measured.of(mode.counts, run.chunks_per_worker * run.train.chunk_size)


def embedding(
    mode: FakeCuda, depth: Depth, *, checkpoint: str, side: str, size: int, adapter: bool = False
) -> Measured:
    """A batch of images (of 640 x 480) or short texts, as they are embedded: by the batch job, of a merged model.

    adapter: beside the weights instead, as the server that answers from the same weights has it.
    """
    run = inference_run(checkpoint)
    model = build(mode, run, depth, train=False, adapter=adapter)
    batch = chunk(model.preprocessor, 0, size, Lengths(20, 0, USUAL_GRID), run.data)
    with mode, torch.inference_mode():
        forward = embedding_forward(model)
        mode.counts.restart()
        if side == "images":
            assert batch.pixels is not None
            forward(as_tensors(batch.image, CUDA), as_tensors(batch.pixels, CUDA))
        else:
            forward(as_tensors(batch.text, CUDA), None)
    return Measured.of(mode.counts, size)


def generation(mode: FakeCuda, depth: Depth, *, checkpoint: str) -> Measured:
    """Tokens of an answer about an image, after the first, with the adapter there."""
    run = inference_run(checkpoint)
    model = build(mode, run, depth, train=False)
    model.base.generation_config.eos_token_id = 2
    batch = chunk(model.preprocessor, 0, 1, Lengths(20, 0, USUAL_GRID), run.data)
    assert batch.pixels is not None
    with mode:
        inputs = model.inputs(as_tensors(batch.image, CUDA), as_tensors(batch.pixels, CUDA))
        tokens = decode(model, inputs, GENERATED + 1, 0.0, 1.0)
        next(tokens)
        mode.counts.restart()
        for _ in range(GENERATED):
            next(tokens)
    return Measured.of(mode.counts, GENERATED)


def inference_run(checkpoint: str) -> RunConfig:
    """A run on that checkpoint, for its model's settings."""
    run = RECIPES["llava_1_5_7b"]()
    return replace(run, model=replace(run.model, checkpoint=checkpoint))


def losses(mode: FakeCuda, depth: Depth, *, name: str) -> Measured:
    """A contrastive loss over the largest global batch, forward and backward, on one worker."""
    run = RECIPES["llava_1_5_7b"]()
    loss = find_loss(replace(run.loss, contrastive=name))
    with mode:
        images, texts = (torch.empty(LOSS_PAIRS, LOSS_WIDTH, device=CUDA, requires_grad=True) for _ in range(2))
        keys = torch.arange(LOSS_PAIRS).to(CUDA)
        scalars = {each: torch.zeros((), device=CUDA, requires_grad=True) for each in loss.scalars()}
        mode.counts.restart()
        pairs = select_pairs(images, texts, image_keys=keys, caption_keys=keys)
        contrastive_loss(loss, pairs, scalars).loss.backward()
    # Autograd runs backward in a thread of its own, which does not know whose products these are.
    return replace(Measured.of(mode.counts, LOSS_PAIRS), wide={})
