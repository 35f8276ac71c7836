"""Cost: GPU-hours and money of a whole run, and of embedding items with its model, before anything is rented.

Floating point operations are counted from the model's shape, two for each weight and token that a product takes, and
divided by what a GPU can do and the share of that which is stated. Lengths are those of the memory plan, the longest
that the settings allow: the estimate errs on the high side.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig
from vladva.train.memory_plan import PROMPT_TOKENS, settings_of, side_tokens, words_tokens

if TYPE_CHECKING:
    from rich.table import Table
    from transformers import PreTrainedConfig

TERA = 1e12


@dataclass(frozen=True)
class Machine:
    """A line of the price list."""

    name: str
    gpus: int
    tflops: float
    """Of one GPU, dense, in bfloat16, as its maker states."""
    usd_per_hour: float
    """Of the whole machine."""
    utilisation: float = 0.35
    """Share of `tflops` that is reached; 0.3 to 0.45 is usual in training."""

    def __post_init__(self) -> None:
        for field in ("gpus", "tflops", "usd_per_hour", "utilisation"):
            if not getattr(self, field) > 0:
                raise ValueError(f"prices: {field} of {self.name} is {getattr(self, field)}; it must be positive")
        if self.utilisation > 1:
            raise ValueError(f"prices: utilisation of {self.name} is {self.utilisation}; it must be at most 1")


@dataclass(frozen=True)
class ForwardOperations:
    """Floating point operations of forward passes."""

    pixels: float
    """Of the vision tower, for one image."""
    image: float
    """Of the language model, for one image and its prompt."""
    text: float
    """Of the language model, for one text and its prompt."""
    caption: float
    """Of the language model and its head, for one long caption behind an image."""


@dataclass(frozen=True)
class Cost:
    """What a job takes on one kind of machine."""

    gpu_hours: float
    usd: float


def read_prices(content: Any) -> list[Machine]:
    """The machines of a price list: name -> fields of `Machine`. Raises ValueError, naming the machine and field."""
    machines = content.get("machines") if isinstance(content, dict) else None
    if not isinstance(machines, dict) or not machines:
        raise ValueError("prices: there is no `machines:` with a machine in it; see cluster/prices.yaml")
    found = []
    for name, fields in machines.items():
        try:
            found.append(Machine(name, **fields))
        except TypeError as error:
            raise ValueError(f"prices: {name}: {str(error).replace('Machine.__init__() ', '')}") from None
    return found


def forward_work(config: RunConfig) -> ForwardOperations:
    """Operations of forward passes of the run's model."""
    settings = settings_of(config.model.checkpoint)
    image, text = side_tokens(settings, config)
    caption = config.data.long_below if config.loss.next_token_weight and not config.data.texts_only else 0
    language, vision, head = count_weights(settings)
    shape = settings.get_text_config()
    layers, width = shape.num_hidden_layers, shape.hidden_size
    embedding = (config.model.layer or layers) / layers  # what is above the embedding's layer is not computed

    def sequence(tokens: int) -> float:
        return 2 * language * tokens + attention(layers, width, tokens) / 2  # causal: half of the pairs

    pixels = 0.0
    if not config.data.texts_only:
        patches = (image - caption - PROMPT_TOKENS - words_tokens(config)) * merged_patches(settings)
        pixels = 2 * vision * patches + attention(*vision_shape(settings), patches)
    return ForwardOperations(
        pixels=pixels,
        image=embedding * sequence(image - caption),
        text=embedding * sequence(text),
        caption=2 * head * caption + sequence(image) - embedding * sequence(image - caption) if caption else 0.0,
    )


def count_weights(settings: PreTrainedConfig) -> tuple[int, int, int]:
    """Weights that take part in products: of the language model, of what makes image tokens, of the LM head."""
    from torch import nn

    from vladva.models.backbones import find_backbone, without_weights

    targets = find_backbone(settings.model_type).lora_targets
    language = vision = head = 0
    for name, module in without_weights(settings).named_modules():
        if not isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d)):
            continue
        if re.fullmatch(targets, name):
            language += module.weight.numel()
        elif name == "lm_head":
            head += module.weight.numel()
        else:
            vision += module.weight.numel()
    return language, vision, head


def merged_patches(settings: PreTrainedConfig) -> int:
    """Patches of the vision tower that become one token of the language model."""
    return int(getattr(settings.vision_config, "spatial_merge_size", None) or 1) ** 2


def vision_shape(settings: PreTrainedConfig) -> tuple[int, int]:
    """Layers and width of the vision tower; families have two words for each."""
    tower = settings.vision_config
    layers = getattr(tower, "num_hidden_layers", None) or tower.depth
    return layers, getattr(tower, "embed_dim", None) or tower.hidden_size


def attention(layers: int, width: int, tokens: float) -> float:
    """Operations of queries with keys and of probabilities with values, of a sequence without a mask."""
    return 4.0 * layers * width * tokens**2


def training_work(config: RunConfig) -> float:
    """Operations of the whole run.

    A frozen model takes a forward pass, and as much again for the gradient of its input. The gradient cache and
    activation checkpointing each run the language model forward once more. The vision tower runs once for a query, and
    for a positive that is an image as often as the model.
    """
    work, train = forward_work(config), config.train
    contrasted = work.image + work.text * (1 + config.data.hard_negatives)
    passes = 2 + int(config.caches_gradients) + int(train.activation_checkpointing)
    captions = work.caption * (2 + int(train.activation_checkpointing)) / config.loss.next_token_every
    towers = 1 + (1 + int(config.caches_gradients) if config.data.mixed_inputs else 0)
    return train.steps * train.global_batch * (towers * work.pixels + passes * contrasted + captions)


def price(operations: float, machine: Machine) -> Cost:
    """Hours of its GPUs, and their share of its price."""
    hours = operations / (machine.tflops * TERA * machine.utilisation) / 3600
    return Cost(hours, hours * machine.usd_per_hour / machine.gpus)


def price_table(config: RunConfig, machines: Sequence[Machine], items: int) -> Table:
    """A row a machine: training the run, and embedding `items` images and as many texts with its model."""
    from rich.table import Table

    training, work = training_work(config), forward_work(config)
    embedding = items * (work.pixels + work.image + work.text)
    table = Table(
        "machine", "TFLOP/s used", "GPU-hours, training", "USD", f"GPU-hours, {items:,} images and texts", "USD",
        title=f"{config.name}: {training / 1e18:,.4g} EFLOP to train, {embedding / 1e18:,.4g} to embed",
    )  # fmt: skip
    for column in table.columns[1:]:
        column.justify = "right"
    for machine in machines:
        costs = (price(training, machine), price(embedding, machine))
        used = f"{machine.tflops * machine.utilisation:,.0f} of {machine.tflops:,.0f}"
        table.add_row(
            machine.name, used, *(f"{figure:,.2f}" for cost in costs for figure in (cost.gpu_hours, cost.usd))
        )
    return table
