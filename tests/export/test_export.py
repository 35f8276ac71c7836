"""Exports: other people's software gives the same embeddings from the exported folder."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from itertools import islice, product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from tests.support import families
from vladva.config import LossConfig, ModelConfig
from vladva.export.checkpoint import name_clip_tower_as_published
from vladva.export.pipeline import export_model
from vladva.export.probe import embed_by_transformers, probe_image
from vladva.models.adapter import add_adapter, save_adapter
from vladva.models.backbones import checkpoint_source
from vladva.models.embedder import Embedder, load_lvlm
from vladva.models.embedding_model import EmbeddingModel
from vladva.models.preprocessor import Preprocessor
from vladva.recipes import tiny as tiny_recipe

if TYPE_CHECKING:
    from PIL.Image import Image

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests/support/export_worker.py"
TORCHVISION = ROOT / ".venv/torchvision"
FAMILIES = ("tiny", "qwen2_vl")
EXACT = 1e-4  # largest difference of a coordinate in float32


def make_adapter(checkpoint: str, folder: Path, *, change: float = 0.1) -> str:
    """An adapter whose every weight differs from the initial one: what is forgotten in an export shows."""
    config = ModelConfig(checkpoint=checkpoint, lora_rank=4)
    model = EmbeddingModel(config, Preprocessor(checkpoint, soft_prompts=True))
    add_adapter(model, config)
    torch.manual_seed(0)
    for parameter in model.lvlm.parameters():
        if parameter.requires_grad:
            parameter.data.add_(change * torch.randn_like(parameter))
    folder.mkdir()
    save_adapter(model, config, folder)
    return str(folder)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an adapter on a small model of the family."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = request.param if request.param == "tiny" else families.build(request.param, folder / "base")
    return make_adapter(checkpoint, folder / "adapter")


@pytest.fixture(scope="module")
def embedder(trained: str) -> Embedder:
    return load_lvlm(trained)


@pytest.fixture(scope="module")
def exported(trained: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    return export_model(trained, out).folder


@pytest.fixture(scope="module")
def texts() -> list[str]:
    """Fifty: captions, and what captions seldom hold."""
    from vladva.data.scenes.captions import captions
    from vladva.data.scenes.corpus import scenes

    odd = ["", " spaces around  ", "two\nlines\n", "naïve café, 東京, 🙂", 'quotes " and { braces }', "x" * 200]
    return odd + [captions(scene, random)[0] for scene, random in islice(scenes("test"), 50 - len(odd))]


@pytest.fixture(scope="module")
def images() -> list[Image]:
    """Fifty: scenes, some of them resized to other shapes, grey or with transparency."""
    from vladva.data.scenes.corpus import scenes
    from vladva.data.scenes.scene import render

    drawn = [render(scene) for scene, _ in islice(scenes("test"), 50)]
    drawn[:6] = [image.resize((40 + 20 * i, 100 - 10 * i)) for i, image in enumerate(drawn[:6])]
    return drawn


@pytest.fixture(scope="module")
def by_others(
    exported: Path, texts: list[str], images: list[Image], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, np.ndarray]:
    """What transformers and sentence-transformers make of the folder, in a process without vladva."""
    folder = tmp_path_factory.mktemp("items")
    files = [str(folder / f"{i}.png") for i in range(len(images))]
    for image, file in zip(images, files, strict=True):
        image.save(file)
    (folder / "items.json").write_text(json.dumps({"texts": texts, "images": files}))
    command = [sys.executable, str(WORKER), str(exported), str(folder / "items.json"), str(folder / "out.npz")]
    # Qwen's processors cannot be loaded without torchvision; `make install` puts one where only this test looks.
    environment = {**os.environ, "PYTHONPATH": str(TORCHVISION)}
    subprocess.run(command, env=environment, cwd=folder, check=True)
    return dict(np.load(folder / "out.npz"))


@pytest.mark.slow
@pytest.mark.parametrize("tool", ["transformers", "st"])
def test_other_software_gives_the_same_embeddings(
    tool: str, by_others: dict[str, np.ndarray], embedder: Embedder, texts: list[str], images: list[Image]
) -> None:
    np.testing.assert_allclose(by_others[f"{tool}_texts"], embedder.embed_texts(texts), atol=EXACT)
    np.testing.assert_allclose(by_others[f"{tool}_images"], embedder.embed_images(images), atol=EXACT)


def test_the_exported_template_asks_for_mixed_items_as_we_do(exported: Path, embedder: Embedder) -> None:
    """The card's message: image, instruction and words, each a part of its own."""
    from transformers import AutoTokenizer

    tokenizer, preprocessor = AutoTokenizer.from_pretrained(exported), embedder.preprocessor
    tokenizer.chat_template = (exported / "chat_template.jinja").read_text()
    image = preprocessor.image_token * preprocessor.num_image_tokens((64, 64))
    for words, shown, asked in product((None, "but in blue"), (False, True), (None, "Find it.")):
        if words is None and not shown:
            continue
        parts = [{"type": "image"}] * shown + [{"type": "text", "text": text} for text in (asked, words) if text]
        message = [{"role": "user", "content": parts}]
        text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        bos = tokenizer.bos_token
        ids = tokenizer(
            text.replace(preprocessor.image_token, image), add_special_tokens=bos is None or not text.startswith(bos)
        ).input_ids
        assert ids == preprocessor.item_prompt(words, (64, 64) if shown else None, asked)


def test_the_adapter_matters(exported: Path, embedder: Embedder, texts: list[str]) -> None:
    """Negative control: the base model, zero-shot, is far away from what both sides of the comparisons give."""
    base = load_lvlm(embedder.config.checkpoint)
    assert np.abs(base.embed_texts(texts[6:18]) - embedder.embed_texts(texts[6:18])).max() > 100 * EXACT


def test_a_cut_model_embeds_as_that_layer(trained: str, texts: list[str], images: list[Image], tmp_path: Path) -> None:
    out = export_model(trained, tmp_path / "cut", layer=2).folder
    ours = load_lvlm(trained, layer=2)
    for text in texts[:3]:
        theirs = embed_by_transformers(out, {"type": "text", "text": text})[1]
        np.testing.assert_allclose(theirs, ours.embed_texts([text])[0], atol=EXACT)
    for image in images[:3]:
        theirs = embed_by_transformers(out, {"type": "image", "image": image})[1]
        np.testing.assert_allclose(theirs, ours.embed_images([image])[0], atol=EXACT)
    assert json.loads((out / "config.json").read_text())["text_config"]["num_hidden_layers"] == 2


@pytest.mark.parametrize("family", ["llava", "llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_every_family_can_be_exported(family: str, tmp_path: Path) -> None:
    """Their processors, templates and token tables differ; `export_model` itself compares the probe."""
    trained = make_adapter(families.build(family, tmp_path / "base"), tmp_path / "adapter")
    exported = export_model(trained, tmp_path / "out")
    assert exported.cosine is not None
    assert exported.cosine > 1 - 1e-5


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_the_template_leaves_nothing_to_the_caller(family: str, tmp_path: Path) -> None:
    """vLLM asks for no generation prompt and adds no `<s>`: what it renders has the ids that we embed."""
    from transformers import AutoTokenizer

    base = families.build(family, tmp_path / "base")
    out = export_model(make_adapter(base, tmp_path / "adapter"), tmp_path / "out").folder
    probe = json.loads((out / "vladva_export.json").read_text())["probe"]
    tokenizer = AutoTokenizer.from_pretrained(out)
    message = {"role": "user", "content": [{"type": "text", "text": probe["text"]}]}
    rendered = tokenizer.apply_chat_template([message], tokenize=False)
    assert tokenizer(rendered, add_special_tokens=False).input_ids == probe["text_ids"]
    plain = AutoTokenizer.from_pretrained(base).apply_chat_template([message], tokenize=False)
    assert not plain.startswith("<s>")
    assert not plain.rstrip().endswith(("ASSISTANT:", "assistant"))


def test_a_clip_tower_has_the_names_of_published_checkpoints(tmp_path: Path) -> None:
    """In one file and in several, whose index names them; transformers reads either."""
    from safetensors import safe_open
    from transformers import AutoModel, AutoModelForImageTextToText

    base = AutoModelForImageTextToText.from_pretrained(families.build("llava", tmp_path / "base"), dtype=torch.float32)
    expected = base.model.vision_tower.state_dict()
    for name, size in (("one", "1GB"), ("several", "40KB")):
        base.save_pretrained(tmp_path / name, max_shard_size=size)
        name_clip_tower_as_published(tmp_path / name)
        files = list((tmp_path / name).glob("*.safetensors"))
        assert (len(files) > 1) == (name == "several")
        names: dict[str, str] = {}
        for file in files:
            with safe_open(file, "pt") as weights:
                names |= dict.fromkeys(weights.keys(), file.name)
        assert {key.split("vision_tower.")[1][:13] for key in names if "vision_tower." in key} == {"vision_model."}
        if name == "several":
            assert json.loads((tmp_path / name / "model.safetensors.index.json").read_text())["weight_map"] == names
        again = AutoModel.from_pretrained(tmp_path / name, dtype=torch.float32).vision_tower.state_dict()
        assert again.keys() == expected.keys()
        assert all(torch.equal(again[key], expected[key]) for key in again)


def test_others_may_read_what_was_exported(exported: Path) -> None:
    assert {path.stat().st_mode & 0o777 for path in exported.rglob("*") if path.is_file()} == {0o644}
    assert {path.stat().st_mode & 0o777 for path in (exported, *exported.rglob("*")) if path.is_dir()} == {0o755}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_in_other_precisions(dtype: str, embedder: Embedder, trained: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    exported = export_model(trained, tmp_path / "out", dtype=dtype)
    weights = load_file(exported.folder / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{dtype}"}
    assert exported.cosine is not None
    assert exported.cosine > 0.99


def test_the_adapter_alone_is_the_run_s(trained: str, embedder: Embedder, texts: list[str], tmp_path: Path) -> None:
    out = export_model(trained, tmp_path / "adapter", to="adapter").folder
    again = load_lvlm(str(out))
    assert again.fingerprint == embedder.fingerprint
    np.testing.assert_array_equal(again.embed_texts(texts[:4]), embedder.embed_texts(texts[:4]))


def test_with_the_adapter_off_the_base_model_is_there_bit_for_bit(trained: str, tmp_path: Path) -> None:
    """After a round trip, generation without the adapter has the base model's logits."""
    out = export_model(trained, tmp_path / "adapter", to="adapter").folder
    with_adapter = load_lvlm(str(out))
    base = load_lvlm(with_adapter.config.checkpoint)
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    answers = ["".join(e.generate(question, [probe_image()], max_tokens=8)) for e in (with_adapter, base)]
    assert answers[0] == answers[1]
    with with_adapter.model.lvlm.disable_adapter():
        tensors = with_adapter.model.base.state_dict()
    for name, weight in base.model.base.state_dict().items():
        there = tensors.get(name, tensors.get(name.replace(".weight", ".base_layer.weight")))
        if there is not None and there.shape == weight.shape:
            assert torch.equal(there, weight), name


def test_plain_peft_generates_as_the_base_with_the_adapter_off(trained: str, tmp_path: Path) -> None:
    """The exported adapter in transformers and PEFT alone: off, the base model bit for bit; on, another."""
    from peft import PeftModel
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    out = export_model(trained, tmp_path / "adapter", to="adapter").folder
    source = checkpoint_source(json.loads((out / "vladva.json").read_text())["checkpoint"]).name
    base = AutoModelForImageTextToText.from_pretrained(source).eval()
    question = AutoTokenizer.from_pretrained(source)("What color is the circle?", return_tensors="pt")
    with torch.inference_mode():
        expected = base(**question).logits
        said = base.generate(**question, max_new_tokens=8, do_sample=False)
        both = PeftModel.from_pretrained(base, out).eval()
        assert not torch.equal(both(**question).logits, expected)
        with both.disable_adapter():
            assert torch.equal(both(**question).logits, expected)
            assert torch.equal(both.generate(**question, max_new_tokens=8, do_sample=False), said)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_export_of_a_base_model_is_that_model(family: str, tmp_path: Path) -> None:
    """Without an adapter nothing is merged: every logit of the `hf` folder, head and all, is the base model's."""
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    checkpoint = family if family == "tiny" else families.build(family, tmp_path / "base")
    out = export_model(checkpoint, tmp_path / "out", to="hf").folder
    source = checkpoint_source(checkpoint).name
    question = AutoTokenizer.from_pretrained(source)("What color is the circle?", return_tensors="pt")
    # In the precision of the export: the tiny model's own file is in half of it.
    models = [AutoModelForImageTextToText.from_pretrained(each, dtype=torch.float32).eval() for each in (source, out)]
    with torch.inference_mode():
        logits = [model(**question).logits for model in models]
        said = [model.generate(**question, max_new_tokens=8, do_sample=False) for model in models]
    assert torch.equal(*logits)
    assert torch.equal(*said)


def test_a_merged_export_says_what_the_run_says_with_the_adapter_on(exported: Path, trained: str) -> None:
    """The merged weights are those of the adapter on; the base's answers need the base, or the adapter by itself."""
    from transformers import AutoModelForImageTextToText

    ours = load_lvlm(trained)
    question = ours.preprocessor.tokenizer("What color is the circle?", return_tensors="pt")
    merged = AutoModelForImageTextToText.from_pretrained(exported).eval()
    with torch.inference_mode():
        expected = ours.model.lvlm(**question).logits
        found = merged(**question).logits
        with ours.model.lvlm.disable_adapter():
            off = ours.model.lvlm(**question).logits
    torch.testing.assert_close(found[..., : off.shape[-1]], expected[..., : found.shape[-1]], atol=1e-3, rtol=1e-3)
    assert (found - off).abs().max() > 0.1


def test_an_export_is_a_model_of_our_own_again(
    exported: Path, embedder: Embedder, texts: list[str], images: list[Image]
) -> None:
    """Evaluated, embedded with and served from its folder, with the prompts of `vladva.json`."""
    again = load_lvlm(str(exported))
    assert again.adapter is None
    np.testing.assert_allclose(again.embed_texts(texts[:8]), embedder.embed_texts(texts[:8]), atol=EXACT)
    np.testing.assert_allclose(again.embed_images(images[:8]), embedder.embed_images(images[:8]), atol=EXACT)


def test_a_tokenizer_that_has_changed_is_noticed_when_the_export_is_loaded(exported: Path, tmp_path: Path) -> None:
    folder = tmp_path / "drifted"
    shutil.copytree(exported, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"] = {"type": "Replace", "pattern": {"String": "square"}, "content": "rectangle"}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="probe text has other token ids"):
        load_lvlm(str(folder))


def test_a_model_of_others_is_prompted_by_a_small_file(tmp_path: Path) -> None:
    """As E5-V's: a template of its own, whose answer begins with a space and a newline."""
    base = families.build("llava", tmp_path / "base")
    template = (
        "{% for message in messages %}USER: {% for part in message.content %}{% if part.type == 'image' %}<image>\n"
        "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endfor %}ASSISTANT:{{ ' \\n' }}"
    )
    (tmp_path / "e5-v").mkdir()
    note = {"checkpoint": "../base", "text_prompt": "Summary above sentence in one word: ", "image_prompt": ""}
    (tmp_path / "e5-v/vladva.json").write_text(json.dumps({**note, "chat_template": template}))
    embedder = load_lvlm(str(tmp_path / "e5-v"))
    expected = "USER: a dog\nSummary above sentence in one word: ASSISTANT: \n"
    assert embedder.preprocessor.text_prompt("a dog") == embedder.preprocessor.tokenizer(expected).input_ids
    images = "USER: " + "<image>" * 16 + "\nASSISTANT: \n"
    assert embedder.preprocessor.image_prompt((32, 32)) == embedder.preprocessor.tokenizer(images).input_ids
    plain = load_lvlm(base)
    assert embedder.fingerprint != plain.fingerprint
    (tmp_path / "e5-v/vladva.json").write_text(json.dumps({**note, "prompt": "x"}))
    with pytest.raises(ValueError, match=r"vladva.json: unknown prompt; it needs `checkpoint` and takes layer, image"):
        load_lvlm(str(tmp_path / "e5-v"))


def test_a_probe_with_other_tokens_is_refused(exported: Path, tmp_path: Path) -> None:
    """As after a transformers that reads the tokenizer otherwise: here one that no longer keeps a newline."""
    from vladva.export.probe import check_probe

    folder = tmp_path / "drifted"
    shutil.copytree(exported, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("~ '\\n' ~ prompt", "~ prompt"))
    probe = json.loads((folder / "vladva_export.json").read_text())["probe"]
    with pytest.raises(ValueError, match="probe text has other token ids"):
        check_probe(folder, probe)


def test_nothing_is_written_over_and_nothing_half(trained: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(ValueError, match="exists already"):
        export_model(trained, out)
    with pytest.raises(ValueError, match="no layer 99"):
        export_model(trained, tmp_path / "other", layer=99)
    with pytest.raises(ValueError, match="--dimensions is 8; the run was trained for embeddings cut to: none"):
        export_model(trained, tmp_path / "other", dimensions=8)
    with pytest.raises(ValueError, match="has no adapter"):
        export_model("tiny", tmp_path / "other", to="adapter")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A run as training leaves it, its embeddings trained to be cut to 48 and 96 numbers."""
    from vladva.models import checkpoint

    folder = tmp_path_factory.mktemp("runs")
    adapter = make_adapter("tiny", folder / "adapter")
    config = replace(tiny_recipe(), storage=str(folder), name="run", loss=LossConfig(matryoshka=(48, 96)))
    (folder / "run").mkdir()
    (folder / "run/config.json").write_text(json.dumps(config.to_json()))
    state = {"data_fingerprint": "0123456789abcdef"}
    checkpoint.save(str(folder / "run"), 260, adapter_files=Path(adapter), optimizer={}, state=state)
    return str(folder / "run")


def test_embeddings_cut_to_dimensions(run: str, texts: list[str], tmp_path: Path) -> None:
    """Cut first, then normalised; the numbers are those of sentence-transformers' modules."""
    from sentence_transformers import SentenceTransformer

    out = export_model(run, tmp_path / "out", dimensions=48).folder
    whole = load_lvlm(run).embed_texts(texts[:5])
    cut = whole[:, :48] / np.linalg.norm(whole[:, :48], axis=1, keepdims=True)
    np.testing.assert_allclose(SentenceTransformer(str(out), device="cpu").encode(texts[:5]), cut, atol=EXACT)
    assert json.loads((out / "config.json").read_text())["matryoshka_dimensions"] == [48, 96]
    with pytest.raises(ValueError, match="cut to: 48, 96"):
        export_model(run, tmp_path / "other", dimensions=64)


def test_the_model_card_says_where_the_model_comes_from(run: str, tmp_path: Path) -> None:
    """In the Hub's own reading, with the scores of this model and no other."""
    from huggingface_hub import ModelCard

    fingerprint = load_lvlm(run).fingerprint
    scored = {"fingerprint": fingerprint, "scores": {"scenes": {"T2I R@1": 0.936}}}
    scored["intervals"] = {"scenes": {"T2I R@1": [0.92, 0.95]}}
    scores: Any = {"command": "jobs/evaluate.py run", "created": "2026-11-29T10:00:00", "models": {"run": scored}}
    out = export_model(run, tmp_path / "out", scores=scores, name="shapes").folder
    card = ModelCard.load(out / "README.md")
    assert card.data.license == "apache-2.0"
    assert card.data.library_name == "sentence-transformers"
    for line in (
        "| data fingerprint | 0123456789abcdef |",
        "| step | 260 |",
        f"`{fingerprint}`",
        "| scenes | T2I R@1 | 93.6 | 92.0 to 95.0 |",
        "cut to their first 48, 96 numbers",
    ):
        assert line in card.text, line
    scored["fingerprint"] = "of another"
    with pytest.raises(ValueError, match="no scores of this model"):
        export_model(run, tmp_path / "other", scores=scores)


@pytest.mark.slow
def test_examples_of_the_card_run(run: str, tmp_path: Path) -> None:
    """Every block of Python in it, as a user would copy it beside the folder."""
    export_model(run, tmp_path / "model")
    probe_image().save(tmp_path / "image.png")
    card = (tmp_path / "model/README.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    numbers = []
    for block in blocks:
        done = subprocess.run([sys.executable, "-c", block], cwd=tmp_path, capture_output=True, text=True, check=True)
        numbers.append(float(re.search(r"-?[0-9]+\.[0-9]+", done.stdout)[0]))
    ours = load_lvlm(run)
    [text], [image] = ours.embed_texts(["a red circle left of a blue square"]), ours.embed_images([probe_image()])
    np.testing.assert_allclose(numbers, text @ image, atol=1e-3)  # printed to four places
