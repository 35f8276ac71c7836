"""Errors that more than one room raises or catches."""

from __future__ import annotations


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
