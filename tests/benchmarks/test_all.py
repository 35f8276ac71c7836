"""`jobs/evaluate.py --benchmarks all` on a folder with several benchmarks, for an LVLM and a dual encoder."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.checkpoints import build_blip_2
from tests.support.small_benchmarks import write_benchmarks
from vladva.benchmarks.benchmark import find_benchmark
from vladva.core.images import decode_image
from vladva.data.image_refs import read_images
from vladva.evaluate.scoring import read_outcomes
from vladva.models.dual_encoder_embedder import DualEncoder


def test_all_benchmarks_of_a_folder(
    ray_cluster: None,
    scenes: Path,
    tiny: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from jobs.evaluate import main

    data, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(scenes / "test", data / "scenes/test")
    task = find_benchmark("scenes_retrieval").read(str(data))
    pictures, captions = read_images(task.images[:8]), [str(text) for text in task.texts[:9]]
    write_benchmarks(data, pictures, captions)
    blip_2 = build_blip_2(tmp_path / "blip_2")

    command = [f"zero-shot={tiny}", f"blip-2={blip_2}", "--data", str(data), "--out", str(out), "--actors", "1"]
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *command])
    main()
    shown = capsys.readouterr().out
    scores = json.loads((out / "scores.json").read_text())
    assert sorted(scores["benchmarks"]) == [
        "flickr30k", "scenes_retrieval", "sugar_crepe_pp", "winoground"
    ]  # fmt: skip
    for title in ("table 1", "table 3", "table 4", "Scenes"):
        assert title in shown
    assert (out / "report.html").exists()
    assert len(list((out / "mteb").rglob("*.json"))) == 2 * 4
    for model in scores["models"].values():
        for name, about in scores["benchmarks"].items():
            assert set(model["scores"][name]) == set(about["chance"])
        # 1,000 images, 125 of each kind: one in 125 of the captions whose kind of image is the nearest.
        found = model["scores"]["flickr30k"]["t2i_r1"]
        assert found == pytest.approx(model["tie_rates"]["flickr30k"]["t2i_r1"] / 125)
        assert found > 0
        assert model["num_embedded"] <= 64 + 64 + 9

    # The score of images with several vectors by another route: the embedder itself, and a loop.
    embedder = DualEncoder(blip_2)
    texts = dict(zip(captions, embedder.embed_texts(captions), strict=True))
    images = embedder.embed_images([decode_image(image) for image in pictures])
    rows = read_outcomes(str(out), "blip-2", "winoground").to_pylist()
    for n, row in enumerate(rows[:20]):
        for side in (0, 1):
            nearest = max(float(vector @ texts[row["caption_0"]]) for vector in images[(n + side) % 8])
            assert row[f"cosine_c0_i{side}"] == pytest.approx(nearest, abs=1e-5)
    assert np.mean([row["text"] for row in rows]) == pytest.approx(
        scores["models"]["blip-2"]["scores"]["winoground"]["text"]
    )
