"""Checkpoints: trainer state <-> storage, independent of the number of workers and of the ZeRO stage.

    RUN/checkpoints/step-N/adapter/                what was learned, in PEFT's format
    RUN/checkpoints/step-N/optimizer.safetensors   full tensors under the parameters' names
    RUN/checkpoints/step-N/state.json              the trainer's state, and size and sha256 of every other file

A checkpoint is complete when state.json is there and the files have the sizes it says; no other is ever picked up. On a
local disk a checkpoint is written beside its place and renamed; elsewhere state.json is uploaded last. The hashes are
checked when a checkpoint is loaded.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from vladva.core import storage
from vladva.core.errors import refused

if TYPE_CHECKING:
    from torch import Tensor

STATE, OPTIMIZER, ADAPTER = "state.json", "optimizer.safetensors", "adapter"
UNFINISHED = ".unfinished-"  # prefix of the folder's name while a checkpoint is written on a local disk
TRANSFERS = 8  # files under way at a time


class Checkpoint(NamedTuple):
    """A checkpoint as loaded: the trainer's state, the optimizer's full tensors, the adapter in a local folder."""

    state: dict[str, Any]
    optimizer: dict[str, Tensor]
    adapter: Path


# --- writing ---------------------------------------------------------------------------------------------------------


def save(run_uri: str, step: int, *, adapter_files: Path, optimizer: dict[str, Tensor], state: dict[str, Any]) -> str:
    """Write the checkpoint after `step` optimizer steps, in place of one that is there; returns its URI.

    adapter_files: local folder, copied. optimizer: full tensors, any device. state: anything JSON can hold.
    """
    return _publish(_write_files(run_uri, step, adapter_files, optimizer), run_uri, step, state)


def _write_files(run_uri: str, step: int, adapter_files: Path, optimizer: dict[str, Tensor]) -> Path:
    """Adapter and optimizer in a local folder: from here on the caller may change both."""
    from safetensors.torch import save_file

    checkpoints = storage.join(run_uri, "checkpoints")
    if _is_local(run_uri):
        folder = Path(storage.absolute(checkpoints)) / f"{UNFINISHED}step-{step}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    else:
        folder = Path(tempfile.mkdtemp(prefix="vladva-checkpoint-"))
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.items()}
    try:
        shutil.copytree(adapter_files, folder / ADAPTER)
        save_file(tensors, folder / OPTIMIZER)
    except Exception as error:  # of a full disk, shutil and safetensors raise errors of their own
        shutil.rmtree(folder, ignore_errors=True)  # it would take the room that others need
        if refusal := refused(error, str(folder)):
            raise refusal from error
        raise
    return folder


def _publish(folder: Path, run_uri: str, step: int, state: dict[str, Any]) -> str:
    """Move the local folder to its place in storage, with state.json, in such an order that it is never half there."""
    uri = storage.join(run_uri, "checkpoints", f"step-{step}")
    files = {str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()}
    manifest = {name: {"size": path.stat().st_size, "sha256": _sha256(path)} for name, path in files.items()}
    assert "files" not in state, "the manifest is kept under this name"
    content = {**state, "step": step, "files": manifest}
    _delete(uri)
    if _is_local(run_uri):
        storage.write_json(str(folder / STATE), content)
        folder.rename(storage.absolute(uri))
        return uri
    try:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: _upload(files[name], storage.join(uri, name)), files))
        storage.write_json(storage.join(uri, STATE), content)
    finally:
        shutil.rmtree(folder)
    return uri


def _upload(path: Path, uri: str) -> None:
    storage.write_bytes_atomically(uri, path.read_bytes())


class AsyncSaver:
    """Saves checkpoints while training goes on: the files are written at once, hashed and uploaded in a thread.

    One upload at a time: `save` first waits for the one before. An upload that failed is raised by the next `save`, or
    by `close`. Old checkpoints are deleted as by `prune` after each upload.
    """

    def __init__(self, run_uri: str, *, keep_last: int, keep_best: str | None = None) -> None:
        self.run_uri, self.keep_last, self.keep_best = run_uri, keep_last, keep_best
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._upload: Future[None] | None = None

    def save(self, step: int, *, adapter_files: Path, optimizer: dict[str, Tensor], state: dict[str, Any]) -> None:
        """As the function `save`, but returns when the files are on the local disk."""
        self.wait()
        folder = _write_files(self.run_uri, step, adapter_files, optimizer)
        self._upload = self._thread.submit(self._finish, folder, step, copy.deepcopy(state))

    def _finish(self, folder: Path, step: int, state: dict[str, Any]) -> None:
        _publish(folder, self.run_uri, step, state)
        prune(self.run_uri, self.keep_last, self.keep_best)

    def wait(self) -> None:
        """Wait for the upload under way; raises its error, once."""
        upload, self._upload = self._upload, None
        if upload is not None:
            upload.result()

    def close(self) -> None:
        """Wait for the upload under way and end the thread; raises the upload's error."""
        self._thread.shutdown()
        self.wait()

    def __enter__(self) -> AsyncSaver:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is None:
            self.close()
        else:  # which must not be hidden by that of an upload
            self._thread.shutdown()


# --- finding and deleting --------------------------------------------------------------------------------------------


def latest(run_uri: str) -> str | None:
    """URI of the newest complete checkpoint of a run; None if there is none."""
    steps = [step for step, state in _find(run_uri).items() if state is not None]
    return storage.join(run_uri, "checkpoints", f"step-{max(steps)}") if steps else None


def finished_steps(run_uri: str) -> int:
    """Optimizer steps of the newest complete checkpoint; 0 without one."""
    newest = latest(run_uri)
    return int(storage.read_json(storage.join(newest, STATE))["step"]) if newest else 0


def prune(run_uri: str, keep_last: int, keep_best: str | None = None) -> None:
    """Delete all complete checkpoints but the last `keep_last`, and what was left half-written before the newest.

    keep_best: the name of a score in `state["metrics"]`; the checkpoint with the highest one is kept, too.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; keep at least 1 checkpoint")
    found = _find(run_uri)
    complete = {step: state for step, state in sorted(found.items()) if state is not None}
    if not complete:
        return
    kept = set(list(complete)[-keep_last:])
    scores = {step: state.get("metrics", {}).get(keep_best) for step, state in complete.items()}
    scored = [step for step, score in scores.items() if score is not None]
    if scored:
        kept.add(max(scored, key=lambda step: (scores[step], step)))
    for step in found:
        if step < max(complete) and step not in kept:
            _delete(storage.join(run_uri, "checkpoints", f"step-{step}"))
            _delete(storage.join(run_uri, "checkpoints", f"{UNFINISHED}step-{step}"))


def _find(run_uri: str) -> dict[int, dict[str, Any] | None]:
    """Step -> content of state.json, or None where the checkpoint is not complete."""
    folder = storage.join(run_uri, "checkpoints")
    pattern = re.compile(rf"(?:{re.escape(UNFINISHED)})?step-(\d+)/(.+)")
    sizes: dict[int, dict[str, int]] = {}
    for uri, size, _ in storage.list_infos(folder):
        if match := pattern.fullmatch(uri, len(folder) + 1):
            files = sizes.setdefault(int(match[1]), {})
            if UNFINISHED not in match[0]:
                files[match[2]] = size
    return {step: _state_if_complete(storage.join(folder, f"step-{step}"), sizes[step]) for step in sorted(sizes)}


def _state_if_complete(uri: str, sizes: dict[str, int]) -> dict[str, Any] | None:
    if STATE not in sizes:
        return None
    try:
        state = storage.read_json(storage.join(uri, STATE))
    except (json.JSONDecodeError, FileNotFoundError):  # cut off by a power failure; deleted since it was listed
        return None
    return state if all(sizes.get(name) == file["size"] for name, file in state["files"].items()) else None


def _delete(uri: str) -> None:
    """Delete a checkpoint, state.json first: what is left by an interruption is not complete."""
    state = storage.join(uri, STATE)
    for file in sorted(storage.list_files(uri), key=lambda file: file != state):
        storage.delete_file(file)
    if _is_local(uri):
        shutil.rmtree(storage.absolute(uri), ignore_errors=True)  # the empty folders


# --- reading ---------------------------------------------------------------------------------------------------------


def read_checkpoint(checkpoint_uri: str) -> Checkpoint:
    """Read a checkpoint. The adapter of one that is not on a local disk is in a new temporary folder.

    Raises ValueError if the checkpoint is missing, half-written or damaged.
    """
    from safetensors.torch import load_file

    state, folder = _fetch(checkpoint_uri, (ADAPTER, OPTIMIZER))
    return Checkpoint(state, load_file(folder / OPTIMIZER), folder / ADAPTER)


def fetch_adapter(checkpoint_uri: str) -> Path:
    """Local folder with the adapter of a checkpoint, without fetching its optimizer; errors as in `read_checkpoint`."""
    return _fetch(checkpoint_uri, (ADAPTER,))[1] / ADAPTER


def _fetch(checkpoint_uri: str, wanted: Iterable[str]) -> tuple[dict[str, Any], Path]:
    uri = checkpoint_uri.rstrip("/")
    prefix = len(storage.join(uri, ""))
    sizes = {file[prefix:]: size for file, size, _ in storage.list_infos(uri)}
    state = _state_if_complete(uri, sizes)
    if state is None:
        raise ValueError(_missing(uri, sizes))
    names = {name: file["sha256"] for name, file in state.pop("files").items() if name.split("/")[0] in wanted}
    if _is_local(uri):
        folder = Path(storage.absolute(uri))
    else:
        folder = Path(tempfile.mkdtemp(prefix="vladva-checkpoint-"))
        with ThreadPoolExecutor(TRANSFERS) as pool:
            list(pool.map(lambda name: _download(storage.join(uri, name), folder / name), names))
    for name, sha256 in names.items():
        if _sha256(folder / name) != sha256:
            raise ValueError(f"{storage.join(uri, name)} is damaged: its sha256 is not the one in {STATE}; use another")
    return state, folder


def _download(uri: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(storage.read_bytes(uri))


def _missing(uri: str, sizes: dict[str, int]) -> str:
    """What was looked for, and what there is instead."""
    problem = f"is not complete (it has {', '.join(sizes)})" if sizes else "does not exist"
    run_uri, separator, _ = uri.rpartition("/checkpoints/")
    complete = [f"step-{step}" for step, state in _find(run_uri).items() if state is not None] if separator else []
    return f"the checkpoint {uri} {problem}; complete ones beside it: {', '.join(complete) or 'none'}"


def _is_local(uri: str) -> bool:
    return not uri.startswith("s3://")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
