"""The lock that torch leaves when it is killed in compiling: removed when its owner is gone, named when it stays."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vladva.train.compile_lock import extensions_folder, owners, wait_for_locks

HOLD = "import sys, time; file = open(sys.argv[1], 'x'); print(flush=True); time.sleep(600)"


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    folder = tmp_path / "py311_cpu" / "deepspeed_shm_comm"
    folder.mkdir(parents=True)
    return folder / "lock"


@pytest.fixture
def holder(lock: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has made the lock and holds it open, as torch does while it compiles."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()


def test_a_lock_of_a_killed_process_is_removed(tmp_path: Path, lock: Path, holder: subprocess.Popen[str]) -> None:
    assert owners(lock) == [holder.pid]
    holder.kill()
    holder.wait()
    assert owners(lock) == []
    wait_for_locks(tmp_path, young_s=0.2, limit_s=30)
    assert not lock.exists()


def test_a_lock_whose_owner_lives_is_left_and_named_after_the_limit(
    tmp_path: Path, lock: Path, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(ValueError, match=f"{lock} has been there for .*process {holder.pid} has it open"):
        wait_for_locks(tmp_path, young_s=0.0, limit_s=0.5)
    assert lock.exists()


def test_a_young_lock_may_be_another_machines(tmp_path: Path, lock: Path) -> None:
    lock.touch()
    with pytest.raises(ValueError, match="no process of this machine has it open"):
        wait_for_locks(tmp_path, young_s=60, limit_s=0.3)
    os.utime(lock, (time.time() - 100,) * 2)
    (lock.parent / "shm.o").touch()  # something is being compiled there
    with pytest.raises(ValueError, match="Delete that file if nothing compiles"):
        wait_for_locks(tmp_path, young_s=60, limit_s=0.3)
    os.utime(lock.parent / "shm.o", (time.time() - 100,) * 2)
    wait_for_locks(tmp_path, young_s=60, limit_s=0.3)
    assert not lock.exists()


def test_a_lock_that_is_released_is_waited_for(tmp_path: Path, lock: Path, holder: subprocess.Popen[str]) -> None:
    threading.Timer(0.3, lock.unlink).start()
    wait_for_locks(tmp_path, young_s=0.1, limit_s=30)
    assert holder.poll() is None


def test_locks_of_others_are_none_of_our_business(tmp_path: Path) -> None:
    (tmp_path / "their_extension").mkdir()
    (tmp_path / "their_extension" / "lock").touch()
    wait_for_locks(tmp_path, young_s=0.0, limit_s=0.1)
    assert (tmp_path / "their_extension" / "lock").exists()


@pytest.mark.slow
def test_training_starts_on_a_machine_with_a_stale_lock(tmp_path: Path) -> None:
    """The real operator, loaded from a copy of what is compiled on this machine, beside a lock of long ago."""
    [compiled] = extensions_folder().glob("*/deepspeed_shm_comm")
    shutil.copytree(compiled, tmp_path / compiled.name, ignore=shutil.ignore_patterns("lock*"))
    lock = tmp_path / compiled.name / "lock"
    lock.touch()
    os.utime(lock, (time.time() - 10_000,) * 2)
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "DS_ACCELERATOR": "cpu"}
    program = "from vladva.train.engine import compile_operators; compile_operators()"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert not lock.exists()
