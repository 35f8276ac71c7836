"""What Ray tasks do, done in this process: patched in where a test needs no cluster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from vladva.core import ray_tasks
from vladva.data import scan as scan_module
from vladva.data.sidecar import Scanner


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def here(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    """The tasks one after the other in this process."""
    return (json.loads(json.dumps(function(number))) for number in numbers)


def scan_here(scanner: Scanner, listed: list[list[Any]]) -> list[dict[str, Any]]:
    rows = listed
    return [json.loads(scanner(row)["facts"]) for row in rows]


def leave_ray_out(patch: pytest.MonkeyPatch) -> None:
    """Every task of `scan`, `prepare` and `summarise` runs in this process from here on."""
    patch.setattr(ray_tasks, "connect", lambda: None)
    patch.setattr(ray_tasks, "each", here)
    patch.setattr(scan_module, "_run", scan_here)
