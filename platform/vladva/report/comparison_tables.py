"""Scores -> tables of changes: from one model to another on the same samples, and from one layer to another (table 6).

Changes are in points of a percent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vladva.benchmarks.benchmark import find_benchmark
from vladva.evaluate.scores import Comparison, ModelScores, Scores
from vladva.models.model_zoo import paper_row
from vladva.report.tables import Cell, Column, Row, ScoreTable, layouts, paper_tables

LAYERS_PAPER = "VladVA (LLaVA-1.5-7B)"  # table 6's system


def comparison_tables(scores: Scores) -> list[ScoreTable]:
    """In the layout of every table: each model's scores minus an earlier model's, with interval and p."""
    tables = []
    for layout in layouts():
        columns = tuple(column for column in layout.columns if column.benchmark in scores["benchmarks"])
        rows = tuple(
            Row(f"{c['model']} \N{MINUS SIGN} {c['against']}", tuple(_change(c, column) for column in columns), False)
            for c in scores.get("comparisons", [])
        )
        if columns and rows:
            headings = tuple(column.heading for column in columns)
            tables.append(ScoreTable(f"{layout.title}, changes", "", headings, rows, unit="points"))
    return tables


def _change(comparison: Comparison, column: Column) -> Cell:
    found = comparison["benchmarks"][column.benchmark][column.metric]
    interval = (100 * found["low"], 100 * found["high"])
    return Cell(100 * found["difference"], interval=interval, is_change=True, p=found["p"])


def layer_tables(scores: Scores) -> list[ScoreTable]:
    """Table 6 for every model that was scored at several layers: changes against the model's own layer."""
    models = {label: model for label, model in scores["models"].items() if len(model.get("layers", {})) > 1}
    return [_layer_table(label, model, scores, is_last=label == list(models)[-1]) for label, model in models.items()]


def _layer_table(label: str, model: ModelScores, scores: Scores, *, is_last: bool) -> ScoreTable:
    own = model["description"]["layer"]
    assert own is not None, "`describe` refuses layers of a dual encoder"
    others = [int(layer) for layer in model["layers"] if int(layer) != own]
    paper = paper_tables()["table6_layers"]
    is_papers = paper_row(model["description"]) == LAYERS_PAPER
    rows = []
    for name, metric, title in headlines(scores):
        values = {int(layer): 100 * of["scores"][name][metric] for layer, of in model["layers"].items()}
        reported = paper.get(find_benchmark(name).paper_layers.get(metric, ""), []) if is_papers else []
        papers = dict(zip(paper["layer"], reported, strict=False))
        cells = [Cell(values[layer] - values[own], papers.get(layer), is_change=True) for layer in others]
        rows.append(Row(title, (Cell(values[own]), *cells), reported=False))
    note = "; ".join(_reported(paper)) if is_last and not is_papers else ""
    headings = (("score at layer", str(own)), *(("change at layer", str(layer)) for layer in others))
    return ScoreTable(f"Layers (table 6): {label}", note, headings, tuple(rows))


def _reported(paper: dict[str, Any]) -> Iterator[str]:
    """The paper's table 6 in words, for models whose layers are others."""
    for name, title in (
        ("flickr30k_text_retrieval_R@1", "The paper's LLaVA-1.5-7B of 32 layers, Flickr30K text retrieval R@1"),
        ("sugarcrepe_average", "SugarCrepe average"),
    ):
        changes = [
            f"{Cell(c, is_change=True).text} at {layer}" for layer, c in zip(paper["layer"], paper[name], strict=True)
        ]
        yield f"{title}: {', '.join(changes[1:])}"


def headlines(scores: Scores) -> Iterator[tuple[str, str, str]]:
    """(benchmark, metric, title) of the metrics that stand for each benchmark."""
    for name, about in scores["benchmarks"].items():
        for metric, title in find_benchmark(name).headlines.items():
            if metric in about["chance"]:
                yield name, metric, f"{about['title']}, {title}"
