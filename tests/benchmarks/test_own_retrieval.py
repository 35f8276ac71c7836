"""Retrieval over one's own images and captions, in every form, against arithmetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.source_variants import CAPTIONS, IMAGES, VARIANTS, write_variant
from tests.support.without_ray import count_words, leave_ray_out
from vladva.benchmarks.benchmark import find_benchmark
from vladva.data.image_refs import fetch_images
from vladva.data.source import SourceOptions
from vladva.evaluate.scoring import read_benchmarks
from vladva.prepare.pipeline import prepare

# A user of `--benchmarks retrieval` gives no options: these forms need some.
WITH_OPTIONS = ("parquet, structs", "karpathy", "coco")


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name not in WITH_OPTIONS])
def test_every_form_is_the_same_collection(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert write_variant(variant, tmp_path / "source") == SourceOptions()
    if variant == "webdataset":
        with pytest.raises(ValueError, match="scan its shards first.*jobs/prepare.py"):
            find_benchmark("retrieval").read(str(tmp_path / "source"))
        leave_ray_out(monkeypatch)
        prepare(str(tmp_path / "source"), "", count_words)
    task = find_benchmark("retrieval").read(str(tmp_path / "source"))
    assert task.counts == {"images": 5, "captions": 10, "distinct_captions": 10, "images_without_a_caption": 0}
    assert fetch_images(task.images) == list(IMAGES.values())
    assert list(task.texts) == [text for texts in CAPTIONS.values() for text in texts]
    assert len({image.id for image in task.images}) == 5


def test_scores_are_those_of_arithmetic(tmp_path: Path) -> None:
    write_variant("csv, lists", tmp_path / "source")
    task = read_benchmarks(["retrieval"], str(tmp_path / "source"))["retrieval"]
    # Image i is the axis i. Of the ten captions, two an image, the first of image 0 lies nearest to image 1.
    images = np.eye(5, dtype=np.float32)
    texts = np.repeat(images, 2, axis=0)
    texts[0] = [0.6, 0.8, 0, 0, 0]
    scores = task.score(texts, images).scores
    assert scores["t2i_r1"] == pytest.approx(9 / 10)
    assert scores["t2i_r5"] == 1
    assert scores["i2t_r1"] == 1  # image 0 still has its second caption
    texts[1] = texts[0]  # now neither: image 0 sees 0.6 from both, which is still above the zeros
    scores = task.score(texts, images).scores
    assert (scores["t2i_r1"], scores["i2t_r1"]) == (pytest.approx(8 / 10), 1)
    shuffled = task.score(np.roll(texts, 2, axis=0), images).scores  # negative control
    assert shuffled["t2i_r1"] < 0.3
    assert task.chance["t2i_r1"] == pytest.approx(1 / 5)
    assert task.chance["i2t_r1"] == pytest.approx(2 / 10)


def test_what_cannot_be_used_is_named_and_images_without_captions_are_counted(tmp_path: Path) -> None:
    write_variant("csv", tmp_path / "source")
    table = tmp_path / "source/pairs.csv"
    table.write_text("path,caption\nimages/a.jpg,a\nimages/b.png,b\nimages/c.jpeg,\n")
    task = find_benchmark("retrieval").read(str(table))
    assert (task.counts["images"], task.counts["images_without_a_caption"]) == (2, 1)
    table.write_text("path,caption\nimages/a.jpg,a\nimages/zz.png,b\nimages/c.jpeg,c,d\n")
    with pytest.raises(
        ValueError, match=r"2 rows .* pairs.csv, line 3: missing file .*; pairs.csv, line 4: broken row"
    ):
        find_benchmark("retrieval").read(str(table))


def test_it_is_scored_by_name_only_and_told_of_where_nothing_is_found(tmp_path: Path) -> None:
    write_variant("csv", tmp_path / "source")
    with pytest.raises(ValueError, match="of your own.* are scored with --benchmarks retrieval"):
        read_benchmarks(["all"], str(tmp_path / "source"))
