"""A disk that fills while a job runs: one line with the path, exit status 2, and the same command goes on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.checkpoints import build_llava
from tests.support.full_disk import resize_disk, small_disk
from vladva.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.core.cli import user_errors
from vladva.models import checkpoint
from vladva.train.audit import audit
from vladva.train.launch import train
from vladva.train.tracking import read_metrics

pytestmark = pytest.mark.slow


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
    ray_cluster: None, scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLADVA_TRACEBACK", raising=False)
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
