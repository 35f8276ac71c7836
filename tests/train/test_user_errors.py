"""The driver tells what a user can mend from what another try may cure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from vladva.config import RunConfig
from vladva.core.errors import StorageRefusedError
from vladva.recipes import tiny as tiny_recipe
from vladva.train.launch import user_error


@pytest.fixture
def run(tmp_path: Path) -> RunConfig:
    return replace(tiny_recipe(), storage=str(tmp_path))


def test_what_would_only_come_again_is_the_users(run: RunConfig) -> None:
    collateral = RuntimeError("connection closed by peer")
    told = user_error([collateral, ValueError("a.tar#7 cannot be used")], run)
    assert str(told) == "a.tar#7 cannot be used"
    told = user_error([collateral, StorageRefusedError("/runs/a: No space left on device")], run)
    assert str(told).startswith(f"{run.uri}, after step 0: /runs/a: No space left on device. What was complete is kept")


def test_what_another_try_may_cure_is_not(run: RunConfig) -> None:
    assert user_error([RuntimeError("connection closed by peer")], run) is None
    assert user_error([TimeoutError("storage")], run) is None
    lost = WorkerHealthCheckFailedError("worker 1 is gone", RayActorError())
    assert user_error([ValueError("there is no such actor any more"), lost], run) is None
