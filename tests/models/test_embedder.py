"""The embedding is what design and paper say, and every way to compute it gives the same."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.support.checkpoints import build_llava
from vladva.config import ModelConfig
from vladva.data.scenes.captions import captions
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import render
from vladva.models.adapter import add_adapter, save_adapter
from vladva.models.batch import as_tensors
from vladva.models.embedder import Embedder, load_embedder
from vladva.models.embedding_model import EmbeddingModel
from vladva.models.generation import decode, end_tokens
from vladva.models.preprocessor import Preprocessor

TEXTS = ["a red circle", "a small blue ring to the left of a large green star", "x"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    return build_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def images() -> list:
    return [render(scene) for scene, _ in islice(scenes("train"), 3)]


def adapted(checkpoint: str, folder: Path, layer: int | None = None) -> str:
    """An adapter with random weights in every part, saved."""
    config = ModelConfig(checkpoint=checkpoint, lora_rank=4, layer=layer)
    model = EmbeddingModel(config, Preprocessor(checkpoint, soft_prompts=True))
    model.lvlm.requires_grad_(False)
    add_adapter(model, config)
    torch.manual_seed(1)
    for name, parameter in model.lvlm.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_adapter(model, config, folder)
    return str(folder)


def plain_embedding(embedder: Embedder, text: str, layer: int) -> np.ndarray:
    """By transformers alone: all hidden states of one unpadded text, the last token's at the layer, final norm."""
    base = embedder.model.base
    ids = torch.tensor([embedder.preprocessor.text_prompt(text)])
    hidden = base(input_ids=ids, output_hidden_states=True).hidden_states
    last = hidden[layer][:, -1]
    if layer < len(hidden) - 1:  # transformers has applied the final norm to the last one only
        last = base.model.language_model.norm(last)
    return torch.nn.functional.normalize(last.float(), dim=-1)[0].detach().numpy()


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_embedding_is_the_normed_hidden_state_of_the_last_prompt_token(
    checkpoint: str, tmp_path: Path, layer: int
) -> None:
    embedder = load_embedder(adapted(checkpoint, tmp_path / "adapter", layer))
    found = embedder.embed_texts(TEXTS)
    expected = np.stack([plain_embedding(embedder, text, layer) for text in TEXTS])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-6)
    assert abs(expected - np.stack([plain_embedding(embedder, t, 1 + layer % 3) for t in TEXTS])).max() > 1e-2


def test_adapter_off_is_the_base_model_bit_for_bit(checkpoint: str, tmp_path: Path, images: list) -> None:
    embedder = load_embedder(adapted(checkpoint, tmp_path / "adapter"))
    base = load_embedder(checkpoint)
    tokens = base.preprocessor.images([p.size for p in images], [None] * 3)
    pixels = as_tensors(base.preprocessor.pixels(images), "cpu")
    inputs = base.model.inputs(as_tensors(tokens, "cpu"), pixels)
    with torch.inference_mode():
        expected = base.model.base(**inputs).logits
        with embedder.model.lvlm.disable_adapter():
            off = embedder.model.base(**inputs).logits
        on = embedder.model.base(**inputs).logits
    assert torch.equal(off, expected)
    assert (on - expected).abs().max() > 1e-2


def test_merged_adapter_embeds_the_same(checkpoint: str, tmp_path: Path, images: list) -> None:
    folder = adapted(checkpoint, tmp_path / "adapter")
    plain, merged, zero_shot = load_embedder(folder), load_embedder(folder, merge=True), load_embedder(checkpoint)
    np.testing.assert_allclose(merged.embed_texts(TEXTS), plain.embed_texts(TEXTS), atol=1e-5)
    np.testing.assert_allclose(merged.embed_images(images), plain.embed_images(images), atol=1e-5)
    assert abs(zero_shot.embed_texts(TEXTS) - plain.embed_texts(TEXTS)).max() > 1e-2


def test_a_new_adapter_changes_nothing_yet(checkpoint: str, images: list) -> None:
    config = ModelConfig(checkpoint=checkpoint, lora_rank=4)
    model = EmbeddingModel(config, Preprocessor(checkpoint, soft_prompts=True)).eval()
    add_adapter(model, config)
    fresh = Embedder(model, config, None, merged=False)
    zero_shot = load_embedder(checkpoint)
    np.testing.assert_allclose(fresh.embed_texts(TEXTS), zero_shot.embed_texts(TEXTS), atol=1e-6)
    np.testing.assert_allclose(fresh.embed_images(images), zero_shot.embed_images(images), atol=1e-6)


def test_soft_prompts_alone_are_an_adapter(checkpoint: str, tmp_path: Path, images: list) -> None:
    config = ModelConfig(checkpoint=checkpoint, lora_rank=0)
    model = EmbeddingModel(config, Preprocessor(checkpoint, soft_prompts=True)).eval()
    model.requires_grad_(False)
    add_adapter(model, config)
    ((name, prompts),) = [(n, p) for n, p in model.named_parameters() if p.requires_grad and "log_scale" not in n]
    assert "trainable_tokens_delta" in name
    assert prompts.shape == (sum(map(len, model.preprocessor.soft_ids.values())), 32)
    zero_shot = load_embedder(checkpoint)
    fresh = Embedder(model, config, None, merged=False)
    np.testing.assert_allclose(fresh.embed_texts(TEXTS), zero_shot.embed_texts(TEXTS), atol=1e-6)
    prompts.data += torch.randn(prompts.shape, generator=torch.Generator().manual_seed(0))
    save_adapter(model, config, tmp_path)
    for merge in (False, True):
        loaded = load_embedder(str(tmp_path), merge=merge)
        np.testing.assert_allclose(loaded.embed_texts(TEXTS), fresh.embed_texts(TEXTS), atol=1e-5)
        np.testing.assert_allclose(loaded.embed_images(images), fresh.embed_images(images), atol=1e-5)
    assert abs(fresh.embed_images(images) - zero_shot.embed_images(images)).max() > 1e-2


def test_the_summary_token_does_not_see_the_caption(checkpoint: str, images: list) -> None:
    model = EmbeddingModel(ModelConfig(checkpoint=checkpoint), Preprocessor(checkpoint)).eval()
    pixels = as_tensors(model.preprocessor.pixels(images), "cpu")
    sizes = [p.size for p in images]
    worded = [captions(scene, random)[-1] for scene, random in islice(scenes("train"), 3)]
    with torch.inference_mode():
        alone = model(as_tensors(model.preprocessor.images(sizes, [None] * 3), "cpu"), pixels)[0]
        tokens = as_tensors(model.preprocessor.images(sizes, worded), "cpu")
        beside = model(tokens, pixels, caption_tokens=10)[0]
        after = tokens | {"prompt_lengths": tokens["prompt_lengths"] + 5}  # the control: read within the caption
        shifted = model(after, pixels)[0]
    torch.testing.assert_close(beside, alone, atol=1e-6, rtol=0)
    assert (shifted - alone).abs().max() > 1e-2


def test_batch_and_order_do_not_matter(checkpoint: str, images: list) -> None:
    embedder = load_embedder(checkpoint)
    texts = [captions(scene, random)[k] for k in range(3) for scene, random in islice(scenes("train"), 7)] + TEXTS
    whole = embedder.embed_texts(texts)
    np.testing.assert_allclose(embedder.embed_texts(texts[::-1], batch_size=2)[::-1], whole, atol=1e-6)
    np.testing.assert_allclose(
        embedder.embed_images(images[::-1], batch_size=1)[::-1], embedder.embed_images(images), atol=1e-6
    )
    assert embedder.embed_texts([]).shape == (0, 32)


def test_fingerprint_follows_what_the_embedding_depends_on(checkpoint: str, tmp_path: Path) -> None:
    folder = adapted(checkpoint, tmp_path / "adapter")
    same = {load_embedder(folder).fingerprint, load_embedder(folder, merge=True).fingerprint}
    assert len(same) == 1
    others = {
        load_embedder(checkpoint).fingerprint,
        load_embedder(adapted(checkpoint, tmp_path / "layer", 2)).fingerprint,
        load_embedder(build_llava(tmp_path / "again")).fingerprint,
    }
    assert len(others) == 2  # a checkpoint of equal weights is the same model
    assert not same & others


def test_generation_equals_transformers_own(checkpoint: str, tmp_path: Path, images: list) -> None:
    embedder = load_embedder(adapted(checkpoint, tmp_path / "adapter"))
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image."}]
    messages = [{"role": "user", "content": content}]
    preprocessor = embedder.preprocessor
    tokens = as_tensors(preprocessor.pad([(preprocessor.render(messages, [(64, 64)]), [])]), "cpu")
    inputs = embedder.model.inputs(tokens, as_tensors(preprocessor.pixels(images[:1]), "cpu"))
    for adapter in (False, True):
        base = load_embedder(checkpoint).model.base if not adapter else embedder.model.base
        ids = base.generate(**inputs, do_sample=False, max_new_tokens=12)[0, tokens["ids"].shape[1] :]
        expected = preprocessor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
        pieces = list(embedder.generate(messages, images[:1], max_tokens=12, adapter=adapter))
        assert "".join(pieces) == expected
        cut = expected[3:6]
        stopped = "".join(embedder.generate(messages, images[:1], max_tokens=12, adapter=adapter, stop=[cut]))
        assert stopped == expected[: expected.index(cut)]
    sampled = [
        "".join(embedder.generate(messages, images[:1], temperature=1.5, seed=s, max_tokens=12)) for s in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    with pytest.raises(ValueError, match="1 image parts, but 0 images"):
        next(embedder.generate(messages, []))


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ValueError, match="/no/such/model"):
        load_embedder("/no/such/model")


def test_the_adapter_is_off_while_a_token_is_computed_and_no_layer_is_looked_up_for_it(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    embedder, base = load_embedder(adapted(checkpoint, tmp_path / "adapter")), load_embedder(checkpoint)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Two circles."}]}]
    expected = "".join(base.generate(messages, max_tokens=8))
    with_adapter = "".join(embedder.generate(messages, max_tokens=8, adapter=True))
    trained = embedder.embed_texts(TEXTS)

    def refuse(*_: object) -> None:
        raise AssertionError("PEFT walks through its layers")

    monkeypatch.setattr(BaseTunerLayer, "enable_adapters", refuse)
    found = []
    for piece in embedder.generate(messages, max_tokens=8):
        found.append(piece)
        # Between two tokens others embed, with the adapter.
        np.testing.assert_array_equal(embedder.embed_texts(TEXTS), trained)
    assert "".join(found) == expected != with_adapter
    with pytest.raises(RuntimeError, match="spoiled"), embedder.adapter_switch.off():
        raise RuntimeError("spoiled")
    assert "".join(embedder.generate(messages, max_tokens=8, adapter=True)) == with_adapter


def test_an_answer_ends_where_the_generation_config_or_the_tokenizer_says(checkpoint: str, tmp_path: Path) -> None:
    """Checkpoints without a generation config, or with one that names no end, are on the hub."""
    told = load_embedder(checkpoint)
    messages = [{"role": "user", "content": [{"type": "text", "text": "Two circles."}]}]
    answer = list(decode_all(told, messages))
    shutil.copytree(checkpoint, tmp_path / "untold")
    (tmp_path / "untold/generation_config.json").unlink()
    settings = json.loads((tmp_path / "untold/config.json").read_text())
    settings["text_config"]["eos_token_id"] = None
    (tmp_path / "untold/config.json").write_text(json.dumps(settings))
    untold = load_embedder(str(tmp_path / "untold"))
    assert untold.model.base.generation_config.eos_token_id is None
    assert end_tokens(untold.model) == end_tokens(told.model) == {told.preprocessor.tokenizer.eos_token_id}
    assert list(decode_all(untold, messages)) == answer
    told.model.base.generation_config.eos_token_id = [answer[2], answer[3]]
    assert list(decode_all(told, messages)) == answer[: min(answer.index(answer[2]), answer.index(answer[3]))]


def decode_all(embedder: Embedder, messages: list) -> Iterator[int]:
    """Token ids of an answer of at most 8."""
    tokens = as_tensors(embedder.preprocessor.pad([(embedder.preprocessor.render(messages), [])]), "cpu")
    return decode(embedder.model, embedder.model.inputs(tokens, None), 8, 0.0, 1.0)
