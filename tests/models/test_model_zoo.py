"""Every row of the paper's tables is accounted for, and a system's name leads to what is embedded with."""

from __future__ import annotations

import re

import pytest

from vladva.config import IMAGE_PROMPT, TEXT_PROMPT
from vladva.models.model_zoo import E5_V_PROMPTS, SYSTEMS, find, paper_row
from vladva.models.resolve import config_of, find_model
from vladva.recipes import RECIPES
from vladva.report.tables import paper_tables


def test_every_row_of_the_paper_is_run_somehow_or_marked() -> None:
    tables = paper_tables()
    rows = {row["model"] for name in tables if re.match("table[1-5]_", name) for row in tables[name]}
    assert rows == {system.row for system in SYSTEMS if system.row}
    for system in SYSTEMS:
        assert system.name or (system.how == "reported only" and system.note)
        assert bool(system.name) == bool(system.checkpoint)
    names = [system.name for system in SYSTEMS if system.name]
    assert len(set(names)) == len(names)
    assert {system.row for system in SYSTEMS if not system.name} == {
        "BLIP2 (ViT-L)", "CLIP (ViT-B) 15M", "HiDeCLIP (ViT-B)", "FFF (ViT-B)"
    }  # fmt: skip


def test_trained_systems_have_a_recipe_of_the_same_model_and_prompts() -> None:
    for system in SYSTEMS:
        if system.recipe:
            model = RECIPES[system.recipe]().model
            assert (model.checkpoint, (model.image_prompt, model.text_prompt)) == (system.checkpoint, system.prompts)


def test_a_name_leads_to_checkpoint_and_prompts() -> None:
    assert find_model("clip-vit-l").checkpoint == "openai/clip-vit-large-patch14"
    zero_shot = config_of(find_model("llava-1.5-7b"), None, "float32")
    assert (zero_shot.checkpoint, zero_shot.image_prompt, zero_shot.text_prompt, zero_shot.soft_prompts) == (
        "llava-hf/llava-1.5-7b-hf", IMAGE_PROMPT, TEXT_PROMPT, False
    )  # fmt: skip
    e5_v = config_of(find_model("e5-v-zero-shot-llava-1.5-7b"), None, "float32")
    assert (e5_v.image_prompt, e5_v.text_prompt) == E5_V_PROMPTS
    with pytest.raises(ValueError, match=r"has to be trained: jobs/train.py llava_1_5_7b, then jobs/evaluate.py RUN"):
        find("vladva-llava-1.5-7b")


@pytest.mark.parametrize(
    ("description", "row"),
    [
        ({"base_model": "llava-hf/llava-1.5-7b-hf", "adapter": None}, "LLaVA-1.5-7B"),
        ({"base_model": "Qwen/Qwen2-VL-2B-Instruct", "adapter": "x"}, "VladVA (Qwen2-VL-2B)"),
        ({"base_model": "openai/clip-vit-base-patch16", "adapter": None}, "CLIP (ViT-B)"),
        ({"base_model": "Salesforce/blip2-itm-vit-g", "adapter": None}, None),  # another tower than the paper's
        ({"base_model": "tiny", "adapter": "x"}, None),
    ],
)
def test_paper_row_of_a_description(description: dict, row: str | None) -> None:
    prompts = dict(zip(("image_prompt", "text_prompt"), (IMAGE_PROMPT, TEXT_PROMPT), strict=True))
    assert paper_row(description | prompts) == row


def test_e5_v_is_told_from_vladva_by_its_prompts() -> None:
    prompts = dict(zip(("image_prompt", "text_prompt"), E5_V_PROMPTS, strict=True))
    base = {"base_model": "llava-hf/llava-1.5-7b-hf"} | prompts
    assert paper_row(base | {"adapter": "x"}) == "E5-V (LLaVA-1.5-7B)"
    assert paper_row(base | {"adapter": None}) is None


def test_listing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from jobs.evaluate import parse

    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stopped:
        parse(["--systems"])
    assert stopped.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    for system in SYSTEMS:
        assert any(line.split("  ")[0].strip() == (system.row or "-") and system.how in line for line in lines)


def test_untested_systems_say_why() -> None:
    untested = {system.name for system in SYSTEMS if system.untested}
    assert untested == {"negclip", "eva-02-clip-e", "eva-clip-8b", "eva-clip-18b"}
