"""From files to scores.json: collecting what to embed, the real batch job on the tiny model, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vladva.evaluate import Embeddings, evaluate, items, picture_bytes, read_benchmarks, read_outcomes, text_id
from vladva.score_tables import as_rich, layouts, paper_name, paper_tables, score_tables
from vladva.showcase import grids_of, wrong_choices_of

ROOT = Path(__file__).parents[1]
SCENES = ["scenes_retrieval", "scenes_compositionality"]
KINDS = ("replace_object", "replace_attribute", "replace_relation", "swap_object", "swap_attribute", "add_object")


# Reading and collecting -----------------------------------------------------------------------------------------------


def test_all_means_what_the_folder_holds(scenes: Path, tmp_path: Path) -> None:
    assert sorted(read_benchmarks(["all"], str(scenes))) == sorted(SCENES)
    with pytest.raises(ValueError, match=r"none of coco, flickr30k, .* has its files under"):
        read_benchmarks(["all"], str(tmp_path))
    with pytest.raises(ValueError, match="there is no 'scene'"):
        read_benchmarks(["scene"], str(scenes))


def test_each_text_and_picture_is_collected_once(scenes: Path) -> None:
    tasks = read_benchmarks(SCENES, str(scenes))
    rows = items(tasks.values())
    texts = {text for task in tasks.values() for text in task.texts}
    images = {image.id for task in tasks.values() for image in task.images}
    assert sorted(rows["id"].to_pylist()) == sorted([*map(text_id, texts), *images])
    assert len(images) == 64  # both benchmarks share the pictures
    pictures = rows.filter(pa.compute.equal(rows["kind"], "image"))
    assert all(data.startswith(b"\x89PNG") for data in picture_bytes(pictures.slice(0, 5)))


def table_of(ids: list[str]) -> pa.Table:
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(2 * len(ids), dtype=np.float32)), 2)
    described = {"fingerprint": "f", "dimension": 2}
    return pa.table({"id": ids, "embedding": vectors}).replace_schema_metadata({b"vladva": json.dumps(described)})


def test_embeddings_come_back_in_the_order_asked() -> None:
    embeddings = Embeddings(table_of([text_id("a"), text_id("b"), text_id("c")]), {})
    assert embeddings.of_texts(["c", "a", "c"]).tolist() == [[4, 5], [0, 1], [4, 5]]


def test_what_could_not_be_embedded_is_never_left_out() -> None:
    embeddings = Embeddings(table_of([text_id("a")]), {text_id("b"): "broken"})
    with pytest.raises(ValueError, match=r"1 of 2 items .* first is text/.* \(broken\)"):
        embeddings.of_texts(["a", "b"])


# Tables ---------------------------------------------------------------------------------------------------------------


def scores_of(benchmark: str, metrics: dict[str, float], **description: str | None) -> dict:
    model = {"scores": {benchmark: metrics}, "description": {"base_model": "tiny", "adapter": None} | description}
    return {"benchmarks": {benchmark: {}}, "models": {"ours": model}}


def test_paper_row_of_a_system() -> None:
    assert paper_name({"base_model": "llava-hf/llava-1.5-7b-hf", "adapter": None}) == "LLaVA-1.5-7B"
    assert paper_name({"base_model": "Qwen/Qwen2-VL-2B-Instruct", "adapter": "x"}) == "VladVA (Qwen2-VL-2B)"
    assert paper_name({"base_model": "tiny", "adapter": "x"}) is None


def test_cells_hold_the_papers_number_of_the_same_system() -> None:
    metrics = {f"{way}_r{k}": 0.5 for way in ("t2i", "i2t") for k in (1, 5, 10)}
    scores = scores_of("flickr30k", metrics, base_model="llava-hf/llava-1.5-7b-hf", adapter="x")
    [table] = score_tables(scores)
    assert [heading[0] for heading in table.headings] == ["image retrieval"] * 2 + ["text retrieval"] * 2
    assert [cell.paper for cell in table.rows[0].cells] == [85.0, 98.5, 94.3, 99.9]
    assert [cell.value for cell in table.rows[0].cells] == [50.0] * 4
    assert [row.label for row in table.rows if row.reported] == [
        row["model"] for row in paper_tables()["table1_retrieval"]
    ]


def test_scenes_show_the_papers_rows_but_no_differences() -> None:
    [table] = score_tables(scores_of("scenes_compositionality", dict.fromkeys((*KINDS, "add_attribute"), 0.75)))
    assert all(cell.paper is None for row in table.rows for cell in row.cells)
    assert [row.label for row in table.rows] == [
        "ours",
        "LLaVA-1.5-7B, SugarCrepe",
        "VladVA (LLaVA-1.5-7B), SugarCrepe",
    ]
    assert [cell.value for cell in table.rows[2].cells] == [98.1, 92.1, 86.8, 79.0, 82.9, 95.2, 95.8]
    assert "not the numbers" in table.note


def test_every_column_of_every_table_finds_its_number_in_the_paper() -> None:
    for layout in layouts():
        known = set().union(*paper_tables()[layout.paper_table])
        absent = {column.paper for column in layout.columns} - known
        assert {name for name in absent if not name.endswith("R@5")} == set(), layout.title


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("name", ["scenes_compositionality", "sugar_crepe_pp"])
def test_numbers_are_whole_on_a_narrow_terminal(name: str, width: int) -> None:
    from rich.console import Console

    columns = [column for layout in layouts() for column in layout.columns if column.benchmark == name]
    [table] = score_tables(scores_of(name, {column.metric: 1.0 for column in columns}))
    console = Console(width=width, record=True)
    console.print(as_rich(table))
    text = console.export_text()
    assert text.count("100.0") == len(columns)
    last = [cell.value for cell in table.rows[-1].cells]
    assert all(f"{value:.1f}" in text for value in last)


def test_table_for_the_terminal() -> None:
    from rich.console import Console

    [table] = score_tables(scores_of("winoground", {"image": 0.5, "text": 0.001, "group": 0.25}))
    console = Console(width=80, record=True)
    console.print(as_rich(table))
    lines = console.export_text().splitlines()
    assert next(line.split() for line in lines if "ours" in line) == ["ours", "50.0", "0.10", "25.0"]
    assert sum("paper:" in line for line in lines) == 14


# The whole way -----------------------------------------------------------------------------------------------


def test_evaluation_of_the_tiny_model(ray_cluster: None, scenes: Path, tiny: str, tmp_path: Path) -> None:
    tasks = read_benchmarks(SCENES, str(scenes))
    scores = evaluate({"zero-shot": tiny}, tasks, str(scenes), str(tmp_path), actors=1, command="by hand")
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    model = scores["models"]["zero-shot"]
    assert set(model["scores"]["scenes_retrieval"]) == {f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)}
    assert set(KINDS) < set(model["scores"]["scenes_compositionality"])
    assert model["num_items"] == len(items(tasks.values()))
    assert 0 < model["num_embedded"] <= model["num_items"]
    outcomes = read_outcomes(str(tmp_path), "zero-shot", "scenes_retrieval").to_pylist()
    hits = [row["rank"] == 1 for row in outcomes if row["task"] == "t2i"]
    assert model["tie_rates"]["scenes_retrieval"]["t2i_r1"] == 0
    assert np.mean(hits) == pytest.approx(model["scores"]["scenes_retrieval"]["t2i_r1"])

    # The scores by another route: embed with the Embedder itself, rank by sorting.
    from vladva.benchmarks.readers.images import read_images
    from vladva.embedder import load_embedder
    from vladva.examples import decode_image

    task, embedder = tasks["scenes_retrieval"], load_embedder(tiny)
    images = embedder.embed_images([decode_image(data) for data in read_images(task.images)])
    texts = embedder.embed_texts(list(task.texts))[task.caption_text]
    first = (texts @ images.T).argmax(axis=1)
    assert np.mean(first == task.caption_image) == pytest.approx(
        model["scores"]["scenes_retrieval"]["t2i_r1"], abs=1 / 64
    )

    # Again: nothing is embedded a second time, and the scores are the same.
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "embeddings").rglob("embeddings-*.parquet")}
    again = evaluate({"zero-shot": tiny}, tasks, str(scenes), str(tmp_path), actors=1)
    assert again["models"]["zero-shot"]["scores"] == model["scores"]
    assert again["models"]["zero-shot"]["num_embedded"] == 0
    assert written == {
        path: path.stat().st_mtime_ns for path in (tmp_path / "embeddings").rglob("embeddings-*.parquet")
    }

    grids = grids_of(scores, tasks, str(tmp_path), "zero-shot")
    assert list(grids) == ["Scenes retrieval, zero-shot"]
    assert all(len(row.hits) == 5 for grid in grids["Scenes retrieval, zero-shot"] for row in grid.rows)
    [choices] = wrong_choices_of(scores, tasks, str(tmp_path), "zero-shot").values()
    assert all(choice.negative_score >= choice.caption_score for choice in choices)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--data", "EMPTY"], "has its files under"),
        (["tiny", "--benchmarks", "scenes_retrieval", "--data", "EMPTY"], "no annotations under"),
        (["tiny", "--benchmarks", "imagnet", "--data", "EMPTY"], "there is no 'imagnet'; known are coco"),
        (["EMPTY/nowhere", "--data", "SCENES"], "cannot be loaded"),
    ],
)
def test_user_errors_are_one_line_and_start_no_cluster(
    arguments: list[str],
    message: str,
    scenes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from jobs.evaluate import main

    places = {"EMPTY": str(tmp_path), "SCENES": str(scenes)}
    for name, place in places.items():
        arguments = [argument.replace(name, place) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_labels_of_models() -> None:
    from jobs.evaluate import parse

    models = parse(["tiny", "trained=.vladva/tiny/", "s3://bucket/a=b/run", "llava-hf/llava-1.5-7b-hf"]).models
    assert models == {
        "tiny": "tiny",
        "trained": ".vladva/tiny/",
        "run": "s3://bucket/a=b/run",
        "llava-1.5-7b-hf": "llava-hf/llava-1.5-7b-hf",
    }


def test_help_names_the_arguments() -> None:
    assert os.access(ROOT / "jobs/evaluate.py", os.X_OK)
    command = [sys.executable, str(ROOT / "jobs/evaluate.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0
    for word in ("RUN_OR_MODEL", "--benchmarks", "--data", "--out"):
        assert word in done.stdout
