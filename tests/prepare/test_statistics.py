"""Summary: counts of a data set made for it, copies counted and drawn, and the page about it."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from PIL import Image

from tests.support.without_ray import count_words, leave_ray_out
from vladva.data.shard_writer import ShardWriter
from vladva.data.source import Rejected
from vladva.prepare import statistics
from vladva.prepare.pipeline import Prepared, prepare
from vladva.prepare.statistics import SIDE_BOUNDS, TOKEN_BOUNDS, Duplicates, compute_statistics
from vladva.report.data_page import contact_sheet, ledger, size_of, span, write_page
from vladva.report.svg import heat_map, histogram

SIZES = [(16, 8), (64, 64), (200, 100)]


def image(size: tuple[int, int], seed: int) -> bytes:
    body = io.BytesIO()
    Image.frombytes("L", size, Random(seed).randbytes(size[0] * size[1])).save(body, "PNG")
    return body.getvalue()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Prepared, int]]:
    """60 samples in 6 shards, 6 of them with the same image and 2 bad, and the bytes of the good images."""
    folder = tmp_path_factory.mktemp("data")
    num_bytes = 0
    with ShardWriter(str(folder), 10) as writer:
        for number in range(60):
            body = image((16, 8), 999) if number % 10 == 3 else image(SIZES[number % 3], number)
            captions = [f"caption {number}", "the same for all", " ".join(["word"] * (10 * number + 1))][
                : number % 3 + 1
            ]
            bad = number in (7, 44)
            writer.write(
                f"{number}", {"png": b"" if bad else body, "json": json.dumps({"captions": captions}).encode()}
            )
            num_bytes += 0 if bad else len(body)
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        yield prepare(str(folder), "", count_words), num_bytes


def test_everything_is_counted(data: tuple[Prepared, int]) -> None:
    prepared, num_bytes = data
    counted = compute_statistics(prepared.uri)
    good = [number for number in range(60) if number not in (7, 44)]
    assert (counted.num_samples, counted.num_shards, counted.image_bytes) == (58, 6, num_bytes)
    assert counted.captions_per_image == Counter(number % 3 + 1 for number in good)
    assert counted.num_captions == sum(number % 3 + 1 for number in good)
    lengths = [2] * 58 + [4] * sum(n % 3 >= 1 for n in good) + [10 * n + 1 for n in good if n % 3 == 2]
    assert counted.tokens == Counter(max(i for i, bound in enumerate(TOKEN_BOUNDS) if bound <= n) for n in lengths)
    assert counted.kinds() == {
        "short": sum(n < 30 for n in lengths), "long": sum(30 <= n < 500 for n in lengths),
        "unused": sum(n >= 500 for n in lengths),
    }  # fmt: skip
    sizes = Counter((16, 8) if n % 10 == 3 else SIZES[n % 3] for n in good)
    bins = {side: max(i for i, bound in enumerate(SIDE_BOUNDS) if bound <= side) for pair in SIZES for side in pair}
    assert counted.sizes == {(bins[width], bins[height]): count for (width, height), count in sizes.items()}
    assert (counted.images.groups, counted.images.num_duplicates) == (1, 5)
    assert counted.images.largest() == [(6, "000000.tar#3")]
    assert counted.captions.largest() == [(sum(n % 3 >= 1 for n in good), "the same for all")]
    assert f"5 images and {counted.captions.num_duplicates:,} captions are copies" in str(counted)


def test_of_what_is_too_much_some_are_watched_with_all_their_copies(
    data: tuple[Prepared, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compute_statistics(data[0].uri)
    monkeypatch.setattr(statistics, "SAMPLED", 10)  # of 53 different images
    drawn = compute_statistics(data[0].uri)
    assert drawn.images.every == 6
    assert 0 < len(drawn.images.seen) < 25
    assert drawn.images.seen.items() <= whole.images.seen.items()
    assert drawn.captions.seen.items() <= whole.captions.seen.items()
    assert (drawn.tokens, drawn.sizes, drawn.captions_per_image) == (
        whole.tokens,
        whole.sizes,
        whole.captions_per_image,
    )
    copies = Duplicates(every=7)
    for key, count in ((1, 1), (2, 3), (1, 1), (3, 1)):
        copies.add(key, count, str(key))
    assert (copies.groups, copies.num_duplicates) == (14, 21)


# --- the page --------------------------------------------------------------------------------------------------------


def test_the_page_needs_no_network_and_shows_everything(data: tuple[Prepared, int], tmp_path: Path) -> None:
    prepared = replace(
        data[0], joined={"rows": 4, "rows_without": 3, "rows_rejected": 2, "samples": 1, "samples_without": 0}
    )
    uri = write_page(str(tmp_path / "page.html"), prepared, compute_statistics(prepared.uri), "jobs/prepare.py <DATA>")
    page = Path(uri).read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert all(source.startswith(("data:", "#")) for source in sources)
    assert not re.search(r"url\(|@import|<script|https?://", page)
    assert page.count('<img src="data:image/png;base64,') == 12
    assert page.count("<svg") == 4
    for words in ("jobs/prepare.py &lt;DATA&gt;", "zero bytes", "000000.tar#7", "rows without a sample", "16 x 8",
                  "copies beyond the first: 5", "the same for all", "prefers-color-scheme: dark"):  # fmt: skip
        assert words in page, words


def test_the_lines_of_the_ledger_add_up(data: tuple[Prepared, int]) -> None:
    (_, found), *rest = ledger(data[0])
    assert found == 60 == sum(count for _, count in rest)


def test_hostile_text_stays_text(data: tuple[Prepared, int], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        evil = "<script>alert(1)</script>"
        patch.setattr(
            "vladva.report.data_page.quarantine", lambda _: {evil: (1, [Rejected(evil, evil, evil)._asdict()])}
        )
        page = write_page(str(tmp_path / "page.html"), data[0], compute_statistics(data[0].uri), evil)
    assert "<script" not in Path(page).read_text()


def test_the_contact_sheet_is_of_the_whole_data_set(data: tuple[Prepared, int]) -> None:
    shown = contact_sheet(data[0].uri)
    assert len(shown) == 12
    assert [shown[0].id, shown[-1].id] == ["000000.tar#0", "000005.tar#59"]
    assert all(len(caption) <= 240 for one in shown for caption in one.captions)


def test_bins_have_names() -> None:
    assert [span(TOKEN_BOUNDS, place, 1) for place in (0, 6, 16)] == ["0\u20134", "30\u201339", "1000+"]
    assert [size_of(count) for count in (0, 999, 1_500, 2_000_000_000_000)] == [
        "0 bytes",
        "999 bytes",
        "1.5 kB",
        "2.0 TB",
    ]


def test_figures_draw_every_count() -> None:
    drawn = histogram({"a": 3, "b<": 0, "c": 1}, label="x")
    assert re.findall(r"<title>(.*?)</title>", drawn) == ["a: 3 (75.0%)", "b&lt;: 0 (0.0%)", "c: 1 (25.0%)"]
    heights = [float(height) for height in re.findall(r'<rect [^>]*height="([\d.]+)"', drawn)]
    assert heights[1] == 0
    assert heights[0] == pytest.approx(3 * heights[2], abs=0.2)
    assert histogram({"a": 0}, label="x").count("<rect") == 1
    drawn = heat_map({(4, 5): 7, (8, 8): 1}, [2**n for n in range(12)], label="x", axes=("w", "h"))
    assert re.findall(r"<title>(.*?)</title>", drawn) == [
        "16\u201331 x 32\u201363 pixels: 7",
        "256\u2013511 x 256\u2013511 pixels: 1",
    ]
    assert 'fill-opacity="1.00"' in drawn
    assert heat_map({}, [1, 2], label="x", axes=("w", "h")).startswith("<svg")
