"""Metrics of a run: a line a step in RUN/metrics.jsonl; where they are installed and wanted, TensorBoard, MLflow, W&B.

`Tracker` writes them, in the worker of rank 0. `follow` shows them where the run was started, by reading the last line
every so often: a worker has no terminal, so the two meet in storage only.

Steps count from 0: step s begins with s optimizer steps done, which is also when `checkpoints/step-s` is taken.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import logging
import math
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from vladva.core import storage
from vladva.core.errors import StorageRefusedError
from vladva.core.progress import Progress
from vladva.train.worker_places import WORKERS, WorkerPlace, describe_places, read_places

if TYPE_CHECKING:
    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter

    from vladva.train.preflight import Tell

logger = logging.getLogger(__name__)

METRICS, EVENTS = "metrics.jsonl", "tensorboard"
LAST_LINE = 1 << 16  # bytes; more than the longest line
SHOWN = {"loss": "loss {:.3f}", "in_batch_accuracy": "accuracy {:.1%}", "pairs_per_s": "{:.1f} pairs/s"}


class Tracker:
    """Writes the metrics of every step. One per run, on rank 0.

    first_step: the step that is logged first. What an earlier process wrote from there on is dropped, so that the
        files of a resumed run are those of an uninterrupted one.
    config: the run's configuration, for MLflow and Weights & Biases. Both take their address and key from their own
        environment variables (MLFLOW_TRACKING_URI, WANDB_API_KEY, ...).
    upload_every_s: a run folder that is not on a local disk is brought up to date this often.
    """

    def __init__(
        self,
        run_uri: str,
        *,
        first_step: int = 0,
        config: Mapping[str, Any] | None = None,
        mlflow: bool = False,
        wandb: bool = False,
        upload_every_s: float = 10.0,
    ) -> None:
        clients = [client for client, wanted in ((_MLflow, mlflow), (_WandB, wandb)) if wanted]
        self._clients = [client(run_uri, dict(config or {})) for client in clients]
        metrics_uri = storage.join(run_uri, METRICS)
        before = _lines_before(first_step, storage.read_bytes(metrics_uri) if storage.exists(metrics_uri) else b"")
        storage.write_bytes_atomically(metrics_uri, before)
        remote = run_uri.startswith("s3://")
        folder = Path(tempfile.mkdtemp(prefix="vladva-tracking-") if remote else storage.absolute(run_uri))
        if remote:
            (folder / METRICS).write_bytes(before)
        self._mirror = _Mirror(folder, run_uri, upload_every_s) if remote else None
        # Unbuffered: a line is one write, which a killed process has made or not.
        self._lines = (folder / METRICS).open("ab", buffering=0)
        self._events = _event_writer(folder / EVENTS, first_step) if has_tensorboard() else None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step. What is not finite becomes null in the file."""
        values = {name: float(value) for name, value in metrics.items()}
        line = {"step": step} | {name: value if math.isfinite(value) else None for name, value in values.items()}
        data = json.dumps(line).encode() + b"\n"
        before = self._lines.tell()
        if self._lines.write(data) != len(data):  # a disk that has room for the beginning of a line
            self._lines.truncate(before)
            raise StorageRefusedError(f"{self._lines.name}: {os.strerror(errno.ENOSPC)}")
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(name, value, step)
        for client in self._clients:
            client.log(step, values)

    def close(self) -> None:
        """Bring everything to its place."""
        self._lines.close()
        if self._events is not None:
            self._events.close()
        if self._mirror is not None:
            self._mirror.close()
        for client in self._clients:
            client.close()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def has_tensorboard() -> bool:
    """Whether a run here leaves TensorBoard's events in its folder."""
    return importlib.util.find_spec("tensorboard") is not None


def tell_what_is_not_logged(tell: Tell) -> None:
    """Name the extra without which a run has no events; before it, as nothing is an error about it."""
    if not has_tensorboard():
        tell("no events for TensorBoard (pip install 'vladva[tensorboard]'); metrics.jsonl has every figure")


def _event_writer(folder: Path, first_step: int) -> SummaryWriter:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=first_step, flush_secs=10)


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """What the run has logged so far, a dict a step; empty if nothing."""
    uri = storage.join(run_uri, METRICS)
    return [json.loads(line) for line in _whole_lines(storage.read_bytes(uri))] if storage.exists(uri) else []


def _whole_lines(data: bytes) -> list[bytes]:
    """The lines of `data` without a last one that was cut off."""
    return data[: data.rfind(b"\n") + 1].splitlines(keepends=True)


def _lines_before(step: int, data: bytes) -> bytes:
    return b"".join(line for line in _whole_lines(data) if json.loads(line)["step"] < step)


class _Mirror:
    """Copies the files of a local folder that have changed to storage, every few seconds, in a thread."""

    def __init__(self, folder: Path, uri: str, every_s: float) -> None:
        self.folder, self.uri, self.every_s = folder, uri, every_s
        self._copied: dict[Path, tuple[int, int]] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="tracking")
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(self.every_s):
            try:
                self.copy()
            except OSError as error:  # training does not end for want of a curve; the next round tries again
                logger.warning("%s: metrics could not be uploaded: %s", self.uri, error)

    def copy(self) -> None:
        for path in sorted(path for path in self.folder.rglob("*") if path.is_file()):
            stat = path.stat()
            if self._copied.get(path) != (stat.st_size, stat.st_mtime_ns):
                storage.write_bytes_atomically(
                    storage.join(self.uri, str(path.relative_to(self.folder))), path.read_bytes()
                )
                self._copied[path] = stat.st_size, stat.st_mtime_ns

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.copy()


@contextmanager
def follow(
    run_uri: str, total_steps: int, *, console: Console | None = None, every_s: float | None = None
) -> Iterator[None]:
    """Show the progress of a run that logs during the body.

    every_s: pause between two looks at the metrics; by default 1 s, 5 s for a run in S3.
    """
    pause = every_s or (5.0 if run_uri.startswith("s3://") else 1.0)
    newest = _NewestLine(storage.join(run_uri, METRICS))
    group = _NewestGroup(run_uri)
    stop = threading.Event()

    def show() -> None:
        last = False
        while not last:
            last = stop.wait(pause)
            if places := group.read():
                progress.console.print(describe_places(places), highlight=False, soft_wrap=True)
            if (line := newest.read()) is not None:
                known = {name: line.get(name) for name in SHOWN}
                figures = "  ".join(SHOWN[name].format(value) for name, value in known.items() if value is not None)
                if line.get("effective_negatives") == 0:
                    figures += "  no image has a text to be told from"
                progress.advance(line["step"] + 1 - progress.done, figures)

    with Progress("training", total_steps, console=console) as progress:
        thread = threading.Thread(target=show, daemon=True, name="progress")
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class _NewestGroup:
    """Where the workers are, whenever a new group of them has started."""

    def __init__(self, run_uri: str) -> None:
        self._run_uri = run_uri
        self._changed = self._look()  # of an earlier start: not news

    def _look(self) -> int:
        try:
            return storage.file_info(storage.join(self._run_uri, WORKERS)).changed
        except OSError:  # not there yet, or storage is out of reach
            return 0

    def read(self) -> list[WorkerPlace]:
        """The places; empty if there is no new group."""
        if (changed := self._look()) in (0, self._changed):
            return []
        self._changed = changed
        try:
            return read_places(self._run_uri)
        except OSError:
            return []


class _NewestLine:
    """The last whole line of a file that is being written, whenever the file's length has changed."""

    def __init__(self, uri: str) -> None:
        self._uri = uri
        self._size = storage.RangedFile(uri).size if storage.exists(uri) else 0  # left by an earlier run: not news

    def read(self) -> dict[str, Any] | None:
        """The line; None if the file is as it was or has no line."""
        try:
            file = storage.RangedFile(self._uri)
            if file.size == self._size:
                return None
            file.seek(max(0, file.size - LAST_LINE))
            lines = _whole_lines(file.read())
        except (OSError, EOFError):  # not there yet, being replaced, or storage is out of reach: the next look will do
            return None
        self._size = file.size
        return json.loads(lines[-1]) if lines else None


def _client_of(extra: str) -> ModuleType:
    try:
        return importlib.import_module(extra)
    except ModuleNotFoundError as error:
        raise ValueError(f"tracking with {extra} needs its client: pip install 'vladva[{extra}]'") from error


class _MLflow:
    """One MLflow run per run folder; its id is kept there, so that a resumed run goes on in it."""

    def __init__(self, run_uri: str, config: dict[str, Any]) -> None:
        self.mlflow = _client_of("mlflow")
        note = storage.join(run_uri, "mlflow.json")
        run_id = storage.read_json(note)["run_id"] if storage.exists(note) else None
        self.mlflow.set_experiment("vladva")
        run = self.mlflow.start_run(run_id=run_id, run_name=run_uri.rstrip("/").rpartition("/")[2])
        if run_id is None:
            self.mlflow.set_tags({"vladva.config": json.dumps(config), "vladva.run": run_uri})
            storage.write_json(note, {"run_id": run.info.run_id})

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.mlflow.log_metrics(metrics, step=step, synchronous=False)

    def close(self) -> None:
        self.mlflow.end_run()


class _WandB:
    """One W&B run per run folder: the id is made from the folder's URI, so that a resumed run goes on in it."""

    def __init__(self, run_uri: str, config: dict[str, Any]) -> None:
        identity = hashlib.sha256(run_uri.encode()).hexdigest()[:16]
        name = run_uri.rstrip("/").rpartition("/")[2]
        self.run = _client_of("wandb").init(project="vladva", name=name, id=identity, resume="allow", config=config)
        self.run.define_metric("*", step_metric="step")  # W&B's own step must not go back, which a resumed run's does

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log({"step": step} | metrics)

    def close(self) -> None:
        self.run.finish()
