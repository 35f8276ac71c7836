"""Relative paths mean the folder that the user is in, though every worker of the cluster is in another one."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import build_llava
from vladva.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.core.cli import location
from vladva.train.run_claim import absolute_paths, check_claim


def run_job(name: str, *arguments: str) -> None:
    """A job's `main`, in this process."""
    before = sys.argv
    sys.argv = [f"jobs/{name}.py", *arguments]
    try:
        importlib.import_module(f"jobs.{name}").main()
    finally:
        sys.argv = before


def relative_config(**data: object) -> RunConfig:
    """One step on shards and a checkpoint that are named from where the user is."""
    return RunConfig(
        name="run",
        storage="runs",
        model=ModelConfig(checkpoint="llava", lora_rank=2),
        data=DataConfig(run_length=2, **data),
        train=TrainConfig(steps=1, global_batch=4, chunk_size=4, checkpoint_every=1, audit=True),
        cluster=ClusterConfig(workers=1, cpus_per_worker=0.5),
    )


def test_every_path_of_a_run_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "llava").mkdir()
    config = relative_config(uri="", mix=("a=1", "s3://b/c=2"), validation_uri="scenes")
    found = absolute_paths(config)
    assert found.data.mix == (f"{tmp_path}/a=1", "s3://b/c=2")
    assert (found.data.uri, found.data.validation_uri) == ("", f"{tmp_path}/scenes")
    assert (found.storage, found.model.checkpoint) == (f"{tmp_path}/runs", f"{tmp_path}/llava")
    assert absolute_paths(found) == found
    for name in ("tiny", "llava-hf/llava-1.5-7b-hf"):
        named = RunConfig("run", "runs", ModelConfig(checkpoint=name), config.data, train=config.train)
        assert absolute_paths(named).model.checkpoint == name
    # A run that an earlier version began with relative paths is the same run.
    (tmp_path / "runs/run").mkdir(parents=True)
    (tmp_path / "runs/run/config.json").write_text(json.dumps(config.to_json()))
    assert check_claim(found, extend=False) == found
    monkeypatch.chdir(tmp_path / "llava")
    with pytest.raises(ValueError, match="data.mix was"):
        check_claim(found, extend=False)


def test_arguments_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [location(each) for each in ("", "a/b", "s3://a/b", "/a")] == ["", f"{tmp_path}/a/b", "s3://a/b", "/a"]
    from jobs.embed import parse as parse_embed
    from jobs.evaluate import parse as parse_evaluate
    from jobs.export import parse as parse_export
    from jobs.prepare import parse as parse_prepare
    from jobs.scenes import parse as parse_scenes
    from jobs.train import parse as parse_train
    from jobs.verify import parse as parse_verify

    embed = parse_embed(["tiny", "--data", "a", "--out", "b", "--images", "c"])
    assert (embed.data, embed.out, embed.images) == (f"{tmp_path}/a", f"{tmp_path}/b", f"{tmp_path}/c")
    evaluate = parse_evaluate(["tiny"])
    assert (evaluate.data, evaluate.out) == (f"{tmp_path}/.vladva/scenes", f"{tmp_path}/.vladva/evaluation")
    prepare = parse_prepare(["a", "--out", "b", "--captions-from", "c", "--join-on", "d"])
    assert (prepare.source, prepare.out, prepare.captions_from) == tuple(f"{tmp_path}/{name}" for name in "abc")
    assert parse_scenes(["--out", "a"]).out == f"{tmp_path}/a"
    assert [parse_scenes(kind).out for kind in ([], ["--triplets"])] == [
        f"{tmp_path}/.vladva/{name}" for name in ("scenes", "triplets")
    ]
    export = parse_export(["tiny", "--out", "a", "--scores", "b"])
    assert (export.out, export.scores) == (tmp_path / "a", f"{tmp_path}/b")
    assert parse_verify(["tiny", "--data", "a"]).out == f"{tmp_path}/.vladva/verify"
    assert parse_train(["tiny", "--dry-run", "--price", "a"])[0].price == f"{tmp_path}/a"


@pytest.mark.slow
def test_jobs_find_relative_paths_from_where_the_user_is(
    ray_cluster: None, tmp_path: Path, scenes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """The cluster's workers were started in the folder of this repository, where none of these names is."""
    from vladva.train.launch import train

    build_llava(tmp_path / "llava")
    monkeypatch.chdir(tmp_path)
    shards = os.path.relpath(scenes / "train", tmp_path)
    train(relative_config(uri=shards))
    with pytest.raises(SystemExit, match="0"):
        run_job("audit", "runs/run")
    run_job("embed", "runs/run", "--data", shards, "--out", "table", "--actors", "1", "--kinds", "image")
    run_job("index", "table", "--out", "index")
    run_job("search", "index", "a red circle", "--model", "runs/run", "--html", "hits.html")
    run_job("verify", "runs/run", "--data", shards, "--samples", "2")
    assert {"runs", "table", "index", "hits.html"} <= {path.name for path in tmp_path.iterdir()}
    assert not {"runs", "table", "index"} & set(os.listdir(Path(__file__).parents[2]))
    assert "the same, to 1e-05" in capsys.readouterr().out.replace("1.0e-05", "1e-05")
