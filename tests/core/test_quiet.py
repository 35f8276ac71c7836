"""What is kept off the screen, and that what a user has set is kept."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import ray

from vladva.core import quiet


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*quiet.VARIABLES, *quiet.DRIVER_VARIABLES, "VLADVA_TRACEBACK", "RAY_JOB_CONFIG_JSON_ENV_VAR"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in quiet.LOGGERS:
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)


def test_quiet_keeps_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LANCE_LOG", "debug")
    quiet.be_quiet()
    assert os.environ["LANCE_LOG"] == "debug"
    assert os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] == "1"
    assert quiet.worker_variables() == quiet.VARIABLES | {"LANCE_LOG": "debug"}
    assert not logging.getLogger(quiet.LOGGERS[0]).isEnabledFor(logging.WARNING)


def test_a_variable_of_the_submitted_job_is_left_to_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps({"runtime_env": {"env_vars": {"LANCE_LOG": "debug"}}}))
    assert quiet.worker_variables().keys() == quiet.VARIABLES.keys() - {"LANCE_LOG"}


def test_verbose_sets_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLADVA_TRACEBACK", "1")
    quiet.be_quiet()
    assert not os.environ.keys() & quiet.VARIABLES.keys()
    assert quiet.worker_variables() == {}


def test_retries_are_not_told_and_other_troubles_are(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray._private import worker

    shown: list[list[str]] = []
    monkeypatch.setattr(worker, "print_to_stdstream", lambda data, ignore_prefix: shown.append(data["lines"]))
    told = [
        "Task Pool.submit failed. There are 2 retries remaining, so the task will be retried. Error: The node died.",
        "A worker died or was killed while executing a task by an unexpected system error.",
    ]

    def say() -> None:
        for line in told:
            worker.print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)

    say()
    quiet.quiet_retries()
    quiet.quiet_retries()
    say()
    assert shown == [[told[0]], [told[1]], [told[1]]]
    assert "so the task will be retried" in (Path(ray.__file__).parent / "_raylet.so").read_bytes().decode("latin-1")


def test_the_bars_of_transformers_obey() -> None:
    import subprocess
    import sys

    script = "from transformers.utils import logging; print(logging.is_progress_bar_enabled())"
    for value, shown in (("1", "False"), ("0", "True")):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": value},
            text=True,
            capture_output=True,
            check=True,
        )
        assert done.stdout.strip() == shown
