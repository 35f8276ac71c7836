"""Scores -> tables in the paper's layout.

Our rows come first, with the paper's number and the difference in each cell that has one, then the paper's own rows. A
`ScoreTable` is drawn for the terminal here, and as HTML by `evaluation_page.py`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa

from vladva.benchmarks.benchmark import Benchmark, benchmark_names, find_benchmark
from vladva.evaluate.caption_actor import CAPTION_PROMPTS
from vladva.evaluate.captioning import statistics
from vladva.evaluate.scores import ModelScores, Scores
from vladva.models.model_zoo import SYSTEMS, paper_row

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType

SHORT_HEADINGS = {
    "Object": "obj",
    "Attribute": "att",
    "Relation": "rel",
    "image retrieval": "image",
    "text retrieval": "text",
}


class Column(NamedTuple):
    """Where a column's numbers come from."""

    heading: tuple[str, ...]  # from the widest group down
    benchmark: str
    metric: str
    paper: str | None  # key of the paper's number; None where the paper has none


@dataclass(frozen=True)
class Layout:
    """A table to be: its columns, and the paper's table it is laid out like."""

    title: str
    paper_table: str  # empty where the paper has none
    columns: tuple[Column, ...]
    other_data: str = ""  # what the paper's rows are on where it is not the same: they show the shape of the effect


class Cell(NamedTuple):
    """A score, or a change of one, in percent; the paper's for the same system where there is one."""

    value: float | None
    paper: float | None = None
    interval: tuple[float, float] | None = None  # 95%
    is_change: bool = False
    p: float | None = None  # of a change: the chance of one as large between equal models

    @property
    def text(self) -> str:
        """The value as it is printed."""
        if self.value is None:
            return "\N{EN DASH}"
        if self.is_change:
            return with_sign(self.value)
        return f"{self.value:.2f}" if self.value < 1 else f"{self.value:.1f}"

    def details(self, *, brief: bool = False) -> list[str]:
        """What is printed below it, line by line: interval, p, the paper's number, the difference to that.

        `brief` gives half the width of an interval instead of its ends.
        """
        lines = []
        if self.interval:
            low, high = self.interval
            ends = f"{with_sign(low)} to {with_sign(high)}" if self.is_change else f"{low:.1f}\N{EN DASH}{high:.1f}"
            lines.append(f"\N{PLUS-MINUS SIGN}{(high - low) / 2:.1f}" if brief else ends)
        if self.p is not None:
            lines.append("p < 0.001" if self.p < 0.001 else f"p {self.p:.3f}")
        if self.paper is not None and self.value is not None:
            shown = with_sign(self.paper) if self.is_change else f"{self.paper:.1f}"
            lines += [shown, with_sign(self.value - self.paper)]
        return lines


def with_sign(value: float) -> str:
    """A change: with its sign, and one decimal."""
    return f"{value:+.1f}".replace("-", "\N{MINUS SIGN}")


class Row(NamedTuple):
    """One system."""

    label: str
    cells: tuple[Cell, ...]
    reported: bool  # from the paper, not measured here


@dataclass(frozen=True)
class ScoreTable:
    """A table of one or more benchmarks, rows being systems."""

    title: str
    note: str
    headings: tuple[tuple[str, ...], ...]
    rows: tuple[Row, ...]
    unit: str = "percent"

    @property
    def group_starts(self) -> set[int]:
        """Columns at which a widest group begins."""
        groups = [heading[0] for heading in self.headings]
        return {column for column, group in enumerate(groups) if column == 0 or group != groups[column - 1]}


def layouts() -> tuple[Layout, ...]:
    """All tables, as the benchmarks declare them: those with one title side by side, by their widest headings."""
    benchmarks = {name: find_benchmark(name) for name in benchmark_names()}
    tables: dict[str, list[str]] = {}
    for name in sorted(benchmarks, key=lambda name: (benchmarks[name].table.position, name)):
        tables.setdefault(benchmarks[name].table.title or benchmarks[name].title, []).append(name)
    return tuple(
        Layout(title, table.paper_table, tuple(_columns({name: benchmarks[name] for name in names})), table.other_data)
        for title, names in tables.items()
        for table in [benchmarks[names[0]].table]
    )


def _columns(benchmarks: Mapping[str, Benchmark]) -> list[Column]:
    """The columns of benchmarks that share a table."""
    columns = [
        Column(column.heading, name, column.metric, column.paper)
        for name, benchmark in benchmarks.items()
        for column in benchmark.columns
    ]
    widest = list(dict.fromkeys(column.heading[0] for column in columns))
    return sorted(columns, key=lambda column: widest.index(column.heading[0]))


def paper_tables() -> dict[str, Any]:
    """The paper's tables as data, with their source."""
    return json.loads(resources.files("vladva.report").joinpath("paper_tables.json").read_text(encoding="utf-8"))


def score_tables(scores: Scores) -> list[ScoreTable]:
    """The tables of all benchmarks in `scores` (what `evaluate` returns), columns of other benchmarks left out."""
    tables = []
    for layout in layouts():
        columns = tuple(column for column in layout.columns if column.benchmark in scores["benchmarks"])
        if columns:
            reported = {row["model"]: row for row in paper_tables()[layout.paper_table]} if layout.paper_table else {}
            rows = [_measured(label, model, columns, layout, reported) for label, model in scores["models"].items()]
            rows += [row for name in reported if (row := _reported(name, columns, layout, reported))]
            headings = tuple(column.heading for column in columns)
            note = f"The paper's rows are on {layout.other_data}, other images: compare the changes, not the numbers."
            tables.append(ScoreTable(layout.title, note if layout.other_data else "", headings, tuple(rows)))
    return tables


def _measured(
    label: str, model: ModelScores, columns: tuple[Column, ...], layout: Layout, reported: dict[str, dict]
) -> Row:
    paper = reported.get(paper_row(model["description"]) or "", {}) if not layout.other_data else {}

    def cell(column: Column) -> Cell:
        interval = model.get("intervals", {}).get(column.benchmark, {}).get(column.metric)
        percent = (100 * interval[0], 100 * interval[1]) if interval else None
        return Cell(100 * model["scores"][column.benchmark][column.metric], paper.get(column.paper), percent)

    return Row(label, tuple(map(cell, columns)), reported=False)


def _reported(name: str, columns: tuple[Column, ...], layout: Layout, reported: dict[str, dict]) -> Row | None:
    if layout.other_data and "LLaVA-1.5-7B" not in name:
        return None
    cells = tuple(Cell(reported[name].get(column.paper)) for column in columns)
    return Row(f"{name}, {layout.other_data}" if layout.other_data else name, cells, reported=True)


def systems_table() -> RenderableType:
    """The paper's systems and how each is run, for a terminal."""
    from rich import box
    from rich.table import Table

    drawn = Table("row of the paper", "how", "checkpoint", "note", box=box.SIMPLE_HEAD, pad_edge=False)
    for system in SYSTEMS:
        notes = [f"untested: {system.untested}" if system.untested else "", system.note]
        drawn.add_row(system.row or "-", system.how, system.checkpoint, "; ".join(filter(None, notes)))
    return drawn


class _Terminal:
    """A table as wide as the terminal: cut between its groups of columns where it does not fit."""

    def __init__(self, table: ScoreTable) -> None:
        self.table = table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        num_columns = len(self.table.headings)
        whole = _draw(self.table, range(num_columns))
        # Measured with room to spare: rich never reports a width beyond the one it is given.
        if console.measure(whole, options=options.update(width=1000)).minimum <= options.max_width:
            yield whole
            return
        starts = sorted(self.table.group_starts)
        for first, after in zip(starts, [*starts[1:], num_columns], strict=True):
            yield _draw(self.table, range(first, after))


def as_rich(table: ScoreTable) -> RenderableType:
    """The table for a terminal. Below a score, where there are: its interval, the paper's, ours minus the paper's."""
    return _Terminal(table)


def _draw(table: ScoreTable, columns: range) -> RenderableType:
    from rich import box
    from rich.table import Table

    drawn = Table(title=table.title, caption=table.note or None, box=box.SIMPLE_HEAD, pad_edge=False)
    drawn.title_justify = drawn.caption_justify = "left"
    drawn.add_column(table.unit, min_width=18)  # names may wrap on a narrow terminal, numbers never
    previous: tuple[str, ...] = ()
    for column in columns:
        heading = table.headings[column]
        shown = [
            SHORT_HEADINGS.get(part, part) if heading[: level + 1] != previous[: level + 1] else ""
            for level, part in enumerate(heading)
        ]
        # Given, because rich measures the longest word of a cell: it would cut "p < 0.001" short.
        lines = [*shown, *(line for row in table.rows for line in _lines(row.cells[column]))]
        drawn.add_column("\n".join(shown), justify="right", no_wrap=True, min_width=max(map(len, lines)))
        previous = heading
    ours = [row for row in table.rows if not row.reported]
    for row in table.rows:
        name = f"paper: {row.label}" if row.reported else row.label
        cells = ["\n[not bold]".join(_lines(row.cells[column])) for column in columns]
        drawn.add_row(name, *cells, style="dim" if row.reported else "bold", end_section=row is ours[-1])
    return drawn


def _lines(cell: Cell) -> list[str]:
    return [cell.text, *cell.details(brief=True)]


def statistics_table(captions: pa.Table) -> ScoreTable:
    """Prompts by systems: words, tokens, and the share of the known objects that is named."""
    systems = statistics(captions)
    known = any(of.object_recall is not None for prompts in systems.values() for of in prompts.values())
    columns = ("words", "tokens", "objects named, %") if known else ("words", "tokens")
    rows = []
    for prompt in CAPTION_PROMPTS:
        values = [value for prompts in systems.values() for value in prompts[prompt][: len(columns)]]
        cells = [
            Cell(value if value is None or number % 3 != 2 else 100 * value) for number, value in enumerate(values)
        ]
        rows.append(Row(prompt, tuple(cells), reported=False))
    headings = tuple((system, column) for system in systems for column in columns)
    note = f"Means over {len(set(captions['picture'].to_pylist()))} images."
    return ScoreTable("Captions (figure 1)", note, headings, tuple(rows), unit="prompt")
