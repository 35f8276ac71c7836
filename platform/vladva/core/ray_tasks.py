"""Cluster: the Ray that a job runs on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any


def connect() -> None:
    """Join the Ray that submitted this job (or that RAY_ADDRESS names); without one, start one on this machine.

    On a machine with fewer than four cores four are declared: reading data, training workers and their coordinators
    take turns on the real ones.
    """
    import ray

    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")  # it announces every data set it runs
    if ray.is_initialized():
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("LANCE_LOG", "error")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level="WARNING")
        return
    # Jobs show progress and raise errors themselves; what workers print besides goes to the screen on request only.
    chatty = bool(os.environ.get("VLADVA_TRACEBACK"))
    cpus = max(4, os.cpu_count() or 1)
    ray.init("local", num_cpus=cpus, include_dashboard=False, logging_level="WARNING", log_to_driver=chatty)


def each(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    """`function` of each number, one Ray task each, as they are done. What it gives must go into JSON."""
    import ray.data

    rows = [{"number": number} for number in numbers]
    done = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map(_call, fn_kwargs={"function": function})
    return (json.loads(row["result"]) for row in done.iter_rows())


def _call(row: dict[str, Any], *, function: Callable[[int], Any]) -> dict[str, str]:
    return {"result": json.dumps(function(int(row["number"])))}
