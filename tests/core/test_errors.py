"""What users can mend is one line: a storage that refuses, here or in a task of Ray's, without Ray's own advice."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.full_disk import small_disk
from vladva.core import storage
from vladva.core.cli import user_errors
from vladva.core.errors import InvalidSampleError, StorageRefusedError, refusal, refused
from vladva.core.ray_tasks import cause_of


def test_refusals_are_told_with_path_and_what_to_do() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/runs/a")
    kept = "What was complete is kept: make room, and run the same command again to go on"
    assert refusal(full) == f"/runs/a: No space left on device. {kept}"
    assert "/runs/a: Read-only file system" in refusal(OSError(errno.EROFS, os.strerror(errno.EROFS), "/runs/a"))
    assert "correct the rights or the keys" in refusal(
        PermissionError(errno.EACCES, "s3://a is not open to these keys")
    )
    assert refusal(refused(RuntimeError("I/O error: Disk quota exceeded (os error 122)"), "/runs/a")).startswith(
        "/runs/a: Disk quota exceeded. What was complete is kept"
    )


@pytest.mark.parametrize(
    "error", [FileNotFoundError(2, "x"), ValueError("No space left on device"), OSError("reset"), KeyError("x")]
)
def test_other_errors_are_none(error: Exception) -> None:
    assert refusal(error) is None


def test_a_full_disk_keeps_what_was_there(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 64 << 10) as disk:
        storage.write_bytes_atomically(f"{disk}/a", b"old")
        with pytest.raises(StorageRefusedError, match=f"{disk}/a: No space left on device"):
            storage.write_bytes_atomically(f"{disk}/a", bytes(200_000))
        assert storage.read_bytes(f"{disk}/a") == b"old"
        assert os.listdir(disk) == ["a"]
        with pytest.raises(StorageRefusedError, match=f"{disk}/b/c: No space"):
            storage.write_bytes_atomically(f"{disk}/b/c", bytes(200_000))


def raise_in_a_task(make: Callable[[], Exception], *, data: bool) -> BaseException:
    import ray.data

    def fails(row: Any) -> Any:
        raise make()

    try:
        if data:
            ray.data.range(1).map(fails).materialize()
        else:
            ray.get(ray.remote(fails).remote(1))
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


@pytest.mark.parametrize("data", [False, True])
def test_of_a_task_only_our_words_are_told(
    ray_cluster: None, data: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLADVA_TRACEBACK", raising=False)
    errors: list[tuple[Callable[[], Exception], str]] = [
        (lambda: ValueError("a.tar#7 is wrong"), "a.tar#7 is wrong"),
        (lambda: InvalidSampleError("not an image", "a.tar#7"), "not an image: a.tar#7"),
        (lambda: StorageRefusedError("/a: No space left on device"), "/a: No space left on device. What was complete"),
    ]
    for make, message in errors:
        error = raise_in_a_task(make, data=data)
        assert len(str(error)) > len(message) + 50  # what Ray makes of it
        assert str(cause_of(error)) == str(make())

        def main(error: BaseException = error) -> None:
            raise error

        with pytest.raises(SystemExit) as left:
            user_errors(main)()
        assert left.value.code == 2
        told = capsys.readouterr().err.strip()
        assert told.startswith(f"error: {message}")
        assert "\n" not in told
        assert "DataContext" not in told
    ours = raise_in_a_task(lambda: KeyError("a fault of ours"), data=data)
    with pytest.raises(type(ours)):
        user_errors(lambda: (_ for _ in ()).throw(ours))()
    assert sys.exc_info() == (None, None, None)


def test_who_stops_reading_is_no_fault() -> None:
    """`vladva --help | head -1`: the end of the reader's interest, as every command of Unix takes it."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "jobs", "--help"], stdout=writing, stderr=subprocess.PIPE, text=True, check=False
    )
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
