"""What the tests of shards share."""

from __future__ import annotations

import pytest

from tests.support.shards import run_here
from vladva.data import scan as scan_module


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_run", run_here)
