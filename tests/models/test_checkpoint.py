"""Checkpoints on a local disk and on a real S3 server: what was saved comes back, and nothing half-written does."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.support.s3_server import BUCKET, s3_server
from vladva.core import storage
from vladva.models import checkpoint


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


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter_files"
    (folder / "nested").mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"r": 16}')
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    (folder / "nested" / "note").write_text("")
    return folder


OPTIMIZER = {
    "layer.exp_avg": torch.arange(6.0).reshape(2, 3),
    "layer.exp_avg_sq": torch.arange(6.0).reshape(2, 3).T,  # not contiguous
    "half": torch.tensor([1.5], dtype=torch.bfloat16),
}


def save(run: str, step: int, adapter: Path, **state: object) -> str:
    return checkpoint.save(run, step, adapter_files=adapter, optimizer=OPTIMIZER, state=state)


def names(run: str) -> set[str]:
    """The checkpoint folders of which anything is left."""
    folder = storage.join(run, "checkpoints")
    return {uri[len(folder) + 1 :].split("/")[0] for uri in storage.list_files(folder)}


def test_what_was_saved_comes_back(run: str, adapter: Path) -> None:
    state = {"epoch": 2, "seed": 0, "temperature": 14.285714285714286, "config": {"a": [1, None, "ü"]}}
    uri = save(run, 50, adapter, **state)
    assert uri == storage.join(run, "checkpoints", "step-50")
    loaded = checkpoint.read_checkpoint(uri + "/")
    assert loaded.state == state | {"step": 50}
    assert set(loaded.optimizer) == set(OPTIMIZER)
    for name, tensor in OPTIMIZER.items():
        torch.testing.assert_close(loaded.optimizer[name], tensor, rtol=0, atol=0)
    for folder in (loaded.adapter, checkpoint.fetch_adapter(uri)):
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        assert files == {
            str(path.relative_to(adapter)): path.read_bytes() for path in adapter.rglob("*") if path.is_file()
        }


def test_layout_and_manifest(run: str, adapter: Path) -> None:
    uri = save(run, 7, adapter)
    files = [file[len(uri) + 1 :] for file in storage.list_files(uri)]
    in_adapter = ["adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/nested/note"]
    assert files == [*in_adapter, "optimizer.safetensors", "state.json"]
    manifest = storage.read_json(storage.join(uri, "state.json"))["files"]
    assert sorted(manifest) == files[:-1]
    model = (adapter / "adapter_model.safetensors").read_bytes()
    assert manifest[in_adapter[1]] == {"size": 256 * 40, "sha256": hashlib.sha256(model).hexdigest()}


def test_latest_goes_by_number(run: str, adapter: Path) -> None:
    assert checkpoint.latest(run) is None
    for step in (100, 9, 20):
        save(run, step, adapter)
    assert checkpoint.latest(run) == storage.join(run, "checkpoints", "step-100")


def test_saving_again_replaces(run: str, adapter: Path) -> None:
    save(run, 5, adapter, note="old")
    (adapter / "nested" / "note").rename(adapter / "another")
    uri = save(run, 5, adapter, note="new")
    assert checkpoint.read_checkpoint(uri).state == {"note": "new", "step": 5}
    assert not storage.exists(storage.join(uri, "adapter/nested/note"))
    assert storage.exists(storage.join(uri, "adapter/another"))


@pytest.mark.parametrize("damage", ["no state", "empty state", "a file short", "a file missing"])
def test_half_written_is_never_picked_up(damage: str, run: str, adapter: Path) -> None:
    good = save(run, 10, adapter)
    bad = save(run, 20, adapter)
    assert checkpoint.latest(run) == bad  # negative control
    if damage == "no state":
        storage.delete_file(f"{bad}/state.json")
    elif damage == "empty state":
        storage.write_bytes_atomically(f"{bad}/state.json", b"")
    elif damage == "a file short":
        whole = storage.read_bytes(f"{bad}/optimizer.safetensors")
        storage.write_bytes_atomically(f"{bad}/optimizer.safetensors", whole[:-1])
    else:
        storage.delete_file(f"{bad}/adapter/adapter_config.json")
    assert checkpoint.latest(run) == good
    with pytest.raises(ValueError, match=r"step-20 is not complete .* beside it: step-10$"):
        checkpoint.read_checkpoint(bad)
    save(run, 20, adapter)
    assert checkpoint.latest(run) == bad


@pytest.mark.parametrize("failing", range(4))
def test_a_writer_killed_at_any_file_leaves_no_checkpoint(
    failing: int, run: str, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th transfer fails (in S3), or the n-th file's copy (on disk)."""
    good = save(run, 10, adapter)
    calls = iter(range(100))
    lock = threading.Lock()
    original = checkpoint._upload if run.startswith("s3://") else checkpoint._sha256

    def fail(*arguments: object) -> object:
        with lock:
            number = next(calls)
        if number == failing:
            raise OSError("the disk is gone")
        return original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, original.__name__, fail)
        with pytest.raises(OSError, match="the disk is gone"):
            save(run, 20, adapter)
    assert checkpoint.latest(run) == good
    assert not storage.exists(storage.join(run, "checkpoints/step-20/state.json"))
    uri = save(run, 30, adapter)
    checkpoint.prune(run, keep_last=2)
    assert checkpoint.latest(run) == uri
    assert names(run) == {"step-10", "step-30"}  # what the killed writer left is gone


def test_changed_bytes_of_the_same_length_are_noticed(run: str, adapter: Path) -> None:
    uri = save(run, 10, adapter)
    model = f"{uri}/adapter/adapter_model.safetensors"
    storage.write_bytes_atomically(model, b"!" + storage.read_bytes(model)[1:])
    for load in (checkpoint.read_checkpoint, checkpoint.fetch_adapter):
        with pytest.raises(ValueError, match=r"adapter_model\.safetensors is damaged"):
            load(uri)


def test_missing_checkpoint_says_what_there_is(run: str, adapter: Path) -> None:
    with pytest.raises(ValueError, match=r"run/checkpoints/step-30 does not exist; complete ones beside it: none$"):
        checkpoint.read_checkpoint(f"{run}/checkpoints/step-30")
    for step in (20, 10):
        save(run, step, adapter)
    with pytest.raises(ValueError, match=r"step-30 does not exist; complete ones beside it: step-10, step-20$"):
        checkpoint.fetch_adapter(f"{run}/checkpoints/step-30")
    with pytest.raises(ValueError, match=r"elsewhere does not exist"):
        checkpoint.read_checkpoint(f"{run}/elsewhere")


def test_prune_keeps_the_last_and_the_best(run: str, adapter: Path) -> None:
    for step, score in ((10, 0.3), (20, 0.9), (30, None), (40, 0.5), (50, 0.4)):
        save(run, step, adapter, **({} if score is None else {"metrics": {"t2i_r1": score}}))
    checkpoint.prune(run, keep_last=2, keep_best="t2i_r1")
    assert names(run) == {"step-20", "step-40", "step-50"}
    checkpoint.prune(run, keep_last=2)
    assert names(run) == {"step-40", "step-50"}
    checkpoint.prune(run, keep_last=5)
    assert names(run) == {"step-40", "step-50"}
    with pytest.raises(ValueError, match="keep_last is 0"):
        checkpoint.prune(run, keep_last=0)


def test_async_saver_saves_what_was_given(run: str, adapter: Path) -> None:
    """Tensors, state and files changed right after `save` do not change the checkpoint; old ones are pruned."""
    tensor, state = torch.zeros(1000), {"next_chunk": 0}
    with checkpoint.AsyncSaver(run, keep_last=2) as saver:
        for step in (1, 2, 3):
            tensor.fill_(step)
            state["next_chunk"] = step
            (adapter / "adapter_config.json").write_text(str(step))
            saver.save(step, adapter_files=adapter, optimizer={"moment": tensor}, state=state)
            tensor.fill_(-1)
            state["next_chunk"] = -1
            (adapter / "adapter_config.json").write_text("changed")
    assert names(run) == {"step-2", "step-3"}
    for step in (2, 3):
        loaded = checkpoint.read_checkpoint(storage.join(run, "checkpoints", f"step-{step}"))
        assert loaded.state == {"step": step, "next_chunk": step}
        assert bool((loaded.optimizer["moment"] == step).all())
        assert (loaded.adapter / "adapter_config.json").read_text() == str(step)


def test_async_saver_does_not_wait_for_the_upload(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, slow, original = str(tmp_path / "run"), threading.Event(), checkpoint._publish

    def publish(*arguments: object) -> str:
        assert slow.wait(30)
        return original(*arguments)

    monkeypatch.setattr(checkpoint, "_publish", publish)
    saver = checkpoint.AsyncSaver(run, keep_last=1)
    saver.save(1, adapter_files=adapter, optimizer={}, state={})
    assert checkpoint.latest(run) is None
    slow.set()
    saver.close()
    assert checkpoint.latest(run) == f"{run}/checkpoints/step-1"


def test_async_saver_raises_a_failed_upload_at_the_next_call(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = str(tmp_path / "run")

    def publish(*_: object) -> str:
        raise OSError("no space left")

    saver = checkpoint.AsyncSaver(run, keep_last=1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_publish", publish)
        saver.save(1, adapter_files=adapter, optimizer={}, state={})
        with pytest.raises(OSError, match="no space left"):
            saver.save(2, adapter_files=adapter, optimizer={}, state={})
        saver.save(3, adapter_files=adapter, optimizer={}, state={})
        with pytest.raises(OSError, match="no space left"):
            saver.close()


def test_an_error_in_training_is_not_hidden_and_the_upload_completed(tmp_path: Path, adapter: Path) -> None:
    def train() -> None:
        with checkpoint.AsyncSaver(str(tmp_path), keep_last=1) as saver:
            saver.save(4, adapter_files=adapter, optimizer={}, state={})
            raise RuntimeError("training broke")

    with pytest.raises(RuntimeError, match="training broke"):
        train()
    assert checkpoint.latest(str(tmp_path)) == f"{tmp_path}/checkpoints/step-4"


def test_state_is_plain_json(tmp_path: Path, adapter: Path) -> None:
    uri = save(str(tmp_path), 3, adapter, next_chunk=96)
    content = json.loads((Path(uri) / "state.json").read_text())
    assert (content["step"], content["next_chunk"]) == (3, 96)
