"""Scores, curves, images -> one self-contained HTML page.

The page needs no network: styles, figures and images are inside it. It follows the reader's light or dark setting,
fits a phone and prints. Sections without material are left out, so the same page serves one evaluation or a whole run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby

from vladva.core.storage import write_bytes_atomically
from vladva.evaluate.scores import Scores
from vladva.report.comparison_tables import comparison_tables, headlines, layer_tables
from vladva.report.html import Highlight, page_environment
from vladva.report.page_examples import CaptionComparison, Grid, WrongChoice
from vladva.report.svg import bar_chart, line_chart
from vladva.report.tables import ScoreTable, score_tables

CURVES = {  # key in metrics.jsonl -> title
    "loss": "Loss",
    "contrastive_loss": "Contrastive loss",
    "next_token_loss": "Next-token loss",
    "in_batch_accuracy": "In-batch accuracy",
    "effective_negatives": "Effective negatives",
    "temperature": "Temperature",
    "lr": "Learning rate",
    "grad_norm": "Gradient norm",
    "pairs_per_s": "Pairs per second",
}
FEW_HIGHLIGHTS = 6
EXACT = {"temperature", "lr"}  # set by the schedule or learned, not estimated from a batch: nothing to smooth


def write_report(
    uri: str,
    *,
    title: str,
    command: str,
    scores: Scores | None = None,
    metrics: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
    grids: Mapping[str, Sequence[Grid]] | None = None,
    wrong_choices: Mapping[str, Sequence[WrongChoice]] | None = None,
    captions: Sequence[CaptionComparison] = (),
    caption_table: ScoreTable | None = None,
    timings: Mapping[str, float] | None = None,
    highlights: Sequence[Highlight] = (),
    notes: Sequence[str] = (),
) -> None:
    """Write the page to `uri`.

    `command` reproduces what the page shows; `scores` is what `evaluate` returned; `metrics` are the steps of
    `metrics.jsonl` by run; `grids` and `wrong_choices` come from `showcase`, by system; `timings` are seconds by stage;
    `notes` are paragraphs below the title.
    """
    page = (
        page_environment()
        .get_template("report.html.j2")
        .render(
            title=title,
            command=command,
            notes=notes,
            highlights=highlights,
            scores=scores,
            tables=score_tables(scores) if scores else [],
            bars=score_bars(scores) if scores else {},
            comparisons=comparison_tables(scores) if scores else [],
            layers=layer_tables(scores) if scores else [],
            layer_curves=layer_curves(scores) if scores else {},
            curves=training_curves(metrics or {}),
            runs=list(metrics or {}),
            grids=grids or {},
            wrong_choices=wrong_choices or {},
            captions=[(image, list(asked)) for image, asked in groupby(captions, key=lambda compared: compared.image)],
            caption_table=caption_table,
            timings=timings or {},
        )
    )
    write_bytes_atomically(uri, page.encode("utf-8"))


def training_curves(metrics: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, str]:
    """Title -> figure, for every quantity that some run logged at two steps or more."""
    figures = {}
    for key, title in CURVES.items():
        series = {
            run: [(step["step"], step[key]) for step in steps if math.isfinite(step.get(key, math.nan))]
            for run, steps in metrics.items()
        }
        series = {run: line for run, line in series.items() if len(line) > 1}
        if series:
            figures[title] = line_chart(series, label=f"{title} by step", smooth=key not in EXACT)
    return figures


def score_bars(scores: Scores) -> dict[str, str]:
    """Title -> figure, for every benchmark: the scores of all systems side by side, with the chance level."""
    figures = {}
    for name, about in scores["benchmarks"].items():
        metrics = [metric for metric in about["chance"] if not metric.endswith(("_macro", "_micro", "_p1", "_p2"))]
        groups = {
            _metric_title(metric): {label: model["scores"][name][metric] for label, model in scores["models"].items()}
            for metric in metrics
        }
        chance = {_metric_title(metric): about["chance"][metric] for metric in metrics}
        intervals = {
            _metric_title(metric): {
                label: model["intervals"][name][metric] for label, model in scores["models"].items()
            }
            for metric in metrics
            if scores.get("bootstrap")
        }
        label = f"{about['title']}: scores by metric"
        figures[about["title"]] = bar_chart(groups, chance=chance, intervals=intervals, label=label)
    return figures


def layer_curves(scores: Scores) -> dict[str, str]:
    """Title -> figure, for every benchmark's main metrics: percent by layer, a line for each model."""
    models = {label: model["layers"] for label, model in scores["models"].items() if len(model.get("layers", {})) > 1}
    if not models:
        return {}
    figures = {}
    for name, metric, title in headlines(scores):
        series = {
            label: sorted((int(layer), 100 * of["scores"][name][metric]) for layer, of in layers.items())
            for label, layers in models.items()
        }
        figures[title] = line_chart(series, label=f"{title} by layer", smooth=False)
    return figures


def headline_highlights(scores: Scores) -> list[Highlight]:
    """The last model's score in each benchmark's main metrics (of many, the last one), beside the first model's."""
    labels = list(scores["models"])
    first, last = labels[0], labels[-1]
    shown = list(headlines(scores))
    if len(shown) > FEW_HIGHLIGHTS:
        shown = list({name: (name, metric, title) for name, metric, title in shown}.values())
    found = []
    for name, metric, title in shown:
        score = {label: f"{scores['models'][label]['scores'][name][metric]:.1%}" for label in (first, last)}
        found.append(Highlight(title, score[last], last if first == last else f"{last}; {first} {score[first]}"))
    return found


def _metric_title(metric: str) -> str:
    direction, _, cutoff = metric.partition("_r")
    if direction in ("t2i", "i2t") and cutoff.isdigit():
        return f"R@{cutoff}\n{'text to image' if direction == 't2i' else 'image to text'}"
    return metric.replace("_", "\n")
