"""The training forward gives the gradients of the padded forward, whatever it leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.support import families
from tests.support.packed_inputs import FAST, TEXTS, inputs, load
from vladva.models.batch import Tokens, as_tensors, host_array
from vladva.models.embedding_model import EmbeddingModel, checkpoint_activations
from vladva.models.packed import autograd_ops, training
from vladva.models.packed.packing import pack
from vladva.models.packed.training import Group, PackedTraining
from vladva.train import grad_cache


@pytest.fixture(scope="module", params=FAST)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return families.build(request.param, tmp_path_factory.mktemp(request.param))


def pairs(model: EmbeddingModel, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """As `inputs`; what is trained is soft prompts and LoRA."""
    model.requires_grad_(False)
    for name, parameter in model.lvlm.named_parameters():
        parameter.requires_grad_("lora_" in name or "trainable_tokens_delta" in name)
    return inputs(model.train(), kind)


def gradients(model: EmbeddingModel, *arguments: Any, **options: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Embeddings, and the gradients of a sum over them and of the caption loss."""
    model.zero_grad()
    embeddings, caption_loss, _ = model(*arguments, **options)
    torch.manual_seed(2)
    ((embeddings * torch.randn(embeddings.shape)).sum() + caption_loss).backward()
    trained = {name: p for name, p in model.lvlm.named_parameters() if p.requires_grad}
    # A layer that the embedding does not need has no gradient, or zeros.
    return embeddings.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in trained.items()}


@pytest.mark.parametrize(
    ("kind", "layer", "captions", "group"),
    [
        ("text", None, None, 1024),
        ("image", None, 50, 60),
        ("image", 1, 50, 1024),
        ("image", 2, None, 30),
        ("mixed", None, None, 60),
    ],
)
def test_gradients_are_those_of_the_plain_forward(
    folder: str,
    kind: str,
    layer: int | None,
    captions: int | None,
    group: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(training.GROUP_TOKENS, "cpu", group)
    model = load(folder, layer=layer, adapter=True)
    tokens, pixels = pairs(model, kind)
    expected, plain = gradients(model, tokens, pixels, caption_tokens=captions)
    model.packed = PackedTraining(model)
    found, fast = gradients(model, tokens, pixels, caption_tokens=captions)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert fast.keys() == plain.keys()
    for name, gradient in plain.items():
        assert (fast[name] - gradient).abs().max() <= 1e-5 * gradient.abs().max(), name
    assert max(gradient.abs().max() for gradient in plain.values()) > 0.1

    # Images that the vision tower has seen before; activations that are computed again.
    checkpoint_activations(model)
    model.packed = PackedTraining(model)
    again, recomputed = gradients(model, tokens, model.vision_features(pixels), caption_tokens=captions)
    assert torch.equal(again, found)
    for name, gradient in fast.items():
        assert torch.equal(recomputed[name], gradient), name

    # What equality is worth: the weight of one caption or embedding moves the gradients by more.
    _, other = gradients(model, tokens | {"prompt_lengths": tokens["prompt_lengths"] - 1}, pixels)
    assert max((other[name] - gradient).abs().max() for name, gradient in plain.items()) > 1e-2


@pytest.mark.parametrize("kind", ["text", "image"])
def test_with_bfloat16_gradients_have_the_same_direction(folder: str, kind: str) -> None:
    exact_model, model = load(folder, adapter=True), load(folder, "bfloat16", adapter=True)
    _, exact = gradients(exact_model, *pairs(exact_model, kind), caption_tokens=50)
    arguments = pairs(model, kind)
    _, plain = gradients(model, *arguments, caption_tokens=50)
    model.packed = PackedTraining(model)
    _, fast = gradients(model, *arguments, caption_tokens=50)
    errors = [sum((each[name] - exact[name]).square().sum() for name in exact).sqrt() for each in (plain, fast)]
    assert errors[1] < 1.3 * errors[0]


def test_what_is_not_needed_is_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(families.build("llava", tmp_path), adapter=True)
    tokens, _ = pairs(model, "text")
    rows: dict[str, list[int]] = {}
    names = {module: name.split("language_model.")[-1] for name, module in model.base.named_modules()}

    def counted(x: torch.Tensor, *modules: torch.nn.Module) -> torch.Tensor:
        for module in modules:
            rows.setdefault(names[module], []).append(len(x))
        return autograd_ops.lora_linear(x, *modules)

    monkeypatch.setattr(training, "lora_linear", counted)
    monkeypatch.setitem(training.GROUP_TOKENS, "cpu", 10_000)  # one group
    PackedTraining(model)(tokens)
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert rows[f"layers.2.{name}"] == [len(TEXTS)]
        assert rows[f"layers.0.{name}"] == rows["layers.2.self_attn.k_proj"]
    assert len(TEXTS) < rows["layers.0.mlp.up_proj"][0] < tokens["lengths"].sum()  # shared beginnings: once


def test_features_of_images_are_kept_as_long_as_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grad_cache, "KEPT_FEATURES", 100)
    chunks = [
        {"features": torch.zeros(10)},
        {"features": torch.zeros(12)},
        {"features": torch.zeros(1)},
    ]  # 4 bytes each
    kept: list[dict[str, torch.Tensor] | None] = []
    for chunk in (*chunks, None, {"values": torch.zeros(1)}):
        kept.append(grad_cache.keep_features(chunk, kept))
    assert [each is not None for each in kept] == [True, True, True, False, False]
    assert grad_cache.keep_features({"features": torch.zeros(3)}, kept) is None


def test_a_group_goes_to_a_device_whole() -> None:
    ids = np.array([[5, 6, 90, 90, 7, 8], [5, 6, 90, 90, 9, 0]])
    prompts, lengths = np.array([5, 5]), np.array([6, 5])
    packed = pack(ids, lengths, np.arange(2), image_token=90, few_sizes=False)
    group = Group.of(ids, prompts, packed, soft_ids=(7, 6), few_sizes=False)
    found = packed.ids[group.soft.index].tolist(), group.soft.row.tolist()
    assert sorted(zip(*found, strict=True)) == [(6, 1), (7, 0)]  # 6 is shared: there once
    assert packed.ids[packed.image_index].tolist() == [90] * 4
    there = group.to(torch.device("meta"))
    for name in ("ends", "wanted", "summary", "before", "targets"):
        assert getattr(there, name).shape == getattr(group, name).shape
    for part in ("packed", "shared", "soft"):
        for name, value in vars(getattr(group, part)).items():
            moved = getattr(getattr(there, part), name)
            if isinstance(value, torch.Tensor):
                assert (moved.device.type, moved.shape, moved.dtype) == ("meta", value.shape, value.dtype), name
            else:
                assert moved == value


def test_the_host_reads_its_own_tokens() -> None:
    record = Tokens(np.array([[5, 6, 7]]), np.array([2]), np.array([3]))
    elsewhere = as_tensors(record, "meta")  # of which nothing can be read
    for name in ("ids", "prompt_lengths", "lengths"):
        assert host_array(elsewhere, name).tolist() == getattr(record, name).tolist()
        with pytest.raises(NotImplementedError, match="no data"):
            host_array({name: elsewhere[name]}, name)
    prompts = grad_cache.prompts_only(record, elsewhere)
    assert host_array(prompts, "ids").tolist() == [[5, 6]]
    assert host_array(prompts, "lengths").tolist() == [2]
