"""The front door: what `import vladva` gives, in every form that items come in; README's section runs as it stands."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import vladva
from tests.support.checkpoints import build_blip_2, build_clip
from tests.support.s3_server import BUCKET, s3_server
from vladva.api import InvalidItemsError, Model
from vladva.core import storage
from vladva.core.errors import FingerprintMismatch
from vladva.core.hashing import digest
from vladva.core.images import decode_image, to_upright_rgb
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.index.build import build_index
from vladva.models.batch import as_tensors
from vladva.models.embedder import load_embedder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def model() -> Model:
    return vladva.load("tiny", device="cpu")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8))


def encoded(image: Image.Image, form: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def test_importing_it_loads_no_framework_and_names_are_found_when_used() -> None:
    heavy = ["torch", "ray", "transformers", "peft", "deepspeed", "lance", "numpy", "pyarrow", "PIL"]
    program = (
        "import json, sys, vladva; names = dir(vladva); vladva.RunConfig; vladva.__version__; "
        f"loaded = [m for m in {heavy} if m in sys.modules]; vladva.load; vladva.api; "
        f"print(json.dumps([names, loaded, [m for m in {heavy[:6]} if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", program], text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    names, loaded, with_load = json.loads(done.stdout)
    assert set(vladva.__all__) <= set(names)
    assert loaded == with_load == []
    assert vladva.open_index.__module__ == "vladva.index.vector_index"
    with pytest.raises(AttributeError, match="has no attribute 'lode'; it has RunConfig, __version__, load"):
        vladva.lode  # noqa: B018


def test_every_form_of_an_image_is_embedded_alike(model: Model, photo: Image.Image, tmp_path: Path) -> None:
    data = encoded(photo)
    (tmp_path / "photo.png").write_bytes(data)
    path = tmp_path / "photo.png"
    forms = [photo, data, bytearray(data), path, str(path), path.as_uri(), Image.open(path)]
    forms.append("data:image/png;base64," + base64.b64encode(data).decode())
    found = model.embed_images(forms)
    [expected] = load_embedder("tiny").embed_images([photo])
    assert found.shape == (len(forms), model.dimension)
    np.testing.assert_allclose(found, np.tile(expected, (len(forms), 1)), atol=1e-6)
    assert abs(model.embed_images(photo.rotate(90))[0] - expected).max() > 1e-2  # one image alone, and another one
    assert model.embed_texts("a red circle").shape == (1, model.dimension)


@pytest.mark.slow
def test_an_image_of_an_object_store_is_embedded(
    model: Model, photo: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"s3://{BUCKET}/photo.png"
    with s3_server(tmp_path) as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        storage.write_bytes_atomically(uri, encoded(photo))
        np.testing.assert_allclose(model.embed_images([uri]), model.embed_images([photo]), atol=1e-6)


@pytest.mark.parametrize("mode", ["rotated", "clear", "grey 16", "palette"])
def test_an_opened_image_has_the_pixels_of_its_bytes(photo: Image.Image, mode: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    grey = Image.fromarray((np.arange(48 * 64, dtype=np.uint16) * 20).reshape(48, 64))
    clear = photo.copy()
    clear.putalpha(photo.getchannel("R"))
    data = {
        "rotated": encoded(photo, "JPEG", exif=exif),
        "clear": encoded(clear),
        "grey 16": encoded(grey),
        "palette": encoded(photo.quantize(16), transparency=3),
    }[mode]
    opened, expected = Image.open(io.BytesIO(data)), decode_image(data)
    assert to_upright_rgb(opened).tobytes() == expected.tobytes()
    assert to_upright_rgb(opened).size == expected.size  # loaded by now
    assert Image.open(io.BytesIO(data)).convert("RGB").tobytes() != expected.tobytes()  # what it takes


def test_items_of_both_kinds_come_back_in_order(model: Model, photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    items = ["a red circle", photo, {"text": str(path)}, path, {"image": str(path)}, encoded(photo)]
    found = model.embed(items)
    texts, image = model.embed_texts(["a red circle", str(path)]), model.embed_images(photo)[0]
    expected = np.stack([texts[0], image, texts[1], image, image, image])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    cosines = model.similarity(items, texts)
    np.testing.assert_allclose(cosines, expected @ texts.T, atol=1e-5)
    assert model.embed([]).shape == (0, model.dimension)


def test_one_vector_of_an_image_with_words_and_an_instruction(model: Model, photo: Image.Image, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    wanted = "Find the same thing with this change."
    items = [
        {"image": path, "text": "but in blue"},
        "but in blue",
        {"image": photo, "text": "but in blue", "instruction": wanted},
        {"text": "but in blue", "instruction": wanted},
        photo,
        {"image": encoded(photo), "instruction": wanted},
        {"image": photo, "text": None},
    ]
    found = model.embed(items, batch_size=2)
    assert found.shape == (7, model.dimension)
    np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)
    cosines = found[:6] @ found[:6].T
    assert cosines[~np.eye(6, dtype=bool)].max() < 1 - 1e-4, "image, words and instruction each count"
    # By transformers alone, from the same conversation.
    embedder = model.embedder
    tokens = embedder.preprocessor.pad([(embedder.preprocessor.item_prompt("but in blue", photo.size, wanted), [])])
    pixels = as_tensors(embedder.preprocessor.pixels([photo]), "cpu")
    with torch.inference_mode():
        plain, *_ = embedder.model.eval()(as_tensors(tokens, "cpu"), pixels)
    np.testing.assert_allclose(found[2], plain[0].numpy(), atol=1e-5)
    # Beside them, what is of one kind stays the same to the last bit.
    np.testing.assert_array_equal(found[1], model.embed_texts("but in blue", batch_size=2)[0])
    np.testing.assert_array_equal(found[[4, 6]], model.embed_images([photo, photo], batch_size=2))
    assert [each.index for each in model.rerank(items[0], items, top_k=1)] == [0]


def test_what_a_model_cannot_take_of_an_item_is_named(model: Model, photo: Image.Image, tmp_path: Path) -> None:
    good, long = {"image": photo, "text": "but in blue"}, {"image": photo, "text": "but in blue " * 400}
    with pytest.raises(InvalidItemsError, match=r"items\[1\]: the item takes [\d,]+ tokens.*takes 512") as caught:
        model.embed([good, long, {"image": tmp_path / "gone.png", "text": "x"}])
    assert "missing file" in caught.value.reasons[2]
    np.testing.assert_allclose(caught.value.embeddings[0], model.embed([good])[0], atol=1e-6)
    for item in ({"instruction": "Find it."}, {"image": photo, "instruction": 3}, {"image": photo, "caption": "x"}):
        with pytest.raises(ValueError, match=r"items\[0\] is a mapping with .*may hold both"):
            model.embed([item])
    clip = vladva.load(build_clip(tmp_path / "clip"), device="cpu")
    for item in (good, {"text": "a dog", "instruction": "Find it."}):
        with pytest.raises(ValueError, match=r"items\[1\]: .*dual encoder: it embeds a text or an image, not both"):
            clip.embed(["a dog", item])
        with pytest.raises(ValueError, match=r"b\[0\]: .*dual encoder"):
            clip.similarity(["a dog"], [item])


def test_items_are_ranked_by_cosine(model: Model) -> None:
    texts = ["a large blue square", "a red circle", "a small red circle", "a red circle"]
    found = model.rerank("a red circle", texts)
    assert [each.index for each in found[:2]] == [1, 3]  # equal: in their order
    cosines = (model.embed_texts(["a red circle"]) @ model.embed_texts(texts).T)[0]
    assert [each.score for each in found] == pytest.approx(sorted(cosines, reverse=True), abs=1e-5)
    assert [each.item for each in found] == [texts[each.index] for each in found]
    assert len(model.rerank("a red circle", texts, top_k=2)) == 2
    assert model.rerank("a red circle", []) == []
    with pytest.raises(ValueError, match="top_k is 0"):
        model.rerank("a red circle", texts, top_k=0)


def test_an_index_is_searched_by_its_folder_or_opened(model: Model, tmp_path: Path) -> None:
    texts = ["a large blue square", "a red circle", "two green stars"]
    description = dict(model.description)
    items = {"id": texts, "kind": ["text"] * 3, "content": [digest(text) for text in texts]}
    rows = pa.table({**items, "content": pa.array(items["content"], pa.binary(16))})
    table = TableWriter(str(tmp_path / "table"), description, "three texts")
    write_part(str(tmp_path / "table"), rows, model.embed_texts(texts), description)
    table.commit()
    build_index(str(tmp_path / "table"), str(tmp_path / "index"), kind="text")
    for index in (tmp_path / "index", vladva.open_index(str(tmp_path / "index"))):
        found = model.search(index, "a red circle", k=2)
        assert [hit.id for hit in found] == [texts[each.index] for each in model.rerank("a red circle", texts, top_k=2)]
        assert found[0].score == pytest.approx(1, abs=1e-4)
    assert [hit.id for hit in model.search(tmp_path / "index", texts[1], where="id LIKE '%stars'")] == [texts[2]]
    with pytest.raises(FingerprintMismatch):
        vladva.load("tiny", layer=3, device="cpu").search(tmp_path / "index", "a red circle")


def test_it_answers_with_the_adapter_off_and_streams(model: Model, photo: Image.Image) -> None:
    answer = model.generate("Describe the image briefly.", photo, max_tokens=12)
    assert answer == "".join(model.stream("Describe the image briefly.", [photo], max_tokens=12)) != ""
    content = [{"type": "image"}, {"type": "text", "text": "Describe the image briefly."}]
    assert model.generate([{"role": "user", "content": content}], photo, max_tokens=12) == answer
    with pytest.raises(ValueError, match=r"images\[0\]: missing file"):
        model.generate("What is it?", "/no/such/file.png")
    with pytest.raises(ValueError, match="prompt is a int"):
        model.generate(3)  # type: ignore[arg-type]


def test_what_is_no_item_is_named_with_the_forms_that_are(model: Model, photo: Image.Image) -> None:
    for call, message in (
        (lambda: model.embed_texts(["a", 3]), r"texts\[1\] is a int, not a str"),
        (lambda: model.embed_texts([photo]), r"texts\[0\] is a Image, not a str; embed_images takes images"),
        (lambda: model.embed_images([photo, None]), r"images\[1\] is a NoneType; give a PIL image, an encoded image"),
        (lambda: model.embed_images([np.zeros((4, 4, 3), np.uint8)]), r"images\[0\] is a ndarray; .*Image.fromarray"),
        (lambda: model.embed(["a", ["b"]]), r"items\[1\] is a list; give a text \(str\).*nested"),
        (lambda: model.embed([{"text": 3}]), r"items\[0\] is a mapping with \['text'\]; give a text"),
        (lambda: model.embed("a red circle"), "items is a str; give a list"),
        (lambda: model.embed_texts(["a"], batch_size=0), "batch_size is 0"),
        (lambda: model.similarity(np.zeros((2, 3)), ["a"]), rf"a has the shape \[2, 3\].*\[N, {model.dimension}\]"),
        (lambda: vladva.load("/no/such/model"), "cannot be loaded"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_one_broken_image_does_not_cost_the_others(model: Model, photo: Image.Image, tmp_path: Path) -> None:
    images = [photo, tmp_path / "gone.png", encoded(photo)[:-200], "data:image/png;base64,%%", "http://x.org/a.png"]
    with pytest.raises(InvalidItemsError, match=r"images\[1\]: missing file.*and 3 more") as caught:
        model.embed_images(images)
    assert sorted(caught.value.reasons) == [1, 2, 3, 4]
    assert "corrupt image" in caught.value.reasons[2]
    assert "not valid base64" in caught.value.reasons[3]
    assert "use /path" in caught.value.reasons[4]
    np.testing.assert_allclose(caught.value.embeddings[0], model.embed_images(photo)[0], atol=1e-6)
    assert np.isnan(caught.value.embeddings[1:]).all()


def test_dual_encoders_embed_and_do_not_answer(tmp_path: Path, photo: Image.Image) -> None:
    clip = vladva.load(build_clip(tmp_path / "clip"), device="cpu")
    assert not clip.generates
    assert clip.similarity(["a dog"], [photo]).shape == (1, 1)
    with pytest.raises(ValueError, match="is a dual encoder: it embeds, and generates nothing"):
        clip.generate("What is it?", photo)
    blip_2 = vladva.load(build_blip_2(tmp_path / "blip_2"), device="cpu")
    images, texts = blip_2.embed_images([photo, photo.rotate(90)]), blip_2.embed_texts(["a dog", "a cat"])
    expected = np.einsum("td,iqd->tiq", texts, images).max(axis=2)
    np.testing.assert_allclose(blip_2.similarity(["a dog", "a cat"], [photo, photo.rotate(90)]), expected, atol=1e-5)
    mixed = blip_2.similarity(["a dog", photo], ["a cat"])
    np.testing.assert_allclose(mixed[:, 0], [texts[0] @ texts[1], (images[0] @ texts[1]).max()], atol=1e-5)
    with pytest.raises(ValueError, match="embed them separately"):
        blip_2.embed(["a dog", photo])


@pytest.mark.slow
def test_readmes_section_runs_as_it_stands(tmp_path: Path) -> None:
    readme = (ROOT / "README.md").read_text()
    section = readme.partition("## In Python\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert blocks
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    command = [sys.executable, "-c", "\n".join(blocks)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"print\(.*?#\s*(.+)", "\n".join(blocks))
    assert done.stdout.splitlines() == printed
