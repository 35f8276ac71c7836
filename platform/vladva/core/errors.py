"""Errors that more than one room raises or catches."""

from __future__ import annotations

import errno
import os

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NO_RIGHT = {errno.EROFS, errno.EACCES, errno.EPERM}
REASONS = {os.strerror(number): number for number in sorted(NO_ROOM | NO_RIGHT)}


class StorageRefusedError(OSError):
    """A storage does not take a file: no room, or no right to write there. One text, which Ray passes on whole."""


def refused(error: Exception, path: str) -> StorageRefusedError | None:
    """The error as a refusal to write `path`; None where it is something else.

    Libraries in C and Rust have errors of their own for it, with the system's words.
    """
    number = getattr(error, "errno", None)
    words = os.strerror(number) if number else next((words for words in REASONS if words in str(error)), "")
    return StorageRefusedError(f"{path}: {words}") if words in REASONS else None


def refusal(error: BaseException) -> str | None:
    """What to tell a user whose storage has refused something; None for other errors."""
    if not isinstance(error, OSError):
        return None
    number = error.errno or next((number for words, number in REASONS.items() if words in str(error)), None)
    where = f"{error.filename}: {error.strerror}" if error.filename else str(error)
    if number in NO_ROOM:
        return f"{where}. What was complete is kept: make room, and run the same command again to go on"
    if number in NO_RIGHT:
        return f"{where}. What was complete is kept: correct the rights or the keys, and run the same command again"
    return None


class FingerprintMismatch(ValueError):  # noqa: N818
    """Embeddings of one model meet those of another."""

    def __init__(self, uri: str, found: str, wanted: str, hint: str) -> None:
        super().__init__(f"{uri} holds embeddings of model {found}, not of model {wanted}; {hint}")


class InvalidSampleError(ValueError):
    """What is wrong with an image, a caption or a tar: a reason out of a small set, and the details."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail[:200]

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason
