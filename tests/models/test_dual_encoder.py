"""Dual encoders against transformers' own use of the same checkpoints: its forward of texts and images together."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

from tests.support.checkpoints import build_blip, build_blip_2, build_clip
from vladva.core.hashing import digest
from vladva.embed.actor import EmbeddingActor
from vladva.embed.batching import PreparedBatch
from vladva.embed.table_writer import TableTarget
from vladva.models.dual_encoder_embedder import DualEncoder, describe_dual_encoder
from vladva.models.dual_encoders import clip, dual_encoder_families, find_family, is_dual_encoder
from vladva.models.dual_encoders.blip import clean
from vladva.models.embedder import load_embedder, load_lvlm
from vladva.models.interface import Generates

BUILD = {"clip": build_clip, "blip": build_blip, "blip_2": build_blip_2}
TEXTS = ["a dog, 2 cats", " A Dog! ", "x", "one caption that is much longer than twenty tokens in all"]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {name: build(tmp_path_factory.mktemp(name)) for name, build in BUILD.items()}


def some_images() -> list[Image.Image]:
    """Of different shapes, as images are."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (48, 40), (70, 33)]
    return [Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)) for width, height in sizes]


def theirs(name: str, checkpoint: str, texts: list[str]) -> np.ndarray:
    """Cosines [texts, images] from the class's own forward, fed by the checkpoint's tokenizer and image processor."""
    from transformers import (
        AutoImageProcessor,
        AutoTokenizer,
        Blip2ForImageTextRetrieval,
        BlipForImageTextRetrieval,
        CLIPModel,
    )

    tokenizer, processor = AutoTokenizer.from_pretrained(checkpoint), AutoImageProcessor.from_pretrained(checkpoint)
    pixels = {"pixel_values": processor(images=some_images(), return_tensors="pt")["pixel_values"]}
    length = 20 if name == "clip" else 35
    words = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    inputs: dict[str, Any] = {key: words[key] for key in ("input_ids", "attention_mask")} | pixels
    with torch.inference_mode():
        if name == "clip":
            model = CLIPModel.from_pretrained(checkpoint).eval()
            return (model(**inputs).logits_per_text / model.logit_scale.exp()).numpy()
        if name == "blip":
            model = BlipForImageTextRetrieval.from_pretrained(checkpoint).eval()
            return model(**inputs, use_itm_head=False).itm_score.T.numpy()
        return Blip2ForImageTextRetrieval.from_pretrained(checkpoint).eval()(**inputs).logits_per_text.numpy()


@pytest.mark.parametrize("name", BUILD)
def test_cosines_are_those_of_transformers(name: str, checkpoints: dict[str, str]) -> None:
    embedder = load_embedder(checkpoints[name])
    assert isinstance(embedder, DualEncoder)
    texts, images = embedder.embed_texts(TEXTS, batch_size=3), embedder.embed_images(some_images(), batch_size=2)
    assert texts.shape == (4, 24)
    assert images.shape == ((3, 4, 24) if name == "blip_2" else (3, 24))
    assert np.allclose(np.linalg.norm(images, axis=-1), 1, atol=1e-6)
    cosines = np.einsum("td,ipd->tip", texts, images.reshape(3, -1, 24)).max(axis=2)
    read = [clean(text, 30) for text in TEXTS] if name != "clip" else TEXTS
    expected = theirs(name, checkpoints[name], read)
    assert np.abs(cosines - expected).max() < 1e-4  # pixels are rounded to whole numbers on the way
    assert np.abs(cosines - expected[::-1]).max() > 1e-2  # negative control
    assert texts[0] @ texts[1] < 0.9999  # another text, another vector


def test_an_image_of_blip_2_is_as_near_as_its_nearest_query_token(checkpoints: dict[str, str]) -> None:
    """Negative control of the comparison above: any one token, as in SugarCrepe++'s script, is another score."""
    embedder = DualEncoder(checkpoints["blip_2"])
    texts, images = embedder.embed_texts(TEXTS), embedder.embed_images(some_images())
    expected = theirs("blip_2", checkpoints["blip_2"], [clean(text, 50) for text in TEXTS])
    assert np.abs(texts @ images[:, 1].T - expected).max() > 1e-2


@pytest.mark.parametrize("name", BUILD)
def test_the_batch_job_embeds_as_the_embedder(name: str, checkpoints: dict[str, str], tmp_path: Path) -> None:
    """What the job's actor does with a batch of texts and one of images, item by item too."""
    description = describe_dual_encoder(checkpoints[name], "float32")
    encoder = EmbeddingActor({"model": checkpoints[name]}, TableTarget(str(tmp_path), description))
    preprocessor, embedder = encoder.embedder.preprocessor, encoder.embedder
    names = ["a", "b", "c", "d"]
    items = pa.table({"id": names, "kind": ["text"] * 4, "content": [digest(each) for each in names]})
    prompts = [preprocessor.text_prompt(text) for text in TEXTS]
    images = [preprocessor.pixels([image]) for image in some_images()]
    texts, vectors = embedder.embed_texts(TEXTS), embedder.embed_images(some_images()).reshape(3, -1)
    assert np.allclose(encoder.forward(prompts, None), texts, atol=1e-6)
    assert np.allclose(encoder.forward([[]] * 3, images), vectors, atol=1e-6)
    rows, reasons = encoder.one_by_one(PreparedBatch(items.slice(0, 3), [[]] * 3, images))
    assert np.allclose(rows, vectors, atol=1e-6)
    assert reasons == [None] * 3
    assert np.allclose(encoder.one_by_one(PreparedBatch(items, prompts, None))[0], texts, atol=1e-6)


def test_blip_reads_a_cleaned_caption() -> None:
    assert clean(' A "Dog" (two*), and #1;  a cat... ~ now!\n', 30) == "a dog two , and 1 a cat now"
    assert len(clean("word " * 40, 30).split()) == 30
    assert len(clean("word " * 60, 50).split()) == 50


def test_descriptions_know_models_apart(checkpoints: dict[str, str], tmp_path: Path, tiny: str) -> None:
    described = {name: describe_dual_encoder(path, "float32") for name, path in checkpoints.items()}
    for name, path in checkpoints.items():
        assert described[name] == DualEncoder(path).description()
    assert len({each["fingerprint"] for each in described.values()}) == 3
    assert [described[name]["vectors_per_image"] for name in BUILD] == [1, 1, 4]
    again = build_clip(tmp_path)
    assert describe_dual_encoder(again, "float32")["fingerprint"] == described["clip"]["fingerprint"]
    settings = tmp_path / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.48", "0.5"))
    assert describe_dual_encoder(again, "float32")["fingerprint"] != described["clip"]["fingerprint"]
    assert not is_dual_encoder(tiny)
    assert not is_dual_encoder("/no/such/model")


def test_a_fingerprint_follows_the_version_of_the_family_and_not_its_source(
    checkpoints: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = describe_dual_encoder(checkpoints["clip"], "float32")["fingerprint"]
    source = Path(clip.__file__).read_text()
    reworded = ModuleType("clip")
    exec(source.replace("One vector an image", "An image has one vector"), vars(reworded))  # another comment
    monkeypatch.setattr(clip, "FAMILY", reworded.FAMILY)
    assert describe_dual_encoder(checkpoints["clip"], "float32")["fingerprint"] == before
    monkeypatch.setattr(clip, "FAMILY", replace(clip.FAMILY, version=clip.FAMILY.version + 1))
    assert describe_dual_encoder(checkpoints["clip"], "float32")["fingerprint"] != before
    assert all(find_family(name).version >= 1 for name in dual_encoder_families())


def test_a_dual_encoder_embeds_and_does_not_generate(checkpoints: dict[str, str], tiny: str) -> None:
    embedder = load_embedder(checkpoints["clip"])
    assert not isinstance(embedder, Generates)
    assert isinstance(load_embedder(tiny), Generates)
    with pytest.raises(ValueError, match="is a dual encoder: it embeds, and generates nothing"):
        load_lvlm(checkpoints["clip"])
    assert embedder.count_text_tokens(TEXTS) == [len(embedder.preprocessor.text_prompt(text)) for text in TEXTS]
    vision = embedder.preprocessor.config.vision_config
    patches = (vision.image_size // vision.patch_size) ** 2
    positions = embedder.model.towers.vision_model.embeddings.num_positions
    assert embedder.num_image_tokens(640, 480) == patches + 1 == positions


def test_open_clip_says_what_it_needs() -> None:
    with pytest.raises(ValueError, match=r"pip install 'vladva\[open_clip\]'"):
        load_embedder("open_clip:ViT-B-32:openai")
    with pytest.raises(ValueError, match="not of the form open_clip:MODEL:WEIGHTS"):
        load_embedder("open_clip:ViT-B-32")
