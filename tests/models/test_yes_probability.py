"""P("yes") of the generator, against one pair at a time by transformers alone; the adapter is off for the question."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch

from vladva.config import ModelConfig
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import render
from vladva.models.adapter import add_adapter, save_adapter
from vladva.models.embedder import Embedder, load_embedder
from vladva.models.embedding_model import EmbeddingModel
from vladva.models.preprocessor import Preprocessor
from vladva.models.yes_probability import QUESTION, answer_tokens, yes_probabilities

IMAGES = [render(scene) for scene, _ in islice(scenes("train"), 4)]
TEXTS = ["a red circle", "a small blue ring to the left of a large green star", "x", "two yellow squares and a star"]


@pytest.fixture(scope="module")
def adapter(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter with random weights."""
    folder = tmp_path_factory.mktemp("adapter")
    config = ModelConfig(checkpoint=tiny, lora_rank=4)
    model = EmbeddingModel(config, Preprocessor(tiny, soft_prompts=True))
    model.lvlm.requires_grad_(False)
    add_adapter(model, config)
    torch.manual_seed(1)
    for name, parameter in model.lvlm.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_adapter(model, config, folder)
    return str(folder)


@pytest.fixture(scope="module")
def embedder(adapter: str) -> Embedder:
    loaded = load_embedder(adapter)
    assert isinstance(loaded, Embedder)
    return loaded


@pytest.fixture(scope="module")
def base(tiny: str) -> Embedder:
    loaded = load_embedder(tiny, adapter=False)
    assert isinstance(loaded, Embedder)
    return loaded


def by_transformers(base: Embedder, image_number: int, text: str) -> float:
    """One pair, unpadded, all logits, every spelling of the answers looked up in the vocabulary."""
    preprocessor, tokenizer = base.preprocessor, base.preprocessor.tokenizer
    image = IMAGES[image_number]
    content = [{"type": "image"}, {"type": "text", "text": QUESTION.format(text=text)}]
    ids = torch.tensor([preprocessor.render([{"role": "user", "content": content}], [image.size])])
    pixels = torch.tensor(preprocessor.pixels([image]).values)
    mean, std = (torch.tensor(of).view(1, 3, 1, 1) for of in preprocessor.pixel_statistics())
    with torch.inference_mode():
        logits = base.model.base(input_ids=ids, pixel_values=(pixels.float() - mean) / std).logits[0, -1]
    chances = logits.double().softmax(0)
    of = {"yes": 0.0, "no": 0.0}
    for token in range(len(tokenizer)):
        word = tokenizer.decode([token]).strip().lower()
        if word in of and tokenizer.decode([token]).strip() in ("yes", "Yes", "no", "No"):
            of[word] += float(chances[token])
    return of["yes"] / (of["yes"] + of["no"])


def test_batches_give_what_transformers_gives_for_each_pair(base: Embedder) -> None:
    pairs = [(i, text) for i in range(4) for text in TEXTS]
    found = yes_probabilities(base, [IMAGES[i] for i, _ in pairs], [text for _, text in pairs], batch_size=5)
    expected = np.array([by_transformers(base, i, text) for i, text in pairs])
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.abs(found - np.roll(expected, 1)).max() > 1e-3  # the negative control: another pair's answer
    assert ((found > 0) & (found < 1)).all()


def test_one_loaded_model_embeds_with_its_adapter_and_is_asked_without(embedder: Embedder, base: Embedder) -> None:
    before = embedder.embed_images(IMAGES)
    asked = yes_probabilities(embedder, IMAGES, TEXTS)
    np.testing.assert_array_equal(embedder.embed_images(IMAGES), before)
    np.testing.assert_allclose(asked, yes_probabilities(base, IMAGES, TEXTS), atol=1e-6)
    assert np.abs(before - base.embed_images(IMAGES)).max() > 1e-2  # the adapter does something, so its being off shows


def test_what_cannot_be_asked_is_refused(adapter: str, embedder: Embedder) -> None:
    merged = load_embedder(adapter, merge=True)
    assert isinstance(merged, Embedder)
    with pytest.raises(ValueError, match="merge=False"):
        yes_probabilities(merged, IMAGES[:1], TEXTS[:1])
    yes, no = (answer_tokens(embedder.preprocessor.tokenizer, answer) for answer in ("yes", "no"))
    assert yes
    assert no
    assert not set(yes) & set(no)


def test_a_text_from_a_user_ends_no_conversation(base: Embedder) -> None:
    """Special tokens in a text are text."""
    special = base.preprocessor.tokenizer.eos_token
    found = yes_probabilities(base, IMAGES[:2], [f"a red {special} circle", "a red circle"])
    assert np.isfinite(found).all()
