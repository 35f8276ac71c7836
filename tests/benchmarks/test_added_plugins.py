"""A new benchmark, and a new source format, are one file each: those of the site's pages, in a copy of the tree."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import vladva
from tests.support.site_pages import file_of_page

SHOW_BENCHMARK = """
import json, sys
import numpy as np
from vladva.benchmarks.benchmark import benchmark_names, find_benchmark
from vladva.report.comparison_tables import comparison_tables, headlines
from vladva.report.tables import score_tables

assert "birds" in benchmark_names()
task = find_benchmark("birds").read(sys.argv[1])
result = task.score(np.eye(2, 3), np.eye(2, 3))  # two captions and two images, each caption its own image's
model = {"scores": {"birds": result.scores}, "description": {"base_model": "x", "adapter": None}}
changes = {metric: {"difference": 0.5, "low": 0.25, "high": 0.75, "p": 0.01} for metric in result.scores}
scores = {
    "benchmarks": {"birds": {"title": "Birds", "chance": task.chance}}, "models": {"ours": model},
    "comparisons": [{"model": "b", "against": "a", "benchmarks": {"birds": changes}}],
}
[table], [change] = score_tables(scores), comparison_tables(scores)
print(json.dumps({
    "title": table.title, "headings": table.headings, "cells": [cell.value for cell in table.rows[0].cells],
    "change": [change.title, change.rows[0].cells[0].value], "headlines": list(headlines(scores)),
}))
"""
SHOW_FORMAT = """
import json, sys
from vladva.data.source import SourceOptions, open_source
from vladva.embed.source_items import source_items
from vladva.prepare.plan import list_source

source = open_source(sys.argv[1], SourceOptions())
items = [item for items in source_items(["text"], source) for item in items]
print(json.dumps({"format": source.format, "found": [list(each)[:2] for each in list_source(source)],
                  "texts": [item["text"] for item in items]}))
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the library, without weights."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "weights")
    shutil.copytree(Path(vladva.__file__).parent, folder / "vladva", ignore=ignored)
    for page, file in (
        ("extend/benchmark.md", "vladva/benchmarks/tasks/birds.py"),
        ("extend/source.md", "vladva/data/formats/lines.py"),
    ):
        (folder / file).write_text(file_of_page(page, f"platform/{file}"))
    return folder


def run(tree: Path, script: str, argument: Path) -> dict:
    command = [sys.executable, "-c", script, str(argument)]
    done = subprocess.run(command, env={"PYTHONPATH": str(tree)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_benchmark_is_one_file_tables_and_comparisons_included(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "birds").mkdir()
    (tmp_path / "birds/birds.csv").write_text("path,caption\na.jpg,a wren\nb.jpg,a swift\n")
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / "birds" / name).write_bytes(b"\xff\xd8\xff")
    found = run(tree, SHOW_BENCHMARK, tmp_path)
    assert found["title"] == "Birds and bees"
    assert found["headings"] == [[f"{way} retrieval", f"R@{k}"] for way in ("image", "text") for k in (1, 5)]
    assert found["cells"] == [100.0] * 4
    assert found["change"] == ["Birds and bees, changes", 50.0]
    assert found["headlines"] == [
        ["birds", "t2i_r1", "Birds, image retrieval R@1"],
        ["birds", "i2t_r1", "Birds, text retrieval R@1"],
    ]


def test_a_source_format_is_one_file_for_every_job(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "x.captions").write_text("a.jpg: a wren\nno colon\n")
    found = run(tree, SHOW_FORMAT, tmp_path)
    assert found["format"] == "lines"
    assert found["found"] == [["a.jpg", "x.captions, line 1"], ["x.captions, line 2", "x.captions, line 2"]]
    assert found["texts"] == ["broken row: no colon", "a wren"]
