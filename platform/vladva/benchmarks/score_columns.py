"""How a benchmark's scores are shown: columns of a table, which it may share with others, and the paper's numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ScoreColumn(NamedTuple):
    """A column of a table of scores."""

    heading: tuple[str, ...]  # from the widest group down
    metric: str
    paper: str | None = None  # key of the paper's number in its table; None where the paper has none


@dataclass(frozen=True)
class TableLayout:
    """The table that a benchmark's columns stand in; benchmarks with the same title share it."""

    title: str = ""  # empty: a table of its own, called as the benchmark
    position: int = 1000  # among all benchmarks, from the top of a page and from left to right
    paper_table: str = ""  # a table of report/paper_tables.json, whose rows are shown below ours
    other_data: str = ""  # what the paper's rows are on where it is not the same: they show the shape of the effect


OWN_TABLE = TableLayout()  # of a benchmark that says nothing
