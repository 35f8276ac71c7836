"""Operations of a run, against PyTorch's own count of the same shapes, and the price that follows from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from jobs.train import parse
from vladva.models.backbones import without_weights
from vladva.recipes import RECIPES
from vladva.train import cost
from vladva.train.cost import Machine, attention, count_weights, forward_work, price, read_prices, training_work
from vladva.train.memory_plan import settings_of, side_tokens

PRICES = Path(__file__).parents[2] / "cluster/prices.yaml"


def counted(module: torch.nn.Module, *inputs: torch.Tensor, **named: torch.Tensor) -> int:
    """Operations as PyTorch counts them, of a module without weights."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(*inputs, **named)
    return counter.get_total_flops()


@pytest.mark.parametrize("recipe", ["tiny", "llava_1_5_7b"])
def test_the_language_model_is_counted_as_pytorch_counts_it(recipe: str) -> None:
    settings = settings_of(RECIPES[recipe]().model.checkpoint)
    language, _, head = count_weights(settings)
    shape, tokens = settings.get_text_config(), 64
    model = without_weights(settings)
    embeds = torch.empty(1, tokens, shape.hidden_size, device="meta", dtype=model.dtype)
    # PyTorch counts attention without its mask. The rotations' angles are a product too, of a few thousand operations.
    expected = 2 * language * tokens + attention(shape.num_hidden_layers, shape.hidden_size, tokens)
    assert counted(model.model.language_model, inputs_embeds=embeds) == pytest.approx(expected, rel=1e-4)
    assert counted(model.lm_head, embeds) == 2 * head * tokens


def test_the_vision_tower_is_counted_as_pytorch_counts_it() -> None:
    settings = settings_of("tiny")
    _, vision, _ = count_weights(settings)
    model = without_weights(settings)
    size, patch = settings.vision_config.image_size, settings.vision_config.patch_size
    pixels = torch.empty(1, 3, size, size, device="meta", dtype=model.dtype)
    projector = model.model.multi_modal_projector
    patches = (size // patch) ** 2
    expected = 2 * (vision - projector.linear_1.weight.numel() - projector.linear_2.weight.numel()) * patches
    expected += attention(settings.vision_config.num_hidden_layers, settings.vision_config.hidden_size, patches)
    # The class token goes through the layers too: one more than there are patches.
    found = counted(model.model.vision_tower, pixel_values=pixels)
    assert expected < found < expected * ((patches + 1) / patches) ** 2


def test_a_run_is_its_passes() -> None:
    config = RECIPES["llava_1_5_7b"]()
    config = replace(config, loss=replace(config.loss, next_token_weight=0.0))
    work, pairs = forward_work(config), config.train.steps * config.train.global_batch
    assert work.caption == 0
    one = replace(config, train=replace(config.train, gradient_cache=False, activation_checkpointing=False))
    both = replace(config, train=replace(config.train, gradient_cache=True, activation_checkpointing=True))
    assert training_work(one) == pytest.approx(pairs * (work.pixels + 2 * (work.image + work.text)))
    assert training_work(both) == pytest.approx(pairs * (work.pixels + 4 * (work.image + work.text)))


def test_captions_longer_texts_and_lower_layers() -> None:
    config = RECIPES["llava_1_5_7b"]()
    work = forward_work(config)
    image, _ = side_tokens(settings_of(config.model.checkpoint), config)
    language, _, head = count_weights(settings_of(config.model.checkpoint))
    long = config.data.long_below
    assert work.caption == pytest.approx(2 * (language + head) * long, rel=0.1)  # and attention to the image
    assert image > long
    half = forward_work(replace(config, model=replace(config.model, layer=16)))
    assert half.image == work.image / 2
    assert half.image + half.caption == pytest.approx(work.image + work.caption)  # the caption needs all layers


def test_the_price_is_hours_times_dollars() -> None:
    machine = Machine("m", gpus=8, tflops=100, usd_per_hour=16, utilisation=0.5)
    found = price(50e12 * 3600 * 10, machine)  # ten hours of one GPU
    assert found.gpu_hours == pytest.approx(10)
    assert found.usd == pytest.approx(20)


def test_the_price_list_of_the_repository_is_one() -> None:
    machines = read_prices(yaml.safe_load(PRICES.read_text()))
    assert len(machines) >= 3
    config = RECIPES["tiny"]()
    assert cost.price_table(config, machines, 1000).row_count == len(machines)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "machines"),
        ({"machines": {"m": {"gpus": 8}}}, "m: missing 2 required positional arguments: 'tflops' and 'usd_per_hour'"),
        ({"machines": {"m": {"gpus": 8, "tflops": 1, "usd_per_hour": 1, "price": 1}}}, "'price'"),
        ({"machines": {"m": {"gpus": 8, "tflops": 0, "usd_per_hour": 1}}}, "tflops of m is 0; it must be positive"),
        ({"machines": {"m": {"gpus": 8, "tflops": 1, "usd_per_hour": 1, "utilisation": 35}}}, "at most 1"),
    ],
)
def test_a_wrong_list_is_told_by_machine_and_field(content: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_prices(content)


def test_the_command_line() -> None:
    options, _ = parse(["tiny", "--dry-run", "--price", "cluster/prices.yaml", "--price-items", "5"])
    assert (options.price, options.price_items) == (str(Path("cluster/prices.yaml").absolute()), 5)
    with pytest.raises(ValueError, match="--price goes with --dry-run"):
        parse(["tiny", "--price", "cluster/prices.yaml"])
