"""Ablation: what each part of the method adds. The same recipe with parts left out, several seeds each.

    zero-shot             the base model, hand-written prompts
    soft prompts only     no LoRA, contrastive loss only
    LoRA only             hand-written prompts, contrastive loss only
    both                  contrastive loss only
    both + next-token     the recipe as it is

A run that is complete is not trained again, and what is embedded is not embedded again: an ablation that was cut short
goes on when the same command is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from vladva.config import RunConfig

if TYPE_CHECKING:
    from rich.table import Table

ZERO_SHOT = "zero-shot"


def variants(recipe: RunConfig) -> dict[str, RunConfig]:
    """The recipe with parts left out, by title. Raises ValueError where the recipe itself lacks one."""
    model, loss = recipe.model, recipe.loss
    if not (model.soft_prompts and model.lora_rank and loss.next_token_weight):
        raise ValueError(
            f"the recipe {recipe.name} lacks soft prompts, LoRA or the caption loss: an ablation takes one with all"
        )
    contrastive_only = replace(loss, next_token_weight=0.0)
    return {
        "soft prompts only": replace(recipe, model=replace(model, lora_rank=0), loss=contrastive_only),
        "LoRA only": replace(recipe, model=replace(model, soft_prompts=False), loss=contrastive_only),
        "both": replace(recipe, loss=contrastive_only),
        "both + next-token": recipe,
    }


def planned_runs(recipe: RunConfig, seeds: int) -> Iterator[tuple[str, RunConfig]]:
    """(title of the variant, configuration with a name and a seed of its own)."""
    for title, variant in variants(recipe).items():
        for seed in range(seeds):
            words = title.replace(" + ", "-").replace(" ", "-").lower()
            yield title, replace(variant, name=f"{recipe.name}-{words}-seed{seed}", seed=seed)


def ablate(
    recipe: RunConfig,
    benchmarks: Sequence[str],
    data_uri: str,
    out_uri: str,
    *,
    seeds: int,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train and score every variant with every seed; needs a Ray cluster. `tell` gets a line for each run.

    Returns {"scores": {variant: {"benchmark/metric": [one fraction a seed]}}, "steps", "seeds"}.
    """
    from vladva.evaluate.scoring import evaluate, read_benchmarks
    from vladva.train.launch import train

    tasks = read_benchmarks(benchmarks, data_uri)
    models, titles = {ZERO_SHOT: recipe.model.checkpoint}, {ZERO_SHOT: ZERO_SHOT}
    for title, config in planned_runs(recipe, seeds):
        tell(f"{title}, seed {config.seed}: {config.uri}")
        train(config, tell=tell)
        models[config.name], titles[config.name] = config.uri, title
    evaluated = evaluate(models, tasks, data_uri, out_uri)["models"]
    scores: dict[str, dict[str, list[float]]] = {}
    for label, title in titles.items():
        for benchmark, metrics in evaluated[label]["scores"].items():
            for metric, value in metrics.items():
                scores.setdefault(title, {}).setdefault(f"{benchmark}/{metric}", []).append(value)
    return {"scores": scores, "steps": recipe.train.steps, "seeds": seeds}


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation (of a sample; 0 for a single value)."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def ablation_table(scores: Mapping[str, Mapping[str, Sequence[float]]], columns: Mapping[str, str]) -> Table:
    """Percent, mean and standard deviation over the seeds; `columns` maps "benchmark/metric" to a heading."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("percent, mean and deviation over seeds", min_width=18)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    for title, metrics in scores.items():
        cells = []
        for name in columns:
            average, deviation = mean_and_deviation(metrics[name])
            several = len(metrics[name]) > 1
            cells.append(f"{100 * average:.1f}" + (f" ± {100 * deviation:.1f}" if several else ""))
        table.add_row(title, *cells)
    return table
