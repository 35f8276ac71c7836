"""Pages with every section, from made-up scores and data: what the tests of the pages look at."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from tests.support.without_ray import count_words, leave_ray_out
from vladva.benchmarks.benchmark import find_benchmark
from vladva.data.shard_writer import ShardWriter
from vladva.prepare import pipeline, statistics
from vladva.report.data_page import write_page
from vladva.report.evaluation_page import CaptionComparison, write_report
from vladva.report.html import Highlight
from vladva.report.page_examples import Grid, GridHit, GridRow, WrongChoice
from vladva.report.tables import layouts, statistics_table

METRICS = {f"{way}_r{k}": 0.01 * k for way in ("t2i", "i2t") for k in (1, 5, 10)}


def image(size: int = 8, colour: str = "red") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(data, "PNG")
    return data.getvalue()


def scores(labels: tuple[str, ...] = ("zero-shot", "trained")) -> dict:
    about = {"title": "Scenes retrieval", "ties": "expected", "source": "vladva.scenes", "licence": "Apache-2.0"}
    about |= {"counts": {"images": 1000}, "files": {"test/retrieval.json": "ab" * 32}, "chance": METRICS}
    described = {"base_model": "tiny", "adapter": None, "image_prompt": "Sum up <image>", "text_prompt": "Sum up"}
    described |= {"layer": 6, "dimension": 192, "dtype": "float32"}
    found = {
        "fingerprint": "0123456789abcdef",
        "scores": {"scenes_retrieval": METRICS},
        "tie_rates": {"scenes_retrieval": dict.fromkeys(METRICS, 0.0012)},
        "intervals": {"scenes_retrieval": {metric: [score / 2, 2 * score] for metric, score in METRICS.items()}},
    }
    earlier = found | {"scores": {"scenes_retrieval": {metric: score / 2 for metric, score in METRICS.items()}}}
    model = {"model": "tiny", "description": described, "num_items": 2100, "num_embedded": 2000}
    model |= {"seconds": {"embed": 75.0, "score": 0.5}, "layers": {"6": found, "4": earlier, "2": earlier}}
    change = {"difference": 0.031, "low": -0.002, "high": 0.0641, "p": 0.0004}
    comparison = {"model": "trained", "against": "zero-shot"}
    return {
        "created": "2026-01-01T00:00:00+00:00",
        "data": "s3://bucket/scenes",
        "protocol": {"texts": "as written", "similarity": "cosine"},
        "bootstrap": 1000,
        "benchmarks": {"scenes_retrieval": about},
        "models": dict.fromkeys(labels, model | found),
        "comparisons": [comparison | {"benchmarks": {"scenes_retrieval": dict.fromkeys(METRICS, change)}}],
    }


def write_full(path: Path) -> str:
    """Write the report; what is in it."""
    hits = [
        GridHit(image(colour=colour), 0.5, colour == "green") for colour in ("red", "green", "blue", "cyan", "grey")
    ]
    texts = [GridHit(f"caption {number}", 0.4, number == 2) for number in range(5)]
    lost = [hit._replace(right=False) for hit in hits]
    rows = [GridRow("a <b>bold</b> query", hits, 2), GridRow(image(), texts, 3), GridRow("far", lost, 47, image())]
    wrong = WrongChoice("swap_object", image(), "true one", "false one", 0.1, 0.2)
    write_report(
        str(path),
        title="Scenes & more",
        command="jobs/evaluate.py tiny --data <DATA>",
        scores=scores(),
        metrics={"run": [{"step": step, "loss": 4.0 - step / 50, "lr": 1e-3} for step in range(100)]},
        grids={"trained": [Grid("Found", "note", rows)]},
        wrong_choices={"trained": [wrong], "zero": []},
        captions=[
            CaptionComparison(image(), "Describe.", {"base": "A red square.", "trained": "Red."}, ["red square"])
        ],
        caption_table=statistics_table(captions()),
        timings={"training": 212.0, "index": 0.0},
        highlights=[Highlight("R@1", "64.2%", "of 1,000")],
        notes=["A note."],
    )
    return path.read_text(encoding="utf-8")


def captions() -> pa.Table:
    """One image, captioned by two systems."""
    from vladva.evaluate.caption_actor import CAPTION_PROMPTS

    return pa.Table.from_pylist(
        [
            {"system": system, "picture": "0", "prompt": prompt, "caption": caption, "tokens": len(caption.split())}
            | {"words": len(caption.split()), "named": ["red square"][: "square" in caption], "objects": ["red square"]}
            for system, caption in (("base", "A red square."), ("trained", "Red."))
            for prompt in CAPTION_PROMPTS
        ]
    )


def write_wide(path: Path) -> None:
    """Write the report of three models in every benchmark: all of the paper's tables, at their widest."""
    base = scores(("llava-1.5-7b", "e5-v", "vladva-llava-1.5-7b"))
    metrics: dict[str, dict[str, float]] = {}
    for column in (column for layout in layouts() for column in layout.columns):
        metrics.setdefault(column.benchmark, {})[column.metric] = 0.5
    [about] = base["benchmarks"].values()
    base["benchmarks"] = {
        name: about | {"title": find_benchmark(name).title, "chance": of_name} for name, of_name in metrics.items()
    }
    intervals = {name: dict.fromkeys(of_name, (0.456, 0.999)) for name, of_name in metrics.items()}
    found = {"scores": metrics, "intervals": intervals, "layers": {}}
    found["tie_rates"] = {name: dict.fromkeys(of_name, 0.0) for name, of_name in metrics.items()}
    base["models"] = {label: model | found for label, model in base["models"].items()}
    for model in base["models"].values():
        model["description"] = model["description"] | {"base_model": "llava-hf/llava-1.5-7b-hf"}
    change = {"difference": -0.45, "low": -0.456, "high": -0.444, "p": 0.0004}
    changes = {name: dict.fromkeys(of_name, change) for name, of_name in metrics.items()}
    base["comparisons"] = [{"model": "vladva-llava-1.5-7b", "against": "llava-1.5-7b", "benchmarks": changes}]
    write_report(str(path), title="Every table", command="jobs/evaluate.py", scores=base)


def write_data_page(path: Path) -> None:
    """The page about a data set with images of all sizes, captions of all lengths, copies and a quarantine."""
    folder = str(path.parent / "shards")
    with ShardWriter(folder, 20) as writer:
        for number in range(60):
            captions = ["a caption", "word " * number**2, "an_unbroken_word_" * 20][: number % 3 + 1]
            content = b"" if number % 25 == 7 else image(2 ** (number % 9 + 1), "blue")
            writer.write(f"{number}", {"png": content, "json": json.dumps({"captions": captions}).encode()})
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        prepared = pipeline.prepare(folder, "", count_words, max_bad_fraction=0.1)
        joined = {"rows": 4, "rows_without": 3, "rows_rejected": 2, "samples": 1, "samples_without": 0}
        counted = statistics.compute_statistics(prepared.uri)
        write_page(str(path), replace(prepared, joined=joined), counted, "jobs/prepare.py " + folder)
