"""A run that compares nothing looks perfect; it says so and stops."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.checkpoints import build_llava
from tests.support.shards import image
from vladva.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.core.cli import user_errors
from vladva.data.shard_writer import ShardWriter
from vladva.models import checkpoint
from vladva.train.launch import train
from vladva.train.tracking import read_metrics

SAMPLES = 16


def write_captioned(uri: str, captions: list[str]) -> None:
    """As many images, each with one of the captions in turn."""
    with ShardWriter(uri, SAMPLES) as writer:
        for number in range(SAMPLES):
            about = {"caption": captions[number % len(captions)]}
            writer.write(f"{number}", {"png": image(seed=number), "json": json.dumps(about).encode()})


@pytest.mark.slow
def test_a_run_whose_batches_have_no_negatives_stops(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLADVA_TRACEBACK", raising=False)
    write_captioned(str(tmp_path / "alike"), ["a photo"])
    write_captioned(str(tmp_path / "two"), ["a photo", "a drawing"])
    run = RunConfig(
        name="alike",
        storage=str(tmp_path / "runs"),
        model=ModelConfig(build_llava(tmp_path / "llava"), lora_rank=2),
        data=DataConfig(str(tmp_path / "alike"), run_length=2),
        train=TrainConfig(steps=3, global_batch=8, chunk_size=4, checkpoint_every=3),
        cluster=ClusterConfig(workers=1, cpus_per_worker=0.5),
    )
    with pytest.raises(SystemExit) as left:
        user_errors(lambda: [train(run), None][1])()
    assert left.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: no image of the last 3 global batches has a text to be told from")
    assert "all pairs of a batch have the same caption or the same image" in line
    assert checkpoint.finished_steps(run.uri) == 0
    rows = read_metrics(run.uri)
    assert rows
    assert all(row["in_batch_accuracy"] is None and row["effective_negatives"] == 0 for row in rows)

    train(replace(run, name="two", data=replace(run.data, uri=str(tmp_path / "two"))))
    rows = read_metrics(f"{run.storage}/two")
    assert len(rows) == 3
    assert all(row["in_batch_accuracy"] is not None and row["effective_negatives"] > 0 for row in rows)
