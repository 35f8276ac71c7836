"""A disk that fills while a job runs: one line with the path, exit status 2, and the same command goes on."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.index.test_index import write_table
from tests.support.checkpoints import build_llava
from tests.support.full_disk import resize_disk, small_disk
from tests.support.shards import image
from tests.support.without_ray import count_words, leave_ray_out
from vladva.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.core import storage
from vladva.core.cli import user_errors
from vladva.index.build import build_index
from vladva.index.vector_index import open_index
from vladva.models import checkpoint
from vladva.prepare.pipeline import prepare
from vladva.train.audit import audit
from vladva.train.launch import train
from vladva.train.tracking import read_metrics

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLADVA_TRACEBACK", raising=False)


def size_of(folder: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*") if path.is_file())


def refused(job: Callable[[], object], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a job ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        user_errors(lambda: [job(), None][1])()
    assert left.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "No space left on device" in line
    assert "What was complete is kept" in line
    return line


def test_training_goes_on_when_there_is_room_again(
    ray_cluster: None, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(build_llava(tmp_path / "llava"), lora_rank=16)
    data = DataConfig(str(scenes / "train"), run_length=2)
    options = TrainConfig(steps=6, global_batch=8, chunk_size=4, checkpoint_every=1, keep_last=10, audit=True)
    one = ClusterConfig(workers=1, cpus_per_worker=0.5)
    whole = RunConfig("run", str(tmp_path / "whole"), model, data, options, cluster=one)
    train(whole)
    with small_disk(tmp_path / "disk", int(size_of(Path(whole.uri)) * 0.6)) as disk:
        run = replace(whole, storage=str(disk))
        line = refused(lambda: train(run), capsys)
        assert str(disk) in line
        kept = checkpoint.finished_steps(run.uri)
        assert f"after step {kept}" in line
        assert 0 < kept < 6
        assert not list((Path(run.uri) / "checkpoints").glob(".unfinished*/state.json"))
        resize_disk(disk, 64 << 20)
        train(run)
        losses = [row["loss"] for row in read_metrics(run.uri)]
        assert losses == pytest.approx([row["loss"] for row in read_metrics(whole.uri)], rel=1e-4)
        assert audit(run.uri).ok


@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])  # it fills with the first shard, a later one, the index
def test_preparing_goes_on_when_there_is_room_again(
    share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_ray_out(monkeypatch)
    (tmp_path / "images").mkdir()
    for number in range(40):
        (tmp_path / f"images/{number:03d}.png").write_bytes(image(size=(96, 96), seed=number))
        (tmp_path / f"images/{number:03d}.txt").write_text(f"image {number}")

    def job(out: Path) -> object:
        return prepare(str(tmp_path / "images"), str(out), count_words, samples_per_shard=8)

    job(tmp_path / "whole")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "whole").glob("*.tar")}
    assert len(expected) == 5
    with small_disk(tmp_path / "disk", int(size_of(tmp_path / "whole") * share)) as disk:
        assert f"error: {disk}/out/" in refused(lambda: job(disk / "out"), capsys)
        assert not (disk / "out/_index/manifest.json").exists()
        # What is under its last name is whole.
        kept = {path.name: path.read_bytes() for path in (disk / "out").glob("*.tar")}
        assert kept.items() <= expected.items()
        resize_disk(disk, 64 << 20)
        job(disk / "out")
        assert {path.name: path.read_bytes() for path in (disk / "out").glob("*.tar")} == expected
        assert (disk / "out/_index/manifest.json").exists()


@pytest.mark.parametrize("share", [0.3, 0.85, 0.97])  # it fills with the rows, the partitions, the columns
def test_indexing_goes_on_when_there_is_room_again(
    share: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors_ND = np.random.default_rng(0).standard_normal((3000, 64)).astype(np.float32)
    vectors_ND /= np.linalg.norm(vectors_ND, axis=1, keepdims=True)
    table = write_table(tmp_path / "table", vectors_ND)
    old = write_table(tmp_path / "old", vectors_ND[:5])
    build_index(table, str(tmp_path / "whole"), exact_below=1000)
    with small_disk(tmp_path / "disk", 64 << 20) as disk:
        job = partial(build_index, table, f"{disk}/index", exact_below=1000)
        build_index(old, f"{disk}/index")
        before = open_index(f"{disk}/index")
        resize_disk(disk, size_of(disk) + int(size_of(tmp_path / "whole") * share))
        assert f"error: {disk}/index: No space left on device." in refused(job, capsys)
        # The rows of the new version may be there, but not what it takes to find them: the old one is the newest.
        found = open_index(f"{disk}/index")
        assert (found.version, found.num_rows) == (before.version, 5)
        before.refresh()
        assert before.num_rows == 5
        resize_disk(disk, 64 << 20)
        built = job()
        assert (built.num_rows, built.settings.index_type) == (3000, "IVF_SQ")
        before.refresh()
        assert before.version == open_index(f"{disk}/index").version == built.version


def scores_of(out: Path) -> dict[str, object]:
    """What a model's scores are, without what depends on how often the job was begun."""
    [model] = storage.read_json(f"{out}/scores.json")["models"].values()
    return {name: value for name, value in model.items() if name not in ("seconds", "num_embedded")}


def test_evaluating_goes_on_when_there_is_room_again(
    ray_cluster: None, tiny: str, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def job(out: Path) -> None:
        options = ["--data", str(scenes), "--benchmarks", "scenes_retrieval", "--out", str(out), "--actors", "1"]
        monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", tiny, *options])
        importlib.import_module("jobs.evaluate").main.__wrapped__()

    job(tmp_path / "whole")
    expected = scores_of(tmp_path / "whole")
    with small_disk(tmp_path / "disk", int(size_of(tmp_path / "whole") * 0.3)) as disk:
        out = disk / "out"
        assert f"error: {out}/embeddings/" in refused(lambda: job(out), capsys)
        assert not (out / "scores.json").exists()
        resize_disk(disk, 64 << 20)
        job(out)
        assert scores_of(out) == expected
        # The embeddings are there, and less room than the page takes, which is written last.
        page = (out / "report.html").stat().st_size
        for path in [path for path in out.rglob("*") if path.is_file() and "embeddings" not in path.parts]:
            path.unlink()
        resize_disk(disk, size_of(disk) + page - 4096)
        assert f"error: {out}/" in refused(lambda: job(out), capsys)
        assert not (out / "report.html").exists()
        resize_disk(disk, 64 << 20)
        job(out)
        assert scores_of(out) == expected
        assert (out / "report.html").stat().st_size > page - 4096
