"""The packed Qwen tower gives what transformers' tower gives, with as few calls of attention as there are lengths."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from tests.support import families
from tests.support.packed_inputs import inputs, load
from vladva.models.embedding_model import EmbeddingModel
from vladva.models.packed import qwen_tower
from vladva.models.packed.qwen_tower import PatchProduct, attend_by_length
from vladva.models.packed.towers import TEXT_INPUTS, image_features, with_packed_tower


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> EmbeddingModel:
    return load(families.build(request.param, tmp_path_factory.mktemp(request.param)))


@torch.inference_mode()
def test_features_are_those_of_the_towers_own(model: EmbeddingModel, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, pixels = inputs(model, "image")
    taken = model.inputs(tokens, pixels)
    of_images = {name: value for name, value in taken.items() if name not in TEXT_INPUTS}
    expected = torch.cat(list(model.base.model.get_image_features(**of_images).pooler_output))
    calls: list[int] = []
    lengths: list[int] = []

    def counted(*heads: Any, **options: Any) -> torch.Tensor:
        calls.append(len(heads[0]))
        return scaled_dot_product_attention(*heads, **options)

    read = qwen_tower.Sequences.lengths

    def told(self: Any, ends: torch.Tensor) -> list[int]:
        found = read(self, ends)
        lengths.append(len(set(found)))
        return found

    monkeypatch.setattr(qwen_tower, "scaled_dot_product_attention", counted)
    monkeypatch.setattr(qwen_tower.Sequences, "lengths", told)
    packed = with_packed_tower(model.base.model)
    found = image_features(packed, taken, pixels)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert len(lengths) == len(model.base.model.visual.blocks)
    assert len(calls) == sum(lengths) < sum(calls)  # a call for each length, not for each image or window
    assert packed.visual is not model.base.model.visual  # the model itself is as it was
    assert type(model.base.model.visual.blocks[0].attn).__name__.endswith("VisionAttention")
    # With sizes that the host has, the grids of the device are not looked at.
    blind = taken | {"image_grid_thw": torch.zeros_like(taken["image_grid_thw"])}
    assert torch.equal(image_features(packed, blind, pixels | {"host_sizes": pixels["sizes"]}), found)
    with pytest.raises(RuntimeError):
        image_features(packed, blind, pixels)
    # What equality is worth: another image's patches give other features.
    of_images["pixel_values"] = of_images["pixel_values"].roll(1, 0)
    other = torch.cat(list(packed.get_image_features(**of_images).pooler_output))
    assert (other - expected).abs().max() > 1e-2


@torch.inference_mode()
def test_attention_stays_within_sequences_of_any_lengths() -> None:
    lengths = [3, 5, 3, 1, 5, 5]
    torch.manual_seed(0)
    heads = [torch.randn(sum(lengths), 2, 8) for _ in range(3)]
    found = attend_by_length(*heads, lengths)
    parts = zip(*(each.split(lengths) for each in heads), strict=True)
    expected = [
        scaled_dot_product_attention(*(each.transpose(0, 1) for each in part)).transpose(0, 1) for part in parts
    ]
    torch.testing.assert_close(found, torch.cat(expected), atol=1e-6, rtol=0)
    across = scaled_dot_product_attention(*(each.transpose(0, 1) for each in heads)).transpose(0, 1)
    assert (across - found).abs().max() > 0.1


@torch.inference_mode()
def test_patches_are_embedded_by_the_same_numbers(tmp_path: Path) -> None:
    convolution = torch.nn.Conv3d(3, 32, kernel_size=(2, 8, 8), stride=(2, 8, 8), bias=False)
    patches = torch.randn(7, 3 * 2 * 8 * 8)
    expected = convolution(patches.view(7, 3, 2, 8, 8)).view(7, 32)
    torch.testing.assert_close(PatchProduct(convolution)(patches), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(AssertionError, match="patches overlap"):
        PatchProduct(torch.nn.Conv3d(3, 32, kernel_size=(2, 8, 8), stride=(2, 4, 4)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="flash attention over many lengths needs a GPU")
def test_on_a_gpu_one_call_gives_the_same() -> None:
    lengths = [300, 64, 300, 17]
    torch.manual_seed(0)
    heads = [torch.randn(sum(lengths), 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    ends = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    found = qwen_tower.attend_within(*heads, ends, lengths)
    expected = attend_by_length(*heads, lengths)
    torch.testing.assert_close(found.float(), expected.float(), atol=0.02, rtol=0.02)
