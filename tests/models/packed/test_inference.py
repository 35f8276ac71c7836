"""The fast forward gives what the padded forward gives, whatever it leaves out; and what it leaves out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cosine_similarity

from tests.support import families
from tests.support.packed_inputs import FAST, TEXTS, inputs, load
from vladva.models.packed import inference
from vladva.models.packed.clip_tower import PackedTower
from vladva.models.packed.cpu_linear import in_threads, joined_linear, linear_residual, use_cores
from vladva.models.packed.inference import PackedInference, embedding_forward
from vladva.models.packed.packing import groups, pack, round_up
from vladva.models.packed.row_linear import RowLinear, SharedLayer

IMAGE_TOKEN = 9


@pytest.fixture(scope="module", params=FAST)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return families.build(request.param, tmp_path_factory.mktemp(request.param))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "layer", "adapter"),
    [("text", None, False), ("image", 2, False), ("text", 1, True), ("image", None, True), ("mixed", None, True)],
)
def test_embeddings_are_those_of_the_plain_forward(folder: str, kind: str, layer: int | None, adapter: bool) -> None:
    model = load(folder, layer=layer, adapter=adapter)
    fast = embedding_forward(model)
    assert isinstance(fast, PackedInference)
    tokens, pixels = inputs(model, kind)
    plain = model(tokens, pixels)[0]
    torch.testing.assert_close(fast(tokens, pixels), plain, atol=1e-5, rtol=0)
    # What equality is worth: the token before the last is embedded elsewhere.
    earlier = fast(tokens | {"prompt_lengths": tokens["prompt_lengths"] - 1}, pixels)
    assert (earlier - plain).abs().max() > 1e-2


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["text", "image", "mixed"])
def test_small_groups_and_fused_attention_change_nothing(
    folder: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    tokens, pixels = inputs(model, kind)
    plain = model(tokens, pixels)[0]
    monkeypatch.setattr(inference, "CPU_TOKENS", 1)
    monkeypatch.setattr(inference, "UNFUSED_TOKENS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)  # each of which has groups of its own
    found = PackedInference(model)(tokens, pixels)
    torch.set_num_threads(threads)
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["text", "image"])
def test_with_bfloat16_the_direction_is_the_same(folder: str, kind: str) -> None:
    model = load(folder, "bfloat16")
    tokens, pixels = inputs(model, kind)
    fast, plain = PackedInference(model)(tokens, pixels), model(tokens, pixels)[0]
    exact = load(folder)(tokens, pixels)[0]
    assert cosine_similarity(fast, exact).min() > 0.999
    assert (fast - exact).abs().max() < 1.5 * (plain - exact).abs().max() + 1e-3  # no further from it than the plain
    assert cosine_similarity(fast.roll(1, 0), exact).min() < 0.99


def never(*_: Any) -> None:
    """A hook of a module that must not be called."""
    pytest.fail("a layer that an embedding does not need was called")


@torch.inference_mode()
def test_what_an_embedding_does_not_need_is_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "CPU_TOKENS", 10_000)  # one group
    model = load(families.build("llava", tmp_path), layer=2)
    tokens, _ = inputs(model, "text")
    names = {module: name.split("language_model.")[-1] for name, module in model.base.named_modules()}
    rows: dict[str, list[int]] = {}

    def counted(product: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def count(linear: RowLinear, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            for base in linear.bases:
                rows.setdefault(names[base], []).append(len(x))
            return product(linear, x, *rest)

        return count

    monkeypatch.setattr(RowLinear, "of_normed", counted(RowLinear.of_normed))
    monkeypatch.setattr(RowLinear, "residual", counted(RowLinear.residual))
    for name in ("layers.2.mlp.up_proj", "lm_head"):  # nor are those called in another way
        next(each for each, full in names.items() if full == name).register_forward_hook(never)
    PackedInference(model)(tokens)
    prompts = len(TEXTS)
    assert set(rows) == {name for name in rows if name.startswith(("layers.0.", "layers.1."))}
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        assert rows[f"layers.1.{name}"] == [prompts]
        assert rows[f"layers.0.{name}"] == rows["layers.1.self_attn.k_proj"]
    assert prompts < rows["layers.0.mlp.up_proj"][0] < tokens["lengths"].sum()  # shared beginnings: once


@torch.inference_mode()
def test_the_tower_gives_the_layers_that_are_asked_for_and_computes_no_more(tmp_path: Path) -> None:
    model = load(families.build("llava", tmp_path))
    tower = model.base.model.vision_tower
    pixels = torch.randn(40, 3, 32, 32)  # more than a thread takes at a time
    fast = PackedTower(tower, [-2, 0])
    found = fast(pixel_values=pixels).hidden_states
    every = tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found, {-2: every[-2], 0: every[0]}, atol=1e-5, rtol=0)
    assert (found[-2] - every[-1]).abs().max() > 1e-2
    assert len(fast.layers) == len(tower.encoder.layers) - 1


def test_tasks_share_the_threads_that_there_are_and_their_results_are_in_order() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    here = [in_threads(lambda task: (task, torch.get_num_threads()), list(range(tasks)), 4) for tasks in (1, 2, 9)]
    assert torch.get_num_threads() == 4
    torch.set_num_threads(threads)
    assert here == [[(0, 4)], [(0, 2), (1, 2)], [(task, 1) for task in range(9)]]


def test_a_thread_computes_on_the_cores_that_it_may_use() -> None:
    """And other threads on all of theirs."""
    threads = torch.get_num_threads()
    found: list[list[Any]] = []

    def here() -> None:
        use_cores(1)
        found.append(in_threads(lambda task: torch.get_num_threads(), [0, 1], 4))

    one = threading.Thread(target=here)
    one.start()
    one.join()
    found.append(in_threads(lambda task: torch.get_num_threads(), [0, 1], 4))
    torch.set_num_threads(threads)
    assert found == [[1, 1], [2, 2]]


def test_a_family_that_is_not_known_takes_the_plain_forward(tmp_path: Path) -> None:
    model = load(families.build("qwen3_vl", tmp_path))
    forward = embedding_forward(model)
    assert not isinstance(forward, PackedInference)
    tokens, _ = inputs(model, "text")
    with torch.inference_mode():
        assert torch.equal(forward(tokens, None), model(tokens)[0])


# --- packing ---------------------------------------------------------------------------------------------------------


def prompts_of(*rows: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Padded ids [B, T] and lengths [B]."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    return ids, lengths


def test_a_token_is_packed_once_if_all_before_it_are_the_same() -> None:
    ids, lengths = prompts_of([1, 2, 3, 4], [1, 2, 3], [1, 5, 3], [2, 2, 3, 4], [1, 2, 3, 4])
    packed = pack(ids, lengths, np.arange(5), IMAGE_TOKEN)
    # As a tree: 1 -> 2 -> 3 -> 4; 1 -> 5 -> 3; 2 -> 2 -> 3 -> 4.
    assert packed.ids.tolist() == [1, 2, 3, 4, 5, 3, 2, 2, 3, 4]
    for row, prompt in enumerate(packed.prompts.tolist()):
        found = packed.ids[packed.gather_index[row, : lengths[prompt]]]
        assert found.tolist() == ids[prompt, : lengths[prompt]].tolist()
    assert packed.gather_index.flatten()[packed.source_index].tolist() == list(range(10))


def test_nothing_is_shared_from_the_image_on() -> None:
    ids, lengths = prompts_of([1, IMAGE_TOKEN, IMAGE_TOKEN, 4], [1, IMAGE_TOKEN, IMAGE_TOKEN, 4])
    packed = pack(ids, lengths, np.arange(2), IMAGE_TOKEN)
    assert packed.ids.tolist() == [1, IMAGE_TOKEN, IMAGE_TOKEN, 4, IMAGE_TOKEN, IMAGE_TOKEN, 4]
    assert packed.feature.tolist() == [0, 1, 2, 3]
    second = pack(ids, lengths, np.array([1]), IMAGE_TOKEN)
    assert second.feature.tolist() == [2, 3]


def test_few_sizes_are_met_and_what_fills_them_up_is_of_no_prompt() -> None:
    sizes = {round_up(tokens) for tokens in range(1, 1025)}
    octaves = [
        range(1, 17),
        *(range(first + first // 8, 2 * first + 1, first // 8) for first in (16, 32, 64, 128, 256, 512)),
    ]
    assert sorted(sizes) == [size for octave in octaves for size in octave]
    assert all(tokens <= round_up(tokens) <= 1.125 * tokens for tokens in range(1, 1025))
    rows = [list(range(10 * i + 10, 10 * i + 27)) for i in range(5)]  # 17 tokens each, all different
    ids, lengths = prompts_of(*rows)
    packed = pack(ids, lengths, np.arange(5), IMAGE_TOKEN)
    assert packed.num_unique == 85
    assert len(packed.ids) == len(packed.source_index) == 88
    assert packed.gather_index.shape == (5, 18)
    assert packed.gather_index.max() == 84
    assert packed.gather_index.flatten()[packed.source_index[:85]].tolist() == list(range(85))


def test_a_gpu_is_given_no_filling() -> None:
    ids, lengths = prompts_of(*[list(range(10 * i + 10, 10 * i + 27)) for i in range(5)])
    exact, filled = (pack(ids, lengths, np.arange(5), IMAGE_TOKEN, few_sizes=few) for few in (False, True))
    assert exact.num_unique == filled.num_unique == 85
    assert len(exact.ids) == len(exact.source_index) == 85
    assert exact.gather_index.shape == (5, 17)
    assert torch.equal(exact.gather_index, filled.gather_index[:, :17])
    assert torch.equal(exact.source_index // 17 * 18 + exact.source_index % 17, filled.source_index[:85])


def test_groups_hold_like_lengths_and_everything_once() -> None:
    lengths = np.random.default_rng(0).integers(18, 40, 500)
    found = list(groups(lengths, 512))
    assert sorted(np.concatenate(found).tolist()) == list(range(500))
    sizes = [lengths[rows].sum() for rows in found]
    assert max(sizes) <= 512 + 40
    assert min(sizes) > 512 / 2
    padded = sum(lengths[rows].max() * len(rows) for rows in found)
    assert 1 - lengths.sum() / padded < 0.05  # of the attention; the linear layers have none
    unsorted = sum(lengths[first : first + 18].max() * 18 for first in range(0, 500, 18))
    assert 1 - lengths.sum() / unsorted > 0.2  # what sorting is worth
    assert [rows.tolist() for rows in groups(np.array([900, 3]), 512)] == [[1], [0]]
    assert len(list(groups(np.full(60, 26), 512, threads=2))) == 4 == -(-60 * 26 // 512)
    assert len(list(groups(np.full(80, 26), 512, threads=2))) == 6  # not 5, with a thread that waits for the last


def test_a_group_is_cut_where_its_prompts_would_be_padded_too_much() -> None:
    lengths = np.array([480, *[28] * 30, 40, 30])
    assert [rows.tolist() for rows in groups(lengths, 10_000)] == [[*range(1, 31), 32, 31, 0]]  # 31 padded to 480
    in_order = [*range(1, 31), 32]  # 30 by 2 tokens, then 31 by 10, which is 370; then 32 by 440
    assert [rows.tolist() for rows in groups(lengths, 10_000, padding=370)] == [[*in_order, 31], [0]]
    assert [rows.tolist() for rows in groups(lengths, 10_000, padding=369)] == [in_order, [31], [0]]
    lengths = np.random.default_rng(0).lognormal(4, 1, 500).astype(int)
    found = list(groups(lengths, 20_000, padding=1_000))
    assert sorted(np.concatenate(found).tolist()) == list(range(500))
    assert all(lengths[rows].max() * len(rows) - lengths[rows].sum() <= 1_000 for rows in found)
    assert any(lengths[rows].max() * len(rows) - lengths[rows].sum() > 1_000 for rows in groups(lengths, 20_000))


# --- products --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_packed_products_are_those_of_the_layers(tmp_path: Path) -> None:
    model = load(families.build("qwen2_vl", tmp_path), "bfloat16")  # it has biases
    layer = model.base.model.language_model.layers[0]
    x = torch.randn(70, 32, dtype=torch.bfloat16)
    attention = layer.self_attn
    expected = torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], dim=-1)
    found = joined_linear(attention.q_proj, attention.k_proj, attention.v_proj)(x)
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0.01)
    norm = layer.post_attention_layernorm
    exact = x.float() + deepcopy(layer.mlp).float()(deepcopy(norm).float()(x.float()))
    plain = x + layer.mlp(norm(x))
    found = SharedLayer(layer, split=False).mlp(x, False)
    assert (found - exact).square().mean() <= 1.5 * (plain - exact).square().mean()
    assert (found - plain.roll(1, 0)).abs().max() > 0.1
    # With a bias and something to add, both within the product.
    query = attention.q_proj(x).float() + x.float()
    torch.testing.assert_close(linear_residual(attention.q_proj)(x, x).float(), query, atol=0.02, rtol=0.01)
