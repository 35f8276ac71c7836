"""Models of the published shapes without their files: configurations of the package, stand-ins for what the hub has.

What is made of them: fake tensors in the rehearsal without a GPU, random weights in the benchmark on one.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from vladva.models.backbones import find_backbone
from vladva.models.batch import MicroBatch, Pixels, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vladva.config import DataConfig

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


def small_shapes(config: PreTrainedConfig) -> PreTrainedConfig:
    """The configuration with two layers and narrow ones, for a CPU; vocabulary and kinds of layers stay."""
    config = with_depth(config, (2, 3))
    text, vision = config.get_text_config(), config.vision_config
    text.hidden_size, text.intermediate_size, text.num_attention_heads = 256, 512, 2
    text.num_key_value_heads = min(text.num_key_value_heads, 2)
    if hasattr(vision, "depth"):
        vision.embed_dim, vision.num_heads, vision.hidden_size = 64, 2, text.hidden_size
    else:
        vision.hidden_size, vision.intermediate_size, vision.num_attention_heads, vision.image_size = 64, 128, 2, 56
    return config


def stand_in_preprocessor(config: PreTrainedConfig, *, soft: bool) -> StandInPreprocessor:
    """For a model of that configuration."""
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
