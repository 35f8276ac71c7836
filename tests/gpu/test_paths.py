"""The packed forwards give the same numbers by the way of a host and by that of a GPU.

On a host, sizes are filled up and short attention is computed as products; on a GPU nothing is filled up and a fused
kernel attends. On a CPU the second way is taken all the same; where there is a GPU, it is also taken there.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import families
from tests.support.packed_inputs import FAST, inputs, load
from vladva.models.embedding_model import EmbeddingModel
from vladva.models.packed import inference, packing, training
from vladva.models.packed.inference import embedding_forward
from vladva.models.packed.training import PackedTraining

CAPTION_TOKENS = 50
KINDS = ["text", "image"]


@pytest.fixture(scope="module", params=FAST)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small checkpoint of a family that has packed forwards."""
    return families.build(request.param, tmp_path_factory.mktemp(request.param))


def moved(fields: dict[str, torch.Tensor] | None, device: str) -> dict[str, torch.Tensor] | None:
    """The tensors on the device."""
    return None if fields is None else {name: value.to(device) for name, value in fields.items()}


def embeddings_and_gradients(folder: str, kind: str, device: str) -> dict[str, torch.Tensor]:
    """Of a training forward with captions, on the host."""
    torch.manual_seed(0)  # LoRA begins at random
    model = load(folder, adapter=True)
    arguments = [moved(each, device) for each in inputs(model, kind)]
    model.requires_grad_(False)
    trained = {
        name: parameter.requires_grad_(True)
        for name, parameter in model.lvlm.named_parameters()
        if "lora_" in name or "trainable_tokens_delta" in name
    }
    model.to(device).train()
    model.packed = PackedTraining(model)
    embeddings, caption_loss, _ = model(*arguments, caption_tokens=CAPTION_TOKENS)
    torch.manual_seed(2)
    ((embeddings * torch.randn(embeddings.shape).to(device)).sum() + caption_loss).backward()
    gradients = {name: p.grad for name, p in trained.items() if p.grad is not None}
    return {name: value.detach().cpu() for name, value in {"embeddings": embeddings, **gradients}.items()}


def embedded(model: EmbeddingModel, kind: str, device: str) -> torch.Tensor:
    """Of the forward of inference, on the host."""
    tokens, pixels = (moved(each, device) for each in inputs(model, kind))
    with torch.inference_mode():
        return embedding_forward(model.to(device))(tokens, pixels).cpu()


def take_the_gpus_way(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """From now on a CPU does what a GPU does; returns a list that each packing is noted in."""
    noted: list[bool] = []

    def pack(*arguments: Any, **options: Any) -> packing.Packed:
        noted.append(True)
        return packing.pack(*arguments, **{**options, "few_sizes": False})

    for module in (inference, training):
        monkeypatch.setattr(module, "pack", pack)
    monkeypatch.setattr(training, "round_up", lambda tokens: tokens)
    monkeypatch.setattr(training, "UNFUSED_TRAINING_TOKENS", 0)
    monkeypatch.setattr(inference, "UNFUSED_TOKENS", 0)
    return noted


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], within: float) -> None:
    """Every tensor, relative to its largest value."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= within * value.abs().max() + 1e-7, name


@pytest.mark.parametrize("kind", KINDS)
def test_training(folder: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = embeddings_and_gradients(folder, kind, "cpu")
    noted = take_the_gpus_way(monkeypatch)
    assert_same(embeddings_and_gradients(folder, kind, "cpu"), expected, 1e-5)
    assert noted
    # What equality is worth: attention that is a hundredth off moves the gradients by more.
    exact = training.causal_attention
    monkeypatch.setattr(training, "causal_attention", lambda query, key, *rest: exact(query, 1.01 * key, *rest))
    with pytest.raises(AssertionError):
        assert_same(embeddings_and_gradients(folder, kind, "cpu"), expected, 1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_inference(folder: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = embedded(load(folder), kind, "cpu")
    noted = take_the_gpus_way(monkeypatch)
    torch.testing.assert_close(embedded(load(folder), kind, "cpu"), expected, atol=2e-6, rtol=0)
    assert noted
    other = embedded(load(folder, layer=1), kind, "cpu")
    assert (other - expected).abs().max() > 1e-2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(folder: str, kind: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    assert_same(
        embeddings_and_gradients(folder, kind, "cuda"), embeddings_and_gradients(folder, kind, "cpu"), within=1e-3
    )
    torch.testing.assert_close(
        embedded(load(folder), kind, "cuda"), embedded(load(folder), kind, "cpu"), atol=1e-4, rtol=0
    )
