"""The published models on fake tensors, an engine that takes DeepSpeed's memory, and chunks of given lengths.

What a checkpoint's files would say (tokenizer, weights) is stood in for; the configurations are those of the package.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from tests.gpu.rehearsal.fake_cuda import CUDA, FakeCuda
from vladva.models.backbones import find_backbone, real_config
from vladva.models.batch import MicroBatch, Pixels, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vladva.config import DataConfig, RunConfig
    from vladva.models.embedding_model import EmbeddingModel

SOFT = {"llava": 32002, "qwen2_vl": 151657, "llava_next": 128258}  # the first id of the soft prompts, by family
PROMPT = 9  # tokens of a hand-written or soft prompt
AROUND = 23  # other tokens of the chat template


@dataclass
class StandInPreprocessor:
    """What the model asks of a preprocessor: a configuration, and the ids of prompts."""

    config: PreTrainedConfig
    backbone: Any
    soft_ids: dict[str, list[int]]
    prompt_ids: dict[str, list[int]]

    def pixel_statistics(self) -> tuple[list[float], list[float]]:
        """Mean and deviation of the three colours, in steps of 0 to 255."""
        return [122.77, 116.75, 104.09], [68.5, 66.63, 70.32]


Depth = tuple[int, int]
"""Layers of the language model, and of the vision tower."""


def depth_of(config: PreTrainedConfig) -> Depth:
    """The layers of a configuration."""
    return config.get_text_config().num_hidden_layers, getattr(config.vision_config, vision_depth(config))


def vision_depth(config: PreTrainedConfig) -> str:
    """The name of the number of the vision tower's layers."""
    return "depth" if hasattr(config.vision_config, "depth") else "num_hidden_layers"


def with_depth(config: PreTrainedConfig, depth: Depth) -> PreTrainedConfig:
    """The configuration with so many layers."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    text.num_hidden_layers = depth[0]
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[: depth[0]]
    setattr(config.vision_config, vision_depth(config), depth[1])
    return config


def stand_in_preprocessor(checkpoint: str, depth: Depth, *, soft: bool) -> StandInPreprocessor:
    """For a checkpoint whose configuration the package has."""
    config = with_depth(real_config(checkpoint), depth)
    backbone = find_backbone(config.model_type)
    load = {"load": lambda self, name, dtype, *_, **__: without_weights(config, dtype)}
    published = type("Published", (type(backbone),), load)(**vars(backbone))
    first = SOFT[config.model_type]
    soft_ids = {"image": list(range(first, first + PROMPT)), "text": list(range(first + PROMPT, first + 2 * PROMPT))}
    written = {"image": list(range(300, 300 + PROMPT)), "text": list(range(400, 400 + PROMPT))}
    return StandInPreprocessor(config, published, soft_ids if soft else {"image": [], "text": []}, written)


def without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> nn.Module:
    """As `from_pretrained` makes it: parameters in the dtype, rotary tables in float32."""
    from transformers import AutoModelForImageTextToText

    return AutoModelForImageTextToText.from_config(config, dtype=dtype)


def build(mode: FakeCuda, run: RunConfig, depth: Depth, *, train: bool, adapter: bool = True) -> EmbeddingModel:
    """The model of a run on the pretended device, as DeepSpeed leaves it where it is trained."""
    from vladva.losses.contrastive import find_loss
    from vladva.models.adapter import add_adapter
    from vladva.models.embedding_model import EmbeddingModel, checkpoint_activations

    scalars = find_loss(run.loss).scalars()
    preprocessor: Any = stand_in_preprocessor(run.model.checkpoint, depth, soft=run.model.soft_prompts and adapter)
    with torch.device("meta"):
        model = EmbeddingModel(run.model, preprocessor, scalars={name: each.start for name, each in scalars.items()})
        for name, scalar in scalars.items():
            model.get_parameter(name).requires_grad_(scalar.learned)
        model.lvlm.requires_grad_(False)
        if adapter:
            add_adapter(model, run.model)
        if train and run.train.activation_checkpointing:
            checkpoint_activations(model)
    in_bfloat16 = train and run.model.dtype == "bfloat16" and run.train.zero_stage > 0
    put_on_device(mode, model, torch.bfloat16 if in_bfloat16 else None)
    return model.train(train)


def put_on_device(mode: FakeCuda, model: nn.Module, dtype: torch.dtype | None) -> None:
    """Fake tensors in the place of all parameters and buffers; parameters in the dtype, where one is given."""
    made: dict[int, tuple[Any, Any]] = {}  # beside what they stand for, so that no id is used twice

    def stand_in(tensor: torch.Tensor) -> Any:
        if id(tensor) not in made:
            is_parameter = isinstance(tensor, nn.Parameter)
            kind = dtype if dtype is not None and is_parameter and tensor.is_floating_point() else tensor.dtype
            fake: Any = torch.empty(tensor.shape, dtype=kind, device=CUDA)
            made[id(tensor)] = (nn.Parameter(fake, tensor.requires_grad) if is_parameter else fake), tensor
        return made[id(tensor)][0]

    with mode:
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in list(tensors.items()):
                    if tensor is not None:
                        tensors[name] = stand_in(tensor)


# ---------------------------------------------------------------------------------------------------------- DeepSpeed


class StandInEngine:
    """The engine's side of a step: the memory that DeepSpeed holds for W workers, and gradients that it takes away.

    ZeRO 1 and 2 keep a float32 copy of the trained weights and two moments, a W-th on each worker; gradients go through
    a bucket, and are added up between the passes of a step.
    """

    def __init__(self, mode: FakeCuda, model: EmbeddingModel, run: RunConfig) -> None:
        from vladva.train.engine import deepspeed_config

        self.mode, self.model, self.device = mode, model, CUDA
        settings = deepspeed_config(run)
        self.stage: int = settings["zero_optimization"]["stage"]
        self.bucket = int(settings["zero_optimization"].get("reduce_bucket_size", 5e8))
        kinds = {"fp32": torch.float32, "bf16": torch.bfloat16}
        own = torch.bfloat16 if settings["bf16"]["enabled"] else torch.float32
        self.sum_dtype = kinds.get(settings.get("data_types", {}).get("grad_accum_dtype"), own)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        count = sum(p.numel() for p in self.trained)
        self.share = -(-count // run.cluster.workers)
        self.sums: torch.Tensor | None = None
        with mode:
            self.scalars = torch.zeros(len(model.scalar_names), device=CUDA)
            if self.stage == 0:
                self.state = [torch.empty(2 * count, dtype=torch.float32, device=CUDA)]
            else:
                parts = 2 if run.train.offload else 3
                self.state = [] if parts == 2 else [torch.empty(3 * self.share, dtype=torch.float32, device=CUDA)]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward."""
        return self.model(*args, **kwargs)

    def vision_features(self, pixels: Any) -> Any:
        """The vision tower alone."""
        return self.model.vision_features(pixels)

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        """Gradients of the loss; under ZeRO they leave the parameters."""
        bucket = torch.empty(self.bucket, dtype=torch.bfloat16, device=CUDA) if self.stage in (1, 2) else None
        loss.backward()
        if bucket is not None:
            kept = self.share if self.stage == 2 else sum(p.numel() for p in self.trained)
            if self.sums is None:
                self.sums = torch.empty(kept, dtype=self.sum_dtype, device=CUDA)
            for parameter in self.trained:
                parameter.grad = None
        if last:
            self.step()

    def step(self) -> None:
        """What the optimizer takes besides: the gradient of its share in float32, and one temporary as large."""
        if self.stage and self.state:
            taken = torch.empty(2 * self.share, dtype=torch.float32, device=CUDA)
            del taken
        self.sums = None


# -------------------------------------------------------------------------------------------------------------- chunks


@dataclass(frozen=True)
class Lengths:
    """How long the samples of a rehearsal are, in tokens without prompts; `grid`: rows and columns of image tokens."""

    short: int
    long: int
    grid: tuple[int, int] | None


def chunk(preprocessor: Any, number: int, size: int, lengths: Lengths, data: DataConfig) -> MicroBatch:
    """A chunk of `size` pairs, all of these lengths."""
    random, negatives = np.random.default_rng(number), data.hard_negatives
    text = tokens(preprocessor, random, [(0, lengths.short, 0)] * size * (1 + negatives), "text")
    owners = np.concatenate([np.arange(size), np.repeat(np.arange(size), negatives)])
    captions = random.integers(0, 1 << 60, size * (1 + negatives))
    if data.texts_only:
        pixels, image = None, tokens(preprocessor, random, [(0, lengths.short, 0)] * size, "text")
    else:
        pixels, count = images(preprocessor.config, size, lengths.grid)
        image = tokens(preprocessor, random, [(count, 0, lengths.long)] * size, "image")
    keys = random.integers(0, 1 << 60, size)
    ids = [f"{number}-{i}" for i in range(size)]
    return MicroBatch(number, ids, pixels, image, text, owners, np.ones(size, bool), keys, captions)


def images(config: PreTrainedConfig, size: int, grid: tuple[int, int] | None) -> tuple[Pixels, int]:
    """So many images, and the tokens of each."""
    if config.model_type == "qwen2_vl":
        assert grid is not None
        merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
        rows, columns = (merge * edge for edge in grid)
        values = np.zeros((size * rows * columns, 3, patch, patch), np.uint8)
        return Pixels(values, np.tile([rows, columns], (size, 1)).astype(np.int64)), grid[0] * grid[1]
    edge = config.vision_config.image_size
    side = edge // config.vision_config.patch_size
    if config.model_type == "llava":
        return Pixels(np.zeros((size, 3, edge, edge), np.uint8), np.tile([edge, edge], (size, 1))), side * side
    width, height = 640, 480  # LLaVA-Next: the image as one tile, and as 2 x 2
    count = find_backbone(config.model_type).num_image_tokens(config, None, (width, height))  # type: ignore[arg-type]
    values = np.zeros((size * 5, 3, edge, edge), np.uint8)
    return Pixels(values, np.tile([height, width], (size, 1))), count


def tokens(
    preprocessor: StandInPreprocessor,
    random: np.random.Generator,
    rows: Sequence[tuple[int, int, int]],
    side: str,
) -> Tokens:
    """Rows of (image tokens, tokens of a text, tokens of a caption after the prompt)."""
    prompt = preprocessor.soft_ids[side] or preprocessor.prompt_ids[side]
    ids = []
    for of_image, of_text, of_caption in rows:
        before, after = list(range(1, AROUND - 7)), list(range(200, 208))
        body = [preprocessor.config.image_token_id] * of_image + random.integers(1000, 30_000, of_text).tolist()
        ids.append([*before, *body, *prompt, *after, *random.integers(1000, 30_000, of_caption)])
    lengths = np.array([len(row) for row in ids])
    captions = np.array([caption for _, _, caption in rows])
    padded = np.zeros((len(ids), max(lengths)), np.int64)
    for row, one in zip(padded, ids, strict=True):
        row[: len(one)] = one
    return Tokens(padded, lengths - captions, lengths)
