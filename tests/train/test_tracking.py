"""Tracking: the files of runs that end, are killed and resume, on a local disk and in S3; and following them."""

from __future__ import annotations

import io
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import pytest
import wandb
from rich.console import Console

from tests.support.s3_server import BUCKET, s3_server
from vladva.config import RunConfig, TrackingConfig
from vladva.core import progress, storage
from vladva.recipes import tiny
from vladva.train.tracking import METRICS, Tracker, _NewestLine, follow, read_metrics, tell_what_is_not_logged
from vladva.train.training_log import TrainingLog


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A real S3 server; the AWS_* variables lead to it."""
    with s3_server(tmp_path_factory.mktemp("s3")) as variables, pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run's folder, once on disk and once in S3."""
    if request.param == "s3":
        request.getfixturevalue("server")
        return f"s3://{BUCKET}/{tmp_path.name}/run"
    return str(tmp_path / "run")


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 30 s"
        time.sleep(0.05)


def log(run: str, steps: range, scale: float = 1.0) -> None:
    with Tracker(run, first_step=steps.start) as tracker:
        for step in steps:
            tracker.log(step, {"loss": scale / (step + 1), "pairs_per_s": 10 * step})


def scalars(run: str, tag: str, tmp_path: Path) -> list[tuple[int, float]]:
    """(step, value) as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = tmp_path / "copy"
    folder.mkdir()
    for uri in storage.list_files(storage.join(run, "tensorboard")):
        (folder / uri.rpartition("/")[2]).write_bytes(storage.read_bytes(uri))
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_one_line_a_step(run: str, tmp_path: Path) -> None:
    log(run, range(4))
    expected = [{"step": s, "loss": 1 / (s + 1), "pairs_per_s": 10.0 * s} for s in range(4)]
    assert read_metrics(run) == expected
    text = storage.read_bytes(storage.join(run, "metrics.jsonl")).decode()
    assert text == "".join(json.dumps(line) + "\n" for line in expected)
    shown = scalars(run, "loss", tmp_path)
    assert [step for step, _ in shown] == [0, 1, 2, 3]
    assert [value for _, value in shown] == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])


def test_a_resumed_run_leaves_the_files_of_an_uninterrupted_one(run: str, tmp_path: Path) -> None:
    """Logged up to step 6, resumed from the checkpoint at step 4: what was logged of 4 to 6 is replaced."""
    log(run, range(7), scale=-1)
    log(run, range(4, 10))
    first, second = [-1 / (s + 1) for s in range(4)], [1 / (s + 1) for s in range(4, 10)]
    assert [line["loss"] for line in read_metrics(run)] == first + second
    assert [line["step"] for line in read_metrics(run)] == list(range(10))
    shown = scalars(run, "loss", tmp_path)
    assert [step for step, _ in shown] == list(range(10))
    assert [value for _, value in shown] == pytest.approx(first + second)


def test_a_new_start_drops_everything(run: str) -> None:
    log(run, range(5))
    log(run, range(2))
    assert [line["step"] for line in read_metrics(run)] == [0, 1]


def test_nothing_logged_yet(run: str) -> None:
    assert read_metrics(run) == []


def test_lines_are_there_before_the_run_ends(run: str) -> None:
    tracker = Tracker(run, upload_every_s=0.1)
    tracker.log(0, {"loss": 1.0})
    wait_for(lambda: len(read_metrics(run)) == 1)
    tracker.log(1, {"loss": 0.5})
    wait_for(lambda: len(read_metrics(run)) == 2)
    tracker.close()


def test_a_line_cut_off_is_dropped(tmp_path: Path) -> None:
    log(str(tmp_path), range(3))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 3, "lo')
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 1, 2]
    log(str(tmp_path), range(3, 5))
    assert [line["step"] for line in read_metrics(str(tmp_path))] == [0, 1, 2, 3, 4]


def test_a_killed_run_has_every_step_it_logged(tmp_path: Path) -> None:
    program = (
        "from vladva.train.tracking import Tracker\n"
        f"tracker = Tracker({str(tmp_path)!r})\n"
        "for step in range(10**9):\n"
        "    tracker.log(step, {'loss': 1.0, 'name' * 50: 2.0})\n"
        "    print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            if int(line) == 200:
                process.send_signal(signal.SIGKILL)
                break
    steps = [line["step"] for line in read_metrics(str(tmp_path))]
    assert steps == list(range(len(steps)))
    assert len(steps) > 200


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    with Tracker(str(tmp_path)) as tracker:
        tracker.log(0, {"loss": math.nan, "grad_norm": math.inf, "lr": 1e-4})
    assert read_metrics(str(tmp_path)) == [{"step": 0, "loss": None, "grad_norm": None, "lr": 1e-4}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_an_unreachable_storage_does_not_end_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uploads fail for a while, then work: nothing is lost, nothing is raised."""
    run, uploads, broken = f"s3://{BUCKET}/unreachable", {}, [False]

    def write(uri: str, data: bytes) -> None:
        if broken[0]:
            raise OSError("out of reach")
        uploads[uri] = data

    monkeypatch.setattr(storage, "exists", lambda uri: uri in uploads)
    monkeypatch.setattr(storage, "write_bytes_atomically", write)
    tracker = Tracker(run, upload_every_s=0.05)
    broken[0] = True
    tracker.log(0, {"loss": 1.0})
    time.sleep(0.3)
    assert uploads[f"{run}/metrics.jsonl"] == b""
    broken[0] = False
    wait_for(lambda: b'"loss": 1.0' in uploads[f"{run}/metrics.jsonl"])
    tracker.close()


@pytest.mark.parametrize("extra", ["mlflow", "wandb"])
def test_a_missing_client_names_the_extra(extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, extra, None)  # as if it were not installed
    with pytest.raises(ValueError, match=rf"pip install 'vladva\[{extra}\]'"):
        Tracker(str(tmp_path), **{extra: True})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_without_tensorboard_the_run_says_so_and_has_its_metrics(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    tell_what_is_not_logged(told.append)
    assert told == []
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # as if it were not installed
    tell_what_is_not_logged(told.append)
    assert told == ["no events for TensorBoard (pip install 'vladva[tensorboard]'); metrics.jsonl has every figure"]
    log(run, range(3))
    assert [line["step"] for line in read_metrics(run)] == [0, 1, 2]
    assert [uri for uri in storage.list_files(run) if "/tensorboard/" in uri] == []


@pytest.mark.slow
def test_mlflow_continues_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for steps in (range(3), range(3, 5)):
        with Tracker(str(tmp_path / "run"), first_step=steps.start, mlflow=True) as tracker:
            for step in steps:
                tracker.log(step, {"loss": float(step)})
    run_id = json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    history = mlflow.MlflowClient().get_metric_history(run_id, "loss")
    assert sorted((metric.step, metric.value) for metric in history) == [(s, float(s)) for s in range(5)]


@pytest.mark.slow
def test_wandb_continues_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for steps in (range(3), range(3, 5)):
        with Tracker(str(tmp_path / "run"), first_step=steps.start, wandb=True) as tracker:
            for step in steps:
                tracker.log(step, {"loss": float(step)})
    wandb.teardown()  # now everything is written
    files = sorted((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    assert len({file.name for file in files}) == 1  # run-ID.wandb
    rows = []
    for record in (record for file in files for record in wandb_records(file) if record.HasField("history")):
        row = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
        rows.append((row["step"], row["loss"]))
    assert rows == [(s, float(s)) for s in range(5)]


def wandb_records(file: Path) -> Iterator[Any]:
    """What W&B's client wrote to be sent later."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, whole = file.read_bytes(), 7, b""  # LevelDB's log format, after a header of seven bytes
    while position < len(data):
        left = 32_768 - position % 32_768
        if left < 7:  # the rest of a block that no record header fits in
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        whole += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


@pytest.mark.slow
def test_the_config_switches_both_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a worker of rank 0 does; the run's configuration goes along. Negative control: without the fields, neither."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "mlruns").as_uri())
    for name, chosen in (("off", TrackingConfig()), ("on", TrackingConfig(mlflow=True, wandb=True))):
        config = replace(tiny(), name=name, storage=str(tmp_path / "runs"), tracking=chosen)
        with TrainingLog(config, rank=0, world=1, start=0) as log:
            assert log.tracker is not None
            log.tracker.log(0, {"loss": 1.0})
    assert not (tmp_path / "runs/off/mlflow.json").exists()
    run = mlflow.MlflowClient().get_run(json.loads((tmp_path / "runs/on/mlflow.json").read_text())["run_id"])
    assert run.data.metrics == {"loss": 1.0}
    assert RunConfig.from_json(json.loads(run.data.tags["vladva.config"])).name == "on"
    wandb.teardown()
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 1


# --- following a run -------------------------------------------------------------------------------------------------


def write(run: Path, *lines: str) -> None:
    with (run / METRICS).open("a") as file:
        file.writelines(line + "\n" for line in lines)


def line(step: int) -> str:
    return (
        f'{{"step": {step}, "loss": {2.5 - step / 10}, "in_batch_accuracy": 0.25, "pairs_per_s": 31.4159, "lr": 0.1}}'
    )


def test_a_log_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    out = io.StringIO()
    with follow(str(tmp_path), 4, console=Console(file=out, width=60), every_s=0.05):
        write(tmp_path, line(0))
        wait_for(lambda: "1/4" in out.getvalue())
        write(tmp_path, line(1), line(2))
        wait_for(lambda: "3/4" in out.getvalue())
        write(tmp_path, line(3))
    lines = out.getvalue().splitlines()
    assert [re.search(r"\d/4", text)[0] for text in lines] == ["1/4", "3/4", "4/4", "4/4"]
    assert all(text.startswith("training  ") for text in lines)
    assert lines[-1].endswith("loss 2.200  accuracy 25.0%  31.4 pairs/s")
    assert re.search(r"\d:\d\d:\d\d left", lines[1])


def test_a_terminal_gets_a_live_line(tmp_path: Path) -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140, color_system=None)
    with follow(str(tmp_path), 4, console=console, every_s=0.05):
        write(tmp_path, line(0), line(1))
        wait_for(lambda: "2/4" in out.getvalue())
        write(tmp_path, line(2), line(3))
    assert re.search(r"4/4.*loss 2\.200  accuracy 25\.0%  31\.4 pairs/s", out.getvalue())


def test_an_error_in_the_body_passes(tmp_path: Path) -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(RuntimeError, match="training broke"), follow(str(tmp_path), 4, console=console, every_s=0.05):
        raise RuntimeError("training broke")


def test_a_run_in_s3_is_followed(server: None, tmp_path: Path) -> None:
    run, out = f"s3://{BUCKET}/{tmp_path.name}/run", io.StringIO()
    log(run, range(4))  # an earlier run
    with follow(run, 4, console=Console(file=out, width=200), every_s=0.05):
        log(run, range(4, 7))
    assert "7/4" in out.getvalue()


def test_lines_of_an_earlier_run_are_not_shown(tmp_path: Path) -> None:
    write(tmp_path, line(0), line(1))
    newest = _NewestLine(str(tmp_path / METRICS))
    assert newest.read() is None
    (tmp_path / METRICS).write_text("")  # the new run's tracker drops them
    assert newest.read() is None
    write(tmp_path, line(0))
    assert newest.read()["step"] == 0
    assert newest.read() is None


def test_a_line_half_written_is_left_for_later(tmp_path: Path) -> None:
    newest = _NewestLine(str(tmp_path / METRICS))
    assert newest.read() is None
    (tmp_path / METRICS).write_text(line(0) + "\n" + line(1)[:20])
    assert newest.read()["step"] == 0
    write(tmp_path, line(1)[20:])
    assert newest.read()["step"] == 1


def test_a_long_file_is_read_from_its_end(tmp_path: Path) -> None:
    newest = _NewestLine(str(tmp_path / METRICS))
    write(tmp_path, *(line(step) for step in range(20_000)))
    assert (tmp_path / METRICS).stat().st_size > 1 << 20
    assert newest.read()["step"] == 19_999
