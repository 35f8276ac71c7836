"""The report: self-contained, complete, and nothing in it that a reader's text could break."""

import base64
import io
import re
from pathlib import Path

import pytest
from PIL import Image

from tests.support.pages import METRICS, image, scores, write_full
from vladva.report.evaluation_page import (
    headline_highlights,
    layer_curves,
    score_bars,
    training_curves,
    write_report,
)
from vladva.report.html import data_uri
from vladva.report.svg import bar_chart, line_chart
from vladva.train.tracking import read_metrics


def test_page_needs_no_network(tmp_path: Path) -> None:
    page = write_full(tmp_path / "report.html")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert sources
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\(|@import|<script|https?://", page)


def test_every_image_decodes(tmp_path: Path) -> None:
    page = write_full(tmp_path / "report.html")
    images = re.findall(r'<img src="data:image/\w+;base64,([^"]+)"', page)
    assert len(images) == 5 + 1 + 6 + 1 + 1
    for encoded in images:
        Image.open(io.BytesIO(base64.b64decode(encoded))).load()


def test_everything_asked_for_is_there(tmp_path: Path) -> None:
    page = write_full(tmp_path / "report.html")
    for words in (
        "Scenes &amp; more", "64.2%", "A note.", "zero-shot", "trained", "VladVA (LLaVA-1.5-7B), Flickr30K", "98.5",
        "The right one is at 47", "✓", "true one", "false one", "A <mark>red square</mark>.", "3 min 32 s", "0.12%",
        "1,000 images",
        "abababababababab", "0123456789abcdef", "--data &lt;DATA&gt;", "1 min 15 s for 2,100 items",
        "2,000 were not embedded before",
        "None: the true caption won every time.", "1,000 resamples", "0.5\N{EN DASH}2.0", "p &lt; 0.001",
        "Layers (table 6): trained", "objects named, %", "Provide a concise description of this image.",
        "prefers-color-scheme: dark", "@media print", "viewport",
    ):  # fmt: skip
        assert words in page, words


def test_intervals_become_whiskers_and_layers_a_curve() -> None:
    [bars] = score_bars(scores()).values()
    assert bars.count('class="whisker"') == 2 * len(METRICS)
    assert "<title>trained, R@10 text to image: 10.0% (5.0 to 20.0)</title>" in bars
    assert "whisker" not in score_bars(scores() | {"bootstrap": 0})["Scenes retrieval"]
    curves = layer_curves(scores())
    assert list(curves) == ["Scenes retrieval, image retrieval R@1", "Scenes retrieval, text retrieval R@1"]
    assert all(curve.count("<circle") == 2 * 3 for curve in curves.values())  # two models, three layers


def test_highlights_set_the_last_model_beside_the_first() -> None:
    found = headline_highlights(scores())
    assert found[0] == ("Scenes retrieval, image retrieval R@1", "1.0%", "trained; zero-shot 1.0%")
    assert headline_highlights(scores(("alone",)))[1] == ("Scenes retrieval, text retrieval R@1", "1.0%", "alone")


def test_text_is_escaped(tmp_path: Path) -> None:
    page = write_full(tmp_path / "report.html")
    assert "a &lt;b&gt;bold&lt;/b&gt; query" in page
    assert "<b>bold" not in page


def test_sections_without_material_are_left_out(tmp_path: Path) -> None:
    write_report(str(tmp_path / "r.html"), title="Bare", command="make demo")
    page = (tmp_path / "r.html").read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Reproduce"]


def test_headings_span_their_columns(tmp_path: Path) -> None:
    page = write_full(tmp_path / "report.html")
    table = page[page.index("<table>") : page.index("</table>")]
    spans = re.findall(r'<th colspan="(\d)"[^>]*>([^<]*)</th>', table)
    assert spans[:2] == [("3", "image retrieval"), ("3", "text retrieval")]
    assert [text for _, text in spans[2:]] == ["R@1", "R@5", "R@10"] * 2


def test_large_images_are_shrunk() -> None:
    photograph = data_uri(image(2000))
    assert photograph.startswith("data:image/jpeg;base64,")
    assert Image.open(io.BytesIO(base64.b64decode(photograph.partition(",")[2]))).size == (256, 256)
    small = image(64)
    assert base64.b64decode(data_uri(small).partition(",")[2]) == small


def test_curves_skip_what_was_not_logged(tmp_path: Path) -> None:
    lines = '{"step": 1, "loss": 2.0, "next_token_loss": null}\n{"step": 2, "loss": 1.0}\n{"step": 3, "loss": NaN}\n'
    (tmp_path / "metrics.jsonl").write_text(lines.replace("null", "NaN"))
    steps = read_metrics(str(tmp_path))
    assert list(training_curves({"run": steps})) == ["Loss"]
    assert training_curves({}) == {}


def test_line_chart_maps_values_to_pixels() -> None:
    figure = line_chart({"run": [(0, 0.0), (50, 5.0), (100, 10.0)]}, label="x")
    [points] = re.findall(r'points="([^"]+)"', figure)
    (x0, y0), (x1, y1), (x2, y2) = (map(float, point.split(",")) for point in points.split())
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1)
    assert y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert y0 > y2  # up is down in SVG
    flat = line_chart({"run": [(0, 3.0), (1, 3.0)]}, label="x")
    assert "nan" not in flat


def test_ticks_are_told_apart() -> None:
    for line, ticks in {
        (62.9, 63.0): ["62.9", "62.95", "63"],
        (0.0, 4.0): ["0", "1", "2", "3", "4"],
        (0.0, 2e-3): ["0", "5e-4", "0.001", "0.0015", "0.002"],
        (1000, 1004): ["1000", "1001", "1002", "1003", "1004"],
    }.items():
        figure = line_chart({"run": list(enumerate(line))}, label="x")
        assert re.findall(r'text-anchor="end">([^<]+)<', figure) == ticks


def test_bars_show_values_and_chance() -> None:
    figure = bar_chart({"swap\nobject": {"a": 0.5, "b": 1.0}}, chance={"swap\nobject": 0.5}, label="x")
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', figure)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=0.2)
    assert "chance: 50.00%" in figure
    assert "<title>b, swap object: 100.0%</title>" in figure
