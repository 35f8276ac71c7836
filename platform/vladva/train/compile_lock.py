"""Compile lock: the file that torch leaves behind where a process is killed while it compiles an extension.

Torch waits for such a `lock` without end and without a word: every later training on the machine would hang. Here a
lock is removed whose owner is gone, and one that stays is named after a limit.

A process that compiles keeps its lock open, which /proc shows. It does not show processes of other machines (a home
folder over the network) or containers: a lock that nobody here has open is left alone while it, or anything beside it,
is young.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)

YOUNG_S = 120.0  # compiling DeepSpeed's op takes 40 s
LIMIT_S = 900.0
_LOOK_S = 1.0
_SAY_S = 15.0
NETWORK = {"nfs", "nfs4", "lustre", "cifs", "smb3", "ceph", "glusterfs", "gpfs", "beegfs", "fuse.sshfs"}


def extensions_folder() -> Path:
    """Where torch compiles extensions: each in a folder of its own, there or one below."""
    from torch.utils.cpp_extension import get_default_build_root

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())


def wait_for_locks(folder: Path, *, young_s: float = YOUNG_S, limit_s: float = LIMIT_S) -> None:
    """Return when nothing of DeepSpeed's below `folder` is locked; locks whose owners are gone are removed.

    Raises ValueError, with the path, for one that is there after `limit_s` seconds.
    """
    began = said = time.monotonic()
    while locks := sorted([*folder.glob("deepspeed_*/lock"), *folder.glob("*/deepspeed_*/lock")]):
        for lock in locks:
            _remove_if_left(lock, young_s)
        if not any(lock.exists() for lock in locks):
            continue
        now = time.monotonic()
        if now - began > limit_s:
            raise ValueError(
                f"{locks[0]} has been there for {now - began:.0f} s: another process compiles DeepSpeed's operators, "
                f"or was killed while it did ({_who(locks[0])}). Delete that file if nothing compiles, and run again"
            )
        if now - said > _SAY_S:
            logger.warning("waiting for %s (%s)", locks[0], _who(locks[0]))
            said = now
        time.sleep(min(_LOOK_S, young_s / 4, limit_s / 4))


def owners(lock: Path) -> list[int]:
    """Processes of this machine that have the file open, as far as this user may see them."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.path.samefile(link, lock) for link in (process / "fd").iterdir() if _is_link_to(link, lock)):
                found.append(int(process.name))
        except OSError:  # ended meanwhile, another user's, or the lock is gone
            continue
    return found


def _is_link_to(link: Path, file: Path) -> bool:
    try:
        return link.readlink().name == file.name
    except OSError:
        return False


def _remove_if_left(lock: Path, young_s: float) -> None:
    """Remove a lock that nobody holds. One process at a time: it must not be another's new one."""
    with (lock.parent / "lock.guard").open("w") as guard:
        fcntl.flock(guard, fcntl.LOCK_EX)
        try:
            newest = max(path.stat().st_mtime for path in [lock, *lock.parent.iterdir()] if path.name != "lock.guard")
        except FileNotFoundError:  # released
            return
        if owners(lock) or time.time() - newest < young_s or _is_remote(lock):
            return
        logger.warning("%s was left by a process that is gone: removed", lock)
        lock.unlink(missing_ok=True)


def _is_remote(path: Path) -> bool:
    """Whether other machines may write there, whose processes nobody sees here."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    covering = [(point, kind) for point, kind in mounts if path.resolve().is_relative_to(point)]
    return bool(covering) and max(covering, key=lambda mount: len(mount[0]))[1] in NETWORK


def _who(lock: Path) -> str:
    found = owners(lock)
    return f"process {', '.join(map(str, found))} has it open" if found else "no process of this machine has it open"
