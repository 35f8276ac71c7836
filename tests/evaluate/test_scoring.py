"""From files to scores.json: collecting what to embed, the real batch job on the tiny model, and the command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from vladva.evaluate.benchmark_embeddings import Embeddings, items, read_image_bytes, text_id
from vladva.evaluate.scoring import evaluate, read_benchmarks, read_outcomes
from vladva.report.comparison_tables import comparison_tables, layer_tables
from vladva.report.page_examples import grids_of, wrong_choices_of
from vladva.report.tables import ScoreTable, as_rich, layouts, paper_tables, score_tables

ROOT = Path(__file__).parents[2]
SCENES = ["scenes_retrieval", "scenes_compositionality"]
KINDS = ("replace_object", "replace_attribute", "replace_relation", "swap_object", "swap_attribute", "add_object")


# Reading and collecting -----------------------------------------------------------------------------------------------


def test_all_means_what_the_folder_holds(scenes: Path, tmp_path: Path) -> None:
    assert sorted(read_benchmarks(["all"], str(scenes))) == sorted(SCENES)
    with pytest.raises(ValueError, match=r"none of coco, flickr30k, .* has its files under"):
        read_benchmarks(["all"], str(tmp_path))
    with pytest.raises(ValueError, match="there is no 'scene'"):
        read_benchmarks(["scene"], str(scenes))


def test_captions_are_capped_on_request(scenes: Path) -> None:
    [(name, task)] = read_benchmarks(["scenes_retrieval:5"], str(scenes)).items()
    assert name == "scenes_retrieval"
    assert task.counts["max_captions_per_image"] == 5
    for wrong in ("scenes_retrieval:x", "winoground:5"):
        with pytest.raises(ValueError, match=f"{wrong!r} is not a retrieval benchmark with a number of captions"):
            read_benchmarks([wrong], str(scenes))


def test_each_text_and_image_is_collected_once(scenes: Path) -> None:
    tasks = read_benchmarks(SCENES, str(scenes))
    rows = items(tasks.values())
    texts = {text for task in tasks.values() for text in task.texts}
    images = {image.id for task in tasks.values() for image in task.images}
    assert sorted(rows["id"].to_pylist()) == sorted([*map(text_id, texts), *images])
    assert len(images) == 64  # both benchmarks share the images
    pictures = rows.filter(pa.compute.equal(rows["kind"], "image"))
    assert all(data.startswith(b"\x89PNG") for data in read_image_bytes(pictures.slice(0, 5)))


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
    for layout in (layout for layout in layouts() if layout.paper_table):
        known = set().union(*paper_tables()[layout.paper_table])
        absent = {column.paper for column in layout.columns} - known
        assert {name for name in absent if not name.endswith("R@5")} == set(), layout.title


def printed(table: ScoreTable, width: int) -> str:
    from rich.console import Console

    console = Console(width=width, record=True)
    console.print(as_rich(table))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 200])
@pytest.mark.parametrize("name", ["scenes_compositionality", "sugar_crepe_pp"])
def test_numbers_are_whole_on_a_narrow_terminal(name: str, width: int) -> None:
    columns = [column for layout in layouts() for column in layout.columns if column.benchmark == name]
    [table] = score_tables(scores_of(name, {column.metric: 1.0 for column in columns}))
    text = printed(table, width)
    assert text.count("100.0") == len(columns)
    last = [cell.value for cell in table.rows[-1].cells]
    assert all(f"{value:.1f}" in text for value in last)


def layered(base: str, layers: list[int]) -> dict:
    """Scores of a model at several layers, 80% less 1% for each layer below the last."""
    scores = scores_of("flickr30k", {"t2i_r1": 0.8, "i2t_r1": 0.8}, base_model=base, adapter="x", layer=layers[0])
    scores["benchmarks"]["flickr30k"] = {"title": "Flickr30K", "chance": {"t2i_r1": 0.1, "i2t_r1": 0.1}}
    scores["models"]["ours"]["layers"] = {
        str(layer): {"scores": {"flickr30k": dict.fromkeys(("t2i_r1", "i2t_r1"), 0.8 - 0.01 * (layers[0] - layer))}}
        for layer in layers
    }
    return scores


def test_layers_are_laid_out_like_table_6() -> None:
    [table] = layer_tables(layered("llava-hf/llava-1.5-7b-hf", [32, 31, 28, 24, 20, 16]))
    assert [heading[1] for heading in table.headings] == ["32", "31", "28", "24", "20", "16"]
    image, text = table.rows
    assert [round(cell.value, 6) for cell in text.cells] == [80, -1, -4, -8, -12, -16]
    assert [cell.paper for cell in text.cells] == [None, 0.3, -0.2, -1.1, -13.5, -59.0]
    assert [cell.paper for cell in image.cells] == [None] * 6  # table 6 has text retrieval only
    assert text.cells[5].text == "\N{MINUS SIGN}16.0"
    assert text.cells[5].details() == ["\N{MINUS SIGN}59.0", "+43.0"]
    [other] = layer_tables(layered("tiny", [6, 4]))
    assert all(cell.paper is None for row in other.rows for cell in row.cells)
    assert "+0.3 at 31" in other.note
    assert layer_tables(scores_of("flickr30k", {"t2i_r1": 0.8})) == []


def test_changes_come_with_interval_and_p() -> None:
    metrics = {f"{way}_r{k}": 0.5 for way in ("t2i", "i2t") for k in (1, 5, 10)}
    scores = scores_of("flickr30k", metrics)
    change = {"difference": 0.031, "low": -0.002, "high": 0.0641, "p": 0.0004}
    scores["comparisons"] = [
        {"model": "b", "against": "a", "benchmarks": {"flickr30k": dict.fromkeys(metrics, change)}}
    ]
    [table] = comparison_tables(scores)
    [row] = table.rows
    assert row.label == "b \N{MINUS SIGN} a"
    assert row.cells[0].text == "+3.1"
    assert row.cells[0].details() == ["\N{MINUS SIGN}0.2 to +6.4", "p < 0.001"]
    assert comparison_tables(scores_of("flickr30k", metrics)) == []
    text = printed(table, 60)
    assert text.count("p < 0.001") == text.count("\N{PLUS-MINUS SIGN}3.3") == text.count("+3.1") == 4
    assert "b \N{MINUS SIGN} a" in text
    assert "\N{HORIZONTAL ELLIPSIS}" not in text


def test_table_for_the_terminal() -> None:
    [table] = score_tables(scores_of("winoground", {"image": 0.5, "text": 0.001, "group": 0.25}))
    lines = printed(table, 80).splitlines()
    assert next(line.split() for line in lines if "ours" in line) == ["ours", "50.0", "0.10", "25.0"]
    assert sum("paper:" in line for line in lines) == 14


# The whole way -----------------------------------------------------------------------------------------------


def test_evaluation_of_the_tiny_model(ray_cluster: None, scenes: Path, tiny: str, tmp_path: Path) -> None:
    from vladva.models.embedder import load_embedder

    tasks = read_benchmarks(SCENES, str(scenes))
    out = {"data_uri": str(scenes), "out_uri": str(tmp_path), "actors": 1}
    with pytest.raises(ValueError, match="nowhere"):  # stops before the second model, after the first
        evaluate({"zero-shot": tiny, "other": f"{tmp_path}/nowhere"}, tasks, layers=[4], **out)
    assert not (tmp_path / "scores.json").exists()
    models = {"zero-shot": tiny, "twin": tiny}
    scores = evaluate(models, tasks, layers=[6, 4], bootstrap=50, command="by hand", **out)
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    model = scores["models"]["zero-shot"]
    assert model["num_embedded"] == 0  # it goes on where it was stopped
    assert set(model["scores"]["scenes_retrieval"]) == {f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)}
    assert set(KINDS) < set(model["scores"]["scenes_compositionality"])
    assert model["num_items"] == len(items(tasks.values()))
    check_intervals(scores)
    check_layers(scores, tasks, tmp_path, tiny)
    outcomes = read_outcomes(str(tmp_path), "zero-shot", "scenes_retrieval").to_pylist()
    hits = [row["rank"] == 1 for row in outcomes if row["task"] == "t2i"]
    assert model["tie_rates"]["scenes_retrieval"]["t2i_r1"] == 0
    assert np.mean(hits) == pytest.approx(model["scores"]["scenes_retrieval"]["t2i_r1"])

    # The scores by another route: embed with the Embedder itself, rank by sorting.
    from vladva.core.images import decode_image
    from vladva.data.image_refs import read_images

    task, embedder = tasks["scenes_retrieval"], load_embedder(tiny)
    images = embedder.embed_images([decode_image(data) for data in read_images(task.images)])
    texts = embedder.embed_texts(list(task.texts))[task.caption_text]
    first = (texts @ images.T).argmax(axis=1)
    assert np.mean(first == task.caption_image) == pytest.approx(
        model["scores"]["scenes_retrieval"]["t2i_r1"], abs=1 / 64
    )

    # Again: nothing is embedded a second time, and the scores are the same.
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "embeddings").rglob("embeddings-*.parquet")}
    again = evaluate({"zero-shot": tiny}, tasks, **out)
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


def test_the_job_prints_the_tables_and_leaves_the_page(
    ray_cluster: None, scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from jobs.evaluate import main

    options = ["--benchmarks", "scenes_retrieval", "--data", str(scenes), "--out", str(tmp_path), "--actors", "1"]
    asked = ["--layers", "4", "--bootstrap", "20", "--captions", "1"]
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", "one=tiny", "two=tiny", *options, *asked])
    main()
    printed, page = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    for title in ("Scenes: retrieval", "Scenes: retrieval, changes", "Layers (table 6): two", "Captions (figure 1)"):
        assert title in printed
        assert title in page
    assert "--bootstrap 20 --captions 1" in page
    assert len(json.loads((tmp_path / "captions.json").read_text())["systems"]["one"]) == 4


def check_intervals(scores: dict) -> None:
    """Around every score, and none of a model's twin differs."""
    for model in scores["models"].values():
        for name, metrics in model["scores"].items():
            for metric, score in metrics.items():
                low, high = model["intervals"][name][metric]
                assert low - 0.05 <= score <= high + 0.05, metric
    [comparison] = scores["comparisons"]
    assert (comparison["model"], comparison["against"]) == ("twin", "zero-shot")
    for metrics in comparison["benchmarks"].values():
        assert all(found == {"difference": 0, "low": 0, "high": 0, "p": 1} for found in metrics.values())


def check_layers(scores: dict, tasks: dict, out: Path, tiny: str) -> None:
    """A table for each layer, that of the model cut off there, under the name a plain run would give it."""
    from vladva.embed.table import read_embeddings
    from vladva.models.embedder import load_embedder

    layers = scores["models"]["zero-shot"]["layers"]
    assert list(layers) == ["6", "4"]
    assert layers["6"]["scores"] == scores["models"]["zero-shot"]["scores"]
    assert layers["4"]["scores"] != layers["6"]["scores"]
    short = load_embedder(tiny, layer=4)
    assert layers["4"]["fingerprint"] == short.fingerprint
    found = Embeddings(read_embeddings(str(out / "embeddings" / f"{short.fingerprint}-float32")), {})
    texts = list(tasks["scenes_retrieval"].texts[:8])
    np.testing.assert_allclose(found.of_texts(texts), short.embed_texts(texts), atol=2e-6)
    assert len(read_outcomes(str(out), "zero-shot, layer 4", "scenes_retrieval")) == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--data", "EMPTY"], "has its files under"),
        (["tiny", "--benchmarks", "scenes_retrieval", "--data", "EMPTY"], "no annotations under"),
        (["tiny", "--benchmarks", "imagnet", "--data", "EMPTY"], "there is no 'imagnet'; known are coco"),
        (["EMPTY/nowhere", "--data", "SCENES"], "cannot be loaded"),
        (
            ["tiny", "--data", "SCENES", "--layers", "6,7"],
            "there is no layer 7 in tiny; its language model has layers 1",
        ),
        (["tiny", "--data", "SCENES", "--layers", "6;4"], "--layers is '6;4'; give numbers with commas"),
        (["tiny", "--data", "SCENES", "--bootstrap", "-1"], "--bootstrap is -1; give"),
        (["a/run", "b/run"], "two models have the label 'run'; tell them apart"),
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
    for word in ("RUN_OR_MODEL", "--benchmarks", "--data", "--out", "--layers", "--bootstrap"):
        assert word in done.stdout
