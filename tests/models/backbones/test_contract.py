"""What every LVLM file of backbones/ must do, against transformers itself on a small checkpoint of the family."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

from tests.support import families
from vladva.config import IMAGE_PROMPT, TEXT_PROMPT, ModelConfig
from vladva.core.images import MAX_RATIO
from vladva.data.scenes.captions import captions
from vladva.data.scenes.corpus import scenes
from vladva.embed.layers_actor import embed_layers
from vladva.models import backbones
from vladva.models.adapter import add_adapter, save_adapter
from vladva.models.batch import as_tensors
from vladva.models.embedder import Embedder, load_embedder
from vladva.models.embedding_model import EmbeddingModel, caption_labels, checkpoint_activations
from vladva.models.preprocessor import Preprocessor

SIZES = [(64, 64), (100, 40), (40, 150), (333, 17)]  # (width, height)


def test_every_lvlm_has_a_checkpoint_here() -> None:
    assert set(backbones.backbone_families()) == set(families.BUILDERS)


@pytest.fixture(scope="module", params=list(families.BUILDERS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return families.build(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def embedder(folder: str) -> Embedder:
    return load_embedder(folder)


@pytest.fixture(scope="module")
def adapter(folder: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """An adapter with something in every part, saved; and what it gave before."""
    config = ModelConfig(checkpoint=folder, lora_rank=4)
    model = EmbeddingModel(config, Preprocessor(folder, soft_prompts=True))
    add_adapter(model, config)
    torch.manual_seed(1)
    for name, parameter in model.lvlm.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    path = tmp_path_factory.mktemp("adapter")
    save_adapter(model, config, path)
    return str(path), Embedder(model.eval(), config, None, merged=False).embed_images(IMAGES)


def random_image(width: int, height: int) -> Image.Image:
    values = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


IMAGES = [random_image(*size) for size in SIZES]


def asking(prompt: str, num_images: int = 1) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image"}] * num_images + [{"type": "text", "text": prompt}]}]


def by_transformers(folder: str, images: list[Image.Image], messages: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """One conversation's inputs, from the family's own processor.

    Qwen's cannot be built without torchvision: its image processor and tokenizer are put together here.
    """
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    if "qwen" not in Path(folder).name:
        processor = AutoProcessor.from_pretrained(folder)
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=images or None, text=text, return_tensors="pt")
        return {name: value for name, value in inputs.items() if name != "token_type_ids"}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    inputs = {}
    if images:
        processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        inputs = dict(processor(images=images, return_tensors="pt"))
        for grid in inputs["image_grid_thw"]:
            text = text.replace("<|image_pad|>", "<|once|>" * int(grid.prod() // 4), 1)
        text = text.replace("<|once|>", "<|image_pad|>")
    inputs["input_ids"] = tokenizer(text, return_tensors="pt").input_ids
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return inputs


@pytest.mark.parametrize("image", IMAGES, ids=[str(size) for size in SIZES])
def test_tokens_and_pixels_are_those_of_the_processor(embedder: Embedder, folder: str, image: Image.Image) -> None:
    preprocessor = embedder.preprocessor
    expected = by_transformers(folder, [image], asking(IMAGE_PROMPT))
    tokens = preprocessor.images([image.size], [None])
    assert tokens.ids[0].tolist() == expected["input_ids"][0].tolist()
    number = (expected["input_ids"] == preprocessor.config.image_token_id).sum()
    assert preprocessor.num_image_tokens(image.size) == number > 1

    pixels = preprocessor.pixels([image])
    assert pixels.values.dtype == np.uint8
    found = embedder.model.inputs(as_tensors(tokens, "cpu"), as_tensors(pixels, "cpu"))
    tiles = expected["pixel_values"].reshape(found["pixel_values"].shape)
    torch.testing.assert_close(found["pixel_values"], tiles, atol=1e-3, rtol=0)
    for name in ("image_grid_thw", "image_sizes"):
        assert (name in found) == (name in expected)
        assert name not in found or found[name].tolist() == expected[name].tolist()


def test_larger_images_are_made_smaller_as_the_processor_does(folder: str) -> None:
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    if "qwen" not in Path(folder).name:
        with pytest.raises(ValueError, match="max_image_tokens: llava"):
            Preprocessor(folder, max_image_tokens=8)
        return
    limited, whole = Preprocessor(folder, max_image_tokens=8), Preprocessor(folder)
    expected = AutoImageProcessor.from_pretrained(folder, backend="pil", max_pixels=8 * 16 * 16)
    for image in IMAGES:
        grid = expected(images=[image], return_tensors="pt")["image_grid_thw"][0].tolist()
        found = limited.pixels([image])
        assert found.sizes[0].tolist() == grid[1:]
        assert limited.num_image_tokens(image.size) == np.prod(grid) // 4
        assert np.prod(grid) // 4 <= 8 or min(image.size) < 20  # one row of tokens is the least
        unscaled = expected(images=[image], do_rescale=False, do_normalize=False, temporal_patch_size=1)
        assert np.abs(found.values.reshape(len(found.values), -1) - unscaled["pixel_values"]).max() <= 0.5
    assert max(whole.num_image_tokens(image.size) for image in IMAGES) > 8
    with pytest.raises(ValueError, match="max_image_tokens is 1, but the checkpoint's images have at least 4"):
        Preprocessor(folder, max_image_tokens=1)


@pytest.mark.parametrize("size", [(1, 1), (1, 13), (1, 200), (200, 1), (27, 28), (9, 1800), (3400, 17)])
def test_every_image_that_the_scan_accepts_is_taken(embedder: Embedder, size: tuple[int, int]) -> None:
    """The scan's limit of an image's shape is that of the families: no accepted image stops training or a batch."""
    preprocessor = embedder.preprocessor
    assert max(size) <= MAX_RATIO * min(size)
    number = len(preprocessor.image_prompt(size))
    limit = preprocessor.config.get_text_config().max_position_embeddings
    assert 1 < preprocessor.num_image_tokens(size) < number < limit
    values = preprocessor.pixels([Image.new("RGB", size)]).values
    assert values.nbytes < 2**20  # and not the strip that the shorter side's resizing makes of a strip


def test_texts_are_those_of_the_processor(embedder: Embedder, folder: str) -> None:
    expected = by_transformers(folder, [], asking(f"a red circle\n{TEXT_PROMPT}", num_images=0))
    assert embedder.preprocessor.text_prompt("a red circle") == expected["input_ids"][0].tolist()


def test_special_tokens_in_texts_are_text(embedder: Embedder, folder: str) -> None:
    """In captions, queries and conversations; the forward of both losses takes them, whole and with soft prompts."""
    model, preprocessor = embedder.model, embedder.preprocessor
    special = {str(token): i for i, token in preprocessor.tokenizer.added_tokens_decoder.items()}

    def acting(ids: list[int]) -> list[int]:
        return [i for i in ids if i in special.values()]

    text = "a ring" + " ".join(special) + "".join(special)
    assert acting(preprocessor.text_prompt(text)) == acting(preprocessor.text_prompt("a ring"))
    assert acting(preprocessor.tokenizer(text).input_ids) != []  # negative control
    parts = [{"type": "text", "text": text[:40]}, {"type": "image"}, {"type": "text", "text": text[40:]}]
    plain = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    rendered = [preprocessor.render([{"role": "user", "content": one}], SIZES[:1]) for one in (parts, plain)]
    assert acting(rendered[0]) == acting(rendered[1])
    conversation = [{"role": "user", "content": parts}]
    assert "".join(embedder.generate(conversation, IMAGES[:1], max_tokens=2)) is not None

    tokens = preprocessor.images(SIZES, [text] * len(SIZES))
    for row, prompt, length in zip(tokens.ids, tokens.prompt_lengths, tokens.lengths, strict=True):
        assert acting(row[prompt:length].tolist()) == [preprocessor.tokenizer.eos_token_id]
        written = preprocessor.tokenizer.decode(row[prompt : length - 1], clean_up_tokenization_spaces=False)
        assert written == text
    with torch.inference_mode():
        pixels = as_tensors(preprocessor.pixels(IMAGES), "cpu")
        _, loss, _ = model(as_tensors(tokens, "cpu"), pixels, caption_tokens=4)
        assert torch.isfinite(loss)
    assert np.isfinite(embedder.embed_texts([text])).all()

    soft = Preprocessor(folder, soft_prompts=True)
    name = next(iter(soft.tokenizer.added_tokens_encoder.keys() - special.keys()))
    ids = soft.text_prompt(f"a {name}")
    assert [i for i in ids if i in soft.soft_ids["text"]] == soft.soft_ids["text"]
    assert not set(ids) & set(soft.soft_ids["image"])


def test_lora_is_on_all_linear_layers_of_the_language_model_and_on_no_other(embedder: Embedder) -> None:
    base, targets = embedder.model.base, embedder.model.backbone.lora_targets
    found = {name for name, _ in base.named_modules() if re.fullmatch(targets, name)}
    language = "model.language_model."
    assert found == {n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n.startswith(language)}
    assert len(found) == 7 * 3


def cut_off(folder: str, layers: int) -> nn.Module:
    """The model without its later layers, by transformers."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder)
    config.text_config.num_hidden_layers = layers
    return AutoModelForImageTextToText.from_pretrained(folder, config=config).eval()


@pytest.fixture
def fail_if_called() -> Iterator[Any]:
    hooks = []

    def watch(module: nn.Module) -> None:
        def fail(*_: Any) -> None:
            raise AssertionError("computed for nothing")

        hooks.append(module.register_forward_pre_hook(fail))

    yield watch
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("layer", [1, 3])
def test_layer_k_is_the_model_cut_off_after_k_layers(
    embedder: Embedder, folder: str, layer: int, fail_if_called: Any
) -> None:
    whole, short = embedder.model, cut_off(folder, layer)
    preprocessor = embedder.preprocessor
    texts = ["a red circle", "a small blue ring to the left of a large green star"]
    with torch.inference_mode():
        conversations = [by_transformers(folder, [image], asking(IMAGE_PROMPT)) for image in IMAGES]
        conversations += [by_transformers(folder, [], asking(f"{text}\n{TEXT_PROMPT}", num_images=0)) for text in texts]
        last = torch.cat([short.model(**inputs).last_hidden_state[:, -1] for inputs in conversations])
        images = as_tensors(preprocessor.images(SIZES, [None] * len(SIZES)), "cpu")
        pixels = as_tensors(preprocessor.pixels(IMAGES), "cpu")
        several = embed_layers(whole, images, pixels, [1, 2, 3])[layer - 1]
        for module in [whole.base.lm_head, *whole.base.model.language_model.layers[layer:]]:
            fail_if_called(module)
        whole.layer = layer
        found = torch.cat([whole(images, pixels)[0], whole(as_tensors(preprocessor.texts(texts), "cpu"))[0]])
        whole.layer = None
    torch.testing.assert_close(found, normalize(last, dim=-1), atol=2e-6, rtol=0)
    torch.testing.assert_close(several, found[: len(SIZES)], atol=1e-6, rtol=0)
    if layer == 3:
        fast = np.concatenate([embedder.embed_images(IMAGES), embedder.embed_texts(texts)])
        np.testing.assert_allclose(fast, found.numpy(), atol=2e-6)


def test_one_forward_serves_both_losses(embedder: Embedder, folder: str) -> None:
    """The caption loss is transformers' own for the same labels, and the summary token does not see the caption."""
    model, preprocessor = embedder.model, embedder.preprocessor
    worded = [captions(scene, random)[-1] for scene, random in islice(scenes("train"), len(SIZES))]
    with torch.inference_mode():
        pixels = as_tensors(preprocessor.pixels(IMAGES), "cpu")
        alone = model(as_tensors(preprocessor.images(SIZES, [None] * len(SIZES)), "cpu"), pixels)[0]
        tokens = as_tensors(preprocessor.images(SIZES, worded), "cpu")
        labels = caption_labels(tokens)
        beside, loss, _ = model(tokens, pixels, caption_tokens=int((labels >= 0).sum()))
        inputs = model.inputs(tokens, pixels)
        if "position_ids" in inputs:  # as transformers finds them by itself
            inputs["mm_token_type_ids"] = (inputs["input_ids"] == model.base.config.image_token_id).int()
            del inputs["position_ids"]
        expected = model.base(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(beside, alone, atol=2e-6, rtol=0)


@pytest.mark.parametrize("num_images", [0, 2])
def test_generation_is_that_of_transformers(embedder: Embedder, folder: str, num_images: int) -> None:
    messages = asking("What is in it?", num_images)
    list(embedder.generate(asking("Before."), IMAGES[3:], max_tokens=2))  # must leave nothing behind
    inputs = by_transformers(folder, IMAGES[1 : 1 + num_images], messages)
    fresh = cut_off(folder, 3)
    ids = fresh.generate(**inputs, do_sample=False, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
    expected = embedder.preprocessor.tokenizer.decode(ids, skip_special_tokens=True).lstrip()
    found = "".join(embedder.generate(messages, IMAGES[1 : 1 + num_images], max_tokens=8))
    assert found == expected != ""


def test_an_adapter_can_be_saved_turned_off_and_merged(adapter: tuple[str, np.ndarray], embedder: Embedder) -> None:
    path, before = adapter
    trained, merged = load_embedder(path), load_embedder(path, merge=True)
    preprocessor = trained.preprocessor
    with torch.inference_mode():
        plain = embedder.model
        tokens = as_tensors(embedder.preprocessor.images(SIZES, ["two objects."] * len(SIZES)), "cpu")
        pixels = as_tensors(preprocessor.pixels(IMAGES), "cpu")
        expected = plain.base(**plain.inputs(tokens, pixels)).logits
        with trained.model.lvlm.disable_adapter():
            off = trained.model.base(**trained.model.inputs(tokens, pixels)).logits
        tokens = as_tensors(preprocessor.images(SIZES, ["two objects."] * len(SIZES)), "cpu")  # with soft prompts
        on, folded = (m.model.base(**m.model.inputs(tokens, pixels)).logits for m in (trained, merged))
    rows = plain.base.get_input_embeddings().num_embeddings  # a table that had no room for soft prompts has grown
    assert torch.equal(off[..., :rows], expected)
    torch.testing.assert_close(folded, on, atol=1e-5, rtol=1e-5)
    found = trained.embed_images(IMAGES)
    np.testing.assert_array_equal(found, before)
    np.testing.assert_allclose(merged.embed_images(IMAGES), found, atol=1e-5)
    assert abs(found - embedder.embed_images(IMAGES)).max() > 1e-2
    base = merged.model.base
    assert (base.lm_head.weight is base.get_input_embeddings().weight) == base.config.tie_word_embeddings


def test_a_new_adapter_changes_nothing_yet(folder: str, embedder: Embedder) -> None:
    config = ModelConfig(checkpoint=folder, lora_rank=4)
    model = EmbeddingModel(config, Preprocessor(folder, soft_prompts=True)).eval()
    add_adapter(model, config)
    fresh = Embedder(model, config, None, merged=False)
    np.testing.assert_allclose(fresh.embed_texts(["a red circle"]), embedder.embed_texts(["a red circle"]), atol=1e-6)
    np.testing.assert_allclose(fresh.embed_images(IMAGES), embedder.embed_images(IMAGES), atol=1e-6)


def test_activations_computed_again_give_the_same_gradients(folder: str) -> None:
    config = ModelConfig(checkpoint=folder, lora_rank=4)
    model = EmbeddingModel(config, Preprocessor(folder, soft_prompts=True))
    model.requires_grad_(False)
    add_adapter(model, config)
    model.train()
    pixels = as_tensors(model.preprocessor.pixels(IMAGES), "cpu")
    tokens = as_tensors(model.preprocessor.images(SIZES, ["two objects."] * len(SIZES)), "cpu")
    found, calls = [], []
    for layer in model.base.model.language_model.layers:
        layer.input_layernorm.register_forward_hook(lambda *_: calls.append(1))
    for again in (False, True):
        if again:
            checkpoint_activations(model)
        embeddings, loss, _ = model(tokens, pixels, caption_tokens=10)
        (embeddings[:, 0].sum() + loss).backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad(set_to_none=True)
    assert len(calls) == 3 + 2 * 3  # each layer once, then twice
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-5)


def test_bfloat16_is_float32_but_for_its_rounding(folder: str, embedder: Embedder) -> None:
    half = load_embedder(folder, dtype="bfloat16")
    for method, items in (("embed_images", IMAGES), ("embed_texts", ["a red circle", "two blue stars"])):
        found, exact = (getattr(one, method)(items) for one in (half, embedder))
        assert ((found * exact).sum(axis=1) > 0.99).all()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_are_those_of_get_rope_index(family: str, tmp_path: Path) -> None:
    embedder = load_embedder(families.build(family, tmp_path))
    preprocessor, base = embedder.preprocessor, embedder.model.base
    rows = [(preprocessor.render(asking("Which is larger?", 2), SIZES[:2]), []), (preprocessor.text_prompt("x"), [])]
    rows += [(preprocessor.image_prompt(size), [7] * 5) for size in SIZES[2:]]
    tokens = as_tensors(preprocessor.pad(rows), "cpu")
    inputs = embedder.model.inputs(tokens, as_tensors(preprocessor.pixels(IMAGES), "cpu"))
    types = (inputs["input_ids"] == base.config.image_token_id).int()
    expected, _ = base.model.get_rope_index(
        inputs["input_ids"],
        mm_token_type_ids=types,
        image_grid_thw=inputs["image_grid_thw"],
        attention_mask=inputs["attention_mask"],
    )
    real = inputs["attention_mask"].bool()
    assert torch.equal(inputs["position_ids"][:, real], expected[:, real])
    with pytest.raises(ValueError, match="aspect ratio"):
        preprocessor.image_prompt((20_000, 10))
