"""Checkpoints as the hub has them: at a commit, and in every form that people have saved them in, the same model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support import families
from vladva.models.backbones import checkpoint_source, find_backbone, pinned
from vladva.models.embedder import load_lvlm

ROOT = Path(__file__).parents[2]
TEXTS = ["a red circle", "a small blue ring to the left of a large green star"]
IMAGES = [
    Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, 40, 3), dtype=np.uint8)) for side in (40, 90)
]
ASK = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in it?"}]}]


# --- commits ---------------------------------------------------------------------------------------------------------

COMMITS = {"old": "a" * 40, "new": "b" * 40}
SHOW = """
import json, sys
from dataclasses import replace
from pathlib import Path
from vladva.config import RunConfig
from vladva.core import storage
from vladva.models.backbones import pinned
from vladva.models.embedder import load_embedder
from vladva.models.resolve import describe, find_model, pin
from vladva.recipes import tiny
from vladva.train.run_claim import check_claim, claim_run, pin_base_model

main, storage_uri, commits = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
name = "org/small-llava"
main.write_text(commits["old"])
model = pin(name)
before = load_embedder(model)
run = replace(tiny(), storage=storage_uri, name="run")
run = replace(run, model=replace(run.model, checkpoint=name))
begun = pin_base_model(run)
claim_run(begun)
main.write_text(commits["new"])  # somebody pushes to the hub
vectors = [embedder.embed_texts(["a red circle"])[0].tolist() for embedder in
           (before, load_embedder(model), load_embedder(name), load_embedder(f"{name}@{commits['new']}"))]
again = pin_base_model(run)
check_claim(again, extend=False)
try:
    other = replace(run, model=replace(run.model, checkpoint=f"{name}@{commits['new']}"))
    check_claim(pin_base_model(other), extend=False)
    refused = ""
except ValueError as error:
    refused = str(error)
print(json.dumps({
    "model": model, "vectors": vectors, "description": before.description(),
    "described": describe(model, adapter=True, dtype="float32")[1], "begun": begun.model.checkpoint,
    "again": again.model.checkpoint, "refused": refused, "twice": pin(model),
}))
"""


@pytest.mark.slow
def test_a_job_stays_at_the_commit_that_it_began_with(tmp_path: Path) -> None:
    """Driver and workers load one commit, though the branch moves in between; so do later attempts of a run."""
    repository = tmp_path / "hub/models--org--small-llava"
    for seed, commit in enumerate(COMMITS.values()):
        torch.manual_seed(seed)
        families.build_llava(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    environment = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    environment |= {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    arguments = [str(repository / "refs/main"), str(tmp_path / "runs"), json.dumps(COMMITS)]
    command = [sys.executable, "-c", SHOW, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    at_commit = f"org/small-llava@{COMMITS['old']}"
    assert found["model"] == found["twice"] == found["begun"] == found["again"] == at_commit
    before, pinned_after, moved, named = (np.array(each) for each in found["vectors"])
    np.testing.assert_array_equal(pinned_after, before)
    np.testing.assert_array_equal(moved, named)
    assert abs(moved - before).max() > 1e-2  # what pinning is worth
    description = found["description"]
    assert description == found["described"]
    assert (description["base_model"], description["revision"]) == ("org/small-llava", COMMITS["old"])
    assert f"model.checkpoint was {at_commit}" in found["refused"]


def test_names_and_revisions(tmp_path: Path, tiny: str) -> None:
    assert checkpoint_source("org/name") == ("org/name", None)
    assert checkpoint_source("org/name@v1.0") == ("org/name", "v1.0")
    assert not checkpoint_source("org/name@v1.0").is_pinned
    assert checkpoint_source(f"org/name@{COMMITS['old']}").is_pinned
    (tmp_path / "a@b").mkdir()
    assert checkpoint_source(str(tmp_path / "a@b")) == (str(tmp_path / "a@b"), None)
    for checkpoint in ("tiny", tiny, "open_clip:ViT-B-32:openai", f"org/name@{COMMITS['new']}"):
        assert pinned(checkpoint) == checkpoint


# --- forms -----------------------------------------------------------------------------------------------------------


def edit(folder: Path, file: str, change: Callable[[dict], object]) -> None:
    """Change a JSON file of a checkpoint."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))


def sharded(folder: Path) -> None:
    """Several files and their index, as large checkpoints have."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    files = {f"model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for file, part in files.items():
        save_file({name: weights[name] for name in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    """`pytorch_model.bin`, from before safetensors."""
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def renamed(folder: Path, *replacements: tuple[str, str]) -> None:
    """Weights under other names, by how these begin."""
    weights = load_file(folder / "model.safetensors")
    found = {}
    for name, value in weights.items():
        begins = next((pair for pair in replacements if name.startswith(pair[0])), ("", ""))
        found[begins[1] + name[len(begins[0]) :]] = value
    assert found.keys() != weights.keys()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def named_as_published(folder: Path) -> None:
    """LLaVA's of 2023: CLIP's tower had one more level. (Qwen's are those that transformers saves to this day.)"""
    if "qwen" not in folder.name:
        renamed(folder, ("vision_tower.", "vision_tower.vision_model."))


def named_as_modules(folder: Path) -> None:
    """The names that parameters have in transformers today; what it saves has those of 2024."""
    if "qwen" in folder.name:
        renamed(folder, ("model.", "model.language_model."), ("visual.", "model.visual."))
    else:
        beginnings = [("language_model.lm_head", "lm_head"), ("language_model.model.", "model.language_model.")]
        renamed(folder, *beginnings, ("vision_tower.", "model.vision_tower."), ("multi_modal", "model.multi_modal"))


def old_image_settings(folder: Path) -> None:
    """Sizes as one number, and CLIP's feature extractor; Qwen's limits as pixels."""

    def change(content: dict) -> None:
        if "qwen" in folder.name:
            content["feature_extractor_type"] = content["image_processor_type"]
            return
        content["size"], content["crop_size"] = content["size"]["shortest_edge"], content["crop_size"]["height"]
        content["feature_extractor_type"] = "CLIPFeatureExtractor"
        del content["image_processor_type"]

    edit(folder, "preprocessor_config.json", change)


def images_in_the_processors_file(folder: Path) -> None:
    """`processor_config.json` with the image processor in it, as transformers 5 saves."""
    images = json.loads((folder / "preprocessor_config.json").read_text())
    edit(folder, "processor_config.json", lambda content: content.update(image_processor=images))
    (folder / "preprocessor_config.json").unlink()


FORMS: dict[str, Callable[[Path], object]] = {
    "sharded": sharded,
    "pytorch_model.bin": pickled,
    "names of 2023": named_as_published,
    "names of the modules": named_as_modules,
    "old image settings": old_image_settings,
    "images in the processor's file": images_in_the_processors_file,
    "no processor's file": lambda folder: (folder / "processor_config.json").unlink(),
    "padded on the left": lambda folder: edit(folder, "tokenizer_config.json", lambda c: c.update(padding_side="left")),
    "no generation config": lambda folder: (folder / "generation_config.json").unlink(),
    "with vision_feature fields in the processor": lambda folder: edit(
        folder, "processor_config.json", lambda c: c.update(num_additional_image_tokens=0, patch_size=None)
    ),
}


@pytest.fixture(scope="module", params=["llava", "qwen2_vl"])
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(families.build(request.param, tmp_path_factory.mktemp("original") / request.param))


def shown(folder: Path) -> tuple[np.ndarray, str]:
    """What a checkpoint is known by: embeddings of texts and images of several lengths, and an answer."""
    lvlm = load_lvlm(str(folder))
    vectors = np.concatenate([lvlm.embed_texts(TEXTS), lvlm.embed_images(IMAGES)])
    return vectors, "".join(lvlm.generate(ASK, IMAGES[:1], max_tokens=8))


@pytest.fixture(scope="module")
def expected(original: Path) -> tuple[np.ndarray, str]:
    return shown(original)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_to_the_same_model(
    original: Path, expected: tuple[np.ndarray, str], form: str, tmp_path: Path
) -> None:
    folder = tmp_path / original.name
    shutil.copytree(original, folder)
    FORMS[form](folder)
    vectors, answer = shown(folder)
    np.testing.assert_allclose(vectors, expected[0], atol=1e-6)
    assert answer == expected[1] != ""


def test_float16_loads_to_the_rounded_model(original: Path, expected: tuple[np.ndarray, str], tmp_path: Path) -> None:
    folder = tmp_path / original.name
    shutil.copytree(original, folder)
    weights = load_file(folder / "model.safetensors")
    save_file({n: v.half() for n, v in weights.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    edit(folder, "config.json", lambda content: content.update(torch_dtype="float16"))
    vectors, _ = shown(folder)
    assert {p.dtype for p in load_lvlm(str(folder)).model.parameters()} == {torch.float32}
    np.testing.assert_allclose(vectors, expected[0], atol=0.01)


def test_other_weights_are_another_model(original: Path, expected: tuple[np.ndarray, str], tmp_path: Path) -> None:
    """Negative control: a weight that a form would lose, or mix up, shows."""
    folder = tmp_path / original.name
    shutil.copytree(original, folder)
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "layers.1.mlp.up_proj" in name)
    weights[name] = weights[name].roll(1, 0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert abs(shown(folder)[0] - expected[0]).max() > 1e-3


# --- devices ---------------------------------------------------------------------------------------------------------


def test_weights_go_straight_to_the_device(original: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole model is mapped to the device that it is for: no process holds a copy on the host first."""
    import transformers

    family = find_backbone(original.name)
    on_host = family.load(str(original), torch.float32)
    assert {p.device.type for p in on_host.parameters()} == {"cpu"}
    assert getattr(on_host, "hf_device_map", None) is None  # PEFT would take it for a model that is spread
    asked: list[object] = []
    kind = getattr(transformers, family.model_class)
    monkeypatch.setattr(kind, "from_pretrained", lambda *_, **options: asked.append(options["device_map"]))
    family.load(str(original), torch.float32, "cuda:1")
    assert asked == [{"": "cuda:1"}]
