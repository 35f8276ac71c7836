"""Quiet: what libraries say besides our own progress and errors stays off the screen; VLADVA_TRACEBACK=1 shows it.

Bars, banners and notes of Ray, Ray Data, transformers, DeepSpeed and Lance come from every process that a job starts,
on every node, and bury the few lines that a job has to say. Their log files keep them.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

VARIABLES = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_DATA_LOG_LEVEL": "ERROR",  # it announces every data set it runs
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # "Loading weights", too
    "TRANSFORMERS_VERBOSITY": "error",
    "LANCE_LOG": "error",
}
"""Read by the libraries when they are imported: to be set before, in the driver and in what it starts."""

DRIVER_VARIABLES = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # "core_worker.cc ... max_restarts > 0" is an error to it
}

LOGGERS = ("ray._private.authentication.authentication_token_setup",)
"""Announces at every start that its default is on."""

WORD_OF_RETRY = "so the task will be retried"


def is_verbose() -> bool:
    """Whether everything is to be shown."""
    return bool(os.environ.get("VLADVA_TRACEBACK"))


def be_quiet() -> None:
    """Set what this process and those it starts here read. What the environment says already is kept."""
    if is_verbose():
        return
    for name, value in (VARIABLES | DRIVER_VARIABLES).items():
        os.environ.setdefault(name, value)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def unheard() -> Iterator[None]:
    """What C++ code writes to stderr meanwhile goes nowhere: Ray announces that it heeds RAY_BACKEND_LOG_LEVEL."""
    if is_verbose():
        yield
        return
    sys.stderr.flush()
    screen, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(screen, 2)
        os.close(screen)
        os.close(nowhere)


def quiet_ray_data() -> None:
    """Keep from the screen what Ray Data says of an error that is raised here all the same; its log file has it."""
    for handler in logging.getLogger("ray.data").handlers:
        if handler.name == "console" and not is_verbose():
            handler.setLevel(logging.CRITICAL)


def quiet_retries() -> None:
    """Keep from the screen that Ray does a task again, as when a node is lost or Serve's controller ends; it says so
    for every task. What is not done again is told.
    """
    from ray._private import worker

    show: Any = getattr(worker, "print_to_stdstream", None)
    if is_verbose() or show is None or getattr(show, "hides_retries", False):
        return

    def show_others(data: dict[str, Any], ignore_prefix: bool) -> None:
        lines = [line for line in data["lines"] if WORD_OF_RETRY not in line]
        if lines:
            show({**data, "lines": lines}, ignore_prefix)

    show_others.hides_retries = True  # type: ignore[attr-defined]
    worker.print_to_stdstream = show_others


def worker_variables() -> dict[str, str]:
    """What a job's processes on other nodes get in their environment, besides what it was submitted with."""
    if is_verbose():
        return {}
    submitted = json.loads(os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR") or "{}").get("runtime_env") or {}
    given = submitted.get("env_vars") or {}  # Ray refuses a variable that is set twice
    return {name: os.environ.get(name, value) for name, value in VARIABLES.items() if name not in given}
