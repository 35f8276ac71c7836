"""Many conversations in one forward give the tokens that each gives by itself with transformers' own forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support import families
from tests.support.packed_inputs import FAST, load
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import render
from vladva.models.adapter import AdapterSwitch
from vladva.models.batch import Pixels, as_tensors
from vladva.models.embedding_model import EmbeddingModel
from vladva.models.generation import decode
from vladva.models.packed import row_linear
from vladva.models.packed.generation import Chunk, PackedGeneration, Prompt
from vladva.models.packed.kv_cache import SMALLEST, KeyValueCache, Slot, slot_capacity
from vladva.models.packed.row_linear import GatedRowMLP, RowLinear, SharedLayer, rows_unsupported

IMAGES = [render(scene) for scene, _ in islice(scenes("train"), 3)]
ASKED = [  # text, images, adapter
    ("hello there what", 0, False),
    ("a red circle", 1, True),
    ("x", 2, False),
    ("and another one that is longer", 0, True),
    ("a red circle", 1, False),
]
TOKENS = 10


def conversation(model: EmbeddingModel, text: str, images: int) -> tuple[list[int], Pixels | None]:
    """Token ids and pixels of a question about the first images."""
    content = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
    shown = IMAGES[:images]
    ids = model.preprocessor.render([{"role": "user", "content": content}], [image.size for image in shown])
    return ids, model.preprocessor.pixels(shown) if images else None


def alone(model: EmbeddingModel, text: str, images: int, adapter: bool) -> list[int]:
    """The greedy answer by transformers' forward; nothing ends it."""
    ids, pixels = conversation(model, text, images)
    tokens = as_tensors(model.preprocessor.pad([(ids, [])]), "cpu")
    model.base.generation_config.eos_token_id = -1
    inputs = model.inputs(tokens, as_tensors(pixels, "cpu") if pixels else None)
    around_token = nullcontext if adapter else AdapterSwitch(model.lvlm).off
    return list(decode(model, inputs, TOKENS, 0.0, 1.0, around_token=around_token))


class Talk:
    """One conversation on its way through the packed forward."""

    def __init__(self, generation: PackedGeneration, prompt: Prompt, adapter: bool) -> None:
        self.generation, self.prompt, self.adapter = generation, prompt, adapter
        self.slot: Slot = generation.cache.take(len(prompt.ids) + TOKENS)
        self.said: list[int] = []

    def chunk(self, tokens: int) -> Chunk:
        """What it brings to a step: the next `tokens` of its prompt, or what it said last."""
        if self.slot.length < len(self.prompt.ids):
            return self.prompt.chunk(self.slot, self.generation.image_token, tokens, adapter=self.adapter)
        return self.prompt.answer(self.slot, self.said[-1], adapter=self.adapter)


def together(model: EmbeddingModel, tokens: int, *, adapters: bool = True) -> list[list[int]]:
    """The greedy answers, prompts read `tokens` at a time; each conversation begins one step after the one before."""
    generation = PackedGeneration(model)
    talks = [
        Talk(generation, generation.prompt(*conversation(model, text, images)), adapter and adapters)
        for text, images, adapter in ASKED
    ]
    waiting, talking = list(talks), []
    while waiting or talking:
        talking += waiting[:1]
        del waiting[:1]
        chunks = [talk.chunk(tokens) for talk in talking]
        speaking = [talk for talk, chunk in zip(talking, chunks, strict=True) if chunk.ends]
        for talk, logits in zip(speaking, generation(chunks), strict=True):
            talk.said.append(int(logits.argmax()))
        for talk in [talk for talk in talking if len(talk.said) == TOKENS]:
            generation.cache.release(talk.slot)
            talking.remove(talk)
    assert generation.cache.in_use == 0
    return [talk.said for talk in talks]


@pytest.mark.parametrize("family", FAST)
def test_many_conversations_answer_as_each_does_alone(family: str, tmp_path: Path) -> None:
    model = load(families.build(family, tmp_path), adapter=True)
    expected = [alone(model, *asked) for asked in ASKED]
    assert together(model, 7) == expected
    assert together(model, 1000) == expected
    # What equality is worth: the adapter changes the answers for which it was on, and no others.
    off = together(model, 1000, adapters=False)
    assert [one != other for one, other in zip(off, expected, strict=True)] == [adapter for *_, adapter in ASKED]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@torch.inference_mode()
def test_with_the_adapter_off_a_row_is_the_base_models_to_the_last_bit(dtype: str, tmp_path: Path) -> None:
    folder = families.build("llava", tmp_path)
    model, base = load(folder, dtype, adapter=True), load(folder, dtype, adapter=True)
    base.lvlm = base.lvlm.unload()  # type: ignore[operator]
    assert rows_unsupported(base.base) is None
    assert not any("lora" in name for name, _ in base.named_parameters())
    logits = []
    for one, adapters in ((model, True), (base, False), (model, False)):
        generation = PackedGeneration(one)
        talks = [
            Talk(generation, generation.prompt(*conversation(one, text, images)), adapter and adapters)
            for text, images, adapter in ASKED
        ]
        rows = [generation([talk.chunk(1000) for talk in talks])]
        for talk, row in zip(talks, rows[0], strict=True):
            talk.said.append(7)  # the same token in every run
            assert row.isfinite().all()
        rows.append(generation([talk.chunk(1) for talk in talks]))
        logits.append(torch.stack(rows))
    mixed, never, switched_off = logits
    on = torch.tensor([adapter for *_, adapter in ASKED])
    assert torch.equal(mixed[:, ~on], never[:, ~on])
    assert torch.equal(switched_off, never)
    assert not torch.equal(mixed[:, on], never[:, on])


@torch.inference_mode()
def test_rows_with_the_adapter_are_those_of_the_merged_weights(tmp_path: Path) -> None:
    model = load(families.build("llava", tmp_path), adapter=True)
    layer = model.base.model.language_model.layers[0]
    attention, norm = layer.self_attn, layer.input_layernorm
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    x = torch.randn(6, norm.weight.shape[0])
    rows = torch.tensor([1, 4])
    off = torch.cat([linear.base_layer(norm(x)) for linear in projections], dim=1)
    on = torch.cat([linear(norm(x)) for linear in projections], dim=1)  # PEFT's own
    shared = RowLinear(*projections, norm=norm)
    mixed = shared(x, rows)
    torch.testing.assert_close(mixed[rows], on[rows], atol=1e-5, rtol=0)
    torch.testing.assert_close(shared(x, True), on, atol=1e-5, rtol=0)
    assert torch.equal(shared(x, False), off)
    assert torch.equal(mixed[[0, 2, 3, 5]], off[[0, 2, 3, 5]])
    mlp = GatedRowMLP(layer.post_attention_layernorm, layer.mlp)
    plain = layer.mlp(layer.post_attention_layernorm(x)) + x
    torch.testing.assert_close(mlp(x.clone(), True), plain, atol=1e-5, rtol=0)
    for linear in projections:
        linear.merge()
    assert "merged" in str(rows_unsupported(model.base.model.language_model))
    merged = torch.cat([linear(norm(x)) for linear in projections], dim=1)
    torch.testing.assert_close(mixed[rows], merged[rows], atol=1e-5, rtol=0)


class Products(TorchDispatchMode):
    """Counts matrix products."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


def products_of(function: Callable[[], Any]) -> tuple[Any, int]:
    """What a function gives, and how many products it takes."""
    with Products() as products:
        found = function()
    return found, products.number


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
@torch.no_grad()
def test_layers_with_one_input_are_one_product_and_their_adapters_another(
    dtype: torch.dtype, tolerance: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_linear, "can_prepack", lambda *linears: False)  # as on a GPU
    model = load(families.build("qwen2_vl", tmp_path), adapter=True)  # it has biases
    layer = model.base.model.language_model.layers[0].to(dtype)
    attention, mlp = layer.self_attn, layer.mlp
    names = [name for name in layer.state_dict() if "base_layer.weight" in name]
    before = {name: layer.state_dict()[name].clone() for name in names}
    x, some = torch.randn(6, layer.input_layernorm.weight.shape[0], dtype=dtype), torch.tensor([1, 4])
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    normed = layer.input_layernorm(x)
    plain = torch.cat([linear(normed) for linear in projections], dim=1)
    after = mlp(layer.post_attention_layernorm(x)) + x

    shared = SharedLayer(layer, split=False)
    every, of_every = products_of(lambda: shared.projections(x, True))
    mixed, of_some = products_of(lambda: shared.projections(x, some))
    off, of_none = products_of(lambda: shared.projections(x, False))
    whole_mlp, of_mlp = products_of(lambda: shared.mlp(x.clone(), True))
    _, pefts = products_of(lambda: [linear(normed) for linear in projections])
    assert (of_none, of_every, of_some, of_mlp, pefts) == (1, 2, 3, 2 + 3, 9)
    close = partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance)
    close(every, plain)
    close(mixed[some], plain[some])
    close(whole_mlp, after)
    assert torch.equal(mixed[[0, 2, 3, 5]], off[[0, 2, 3, 5]])
    assert (off - plain).abs().max() > 10 * tolerance
    # The modules have their own weights still, which are held once.
    assert all(torch.equal(layer.state_dict()[name], weight) for name, weight in before.items())
    assert len({linear.base_layer.weight.untyped_storage().data_ptr() for linear in projections}) == 1
    close(torch.cat([linear(normed) for linear in projections], dim=1), plain)


def test_slots_move_together_and_keep_what_they_hold() -> None:
    cache = KeyValueCache(2, 3, 4, torch.float32, torch.device("cpu"))
    slots = [cache.take(10) for _ in range(5)]
    for number, slot in enumerate(slots):
        slot.length = 3
        for layer in range(2):
            slot.block.keys[layer][slot.row, :, :3] = number
            slot.block.values[layer][slot.row, :, :3] = -number
    for number in (1, 4, 0):  # in the middle, the last, the first
        cache.release(slots[number])
    left = [slots[2], slots[3]]
    assert sorted(slot.row for slot in left) == [0, 1]
    assert cache.in_use == 2
    for number, slot in zip((2, 3), left, strict=True):
        for layer in range(2):
            assert (slot.block.keys[layer][slot.row, :, :3] == number).all()
            assert (slot.block.values[layer][slot.row, :, :3] == -number).all()
    for slot in left:
        cache.release(slot)
    assert all(block.rows == 0 for block in cache.blocks.values())  # nothing is kept of memory
    assert [slot_capacity(tokens) for tokens in (1, SMALLEST, SMALLEST + 1, 1000)] == [64, 64, 128, 1024]
    assert cache.take(65).block is not cache.take(10).block
