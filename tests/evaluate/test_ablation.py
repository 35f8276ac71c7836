"""Ablation: what each variant leaves out, and the table over seeds, against hand computation."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vladva.evaluate.ablation import ablation_table, mean_and_deviation, planned_runs, variants
from vladva.recipes import tiny


def test_each_variant_leaves_out_what_its_title_says() -> None:
    parts = {
        title: (c.model.soft_prompts, c.model.lora_rank > 0, c.loss.next_token_weight > 0)
        for title, c in variants(tiny()).items()
    }
    assert parts == {
        "soft prompts only": (True, False, False),
        "LoRA only": (False, True, False),
        "both": (True, True, False),
        "both + next-token": (True, True, True),
    }


def test_nothing_else_differs_and_every_run_has_a_folder_of_its_own() -> None:
    recipe = tiny()
    for _, config in planned_runs(recipe, seeds=3):
        same = replace(config, name=recipe.name, seed=recipe.seed, model=recipe.model, loss=recipe.loss)
        assert same == recipe
        assert replace(config.model, soft_prompts=True, lora_rank=recipe.model.lora_rank) == recipe.model
        assert replace(config.loss, next_token_weight=recipe.loss.next_token_weight) == recipe.loss
    made = [config for _, config in planned_runs(recipe, seeds=3)]
    assert len({config.name for config in made}) == len(made) == 12
    assert sorted({config.seed for config in made}) == [0, 1, 2]


def test_a_recipe_that_lacks_a_part_is_refused() -> None:
    recipe = replace(tiny(), model=replace(tiny().model, soft_prompts=False))
    with pytest.raises(ValueError, match="lacks soft prompts"):
        variants(recipe)


def test_spread_is_mean_and_sample_deviation() -> None:
    assert mean_and_deviation([0.1, 0.2, 0.6]) == (pytest.approx(0.3), pytest.approx((0.14 / 2) ** 0.5))
    assert mean_and_deviation([0.5]) == (0.5, 0.0)


def test_the_table_has_a_row_for_each_variant() -> None:
    from rich.console import Console

    console = Console(width=100, record=True)
    scores = {"zero-shot": {"b/m": [0.002]}, "both": {"b/m": [0.1, 0.2, 0.6]}}
    console.print(ablation_table(scores, {"b/m": "R@1"}))
    lines = console.export_text().splitlines()
    assert any(line.split()[:2] == ["zero-shot", "0.2"] for line in lines)
    assert any(line.split()[:4] == ["both", "30.0", "±", "26.5"] for line in lines)
