"""Cluster: the Ray that a job runs on."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vladva.core.quiet import be_quiet, is_verbose, worker_variables

if TYPE_CHECKING:
    import ray.data

# What Ray Data adds to the text of whatever a task of its raises.
RAY_ADVICE = re.compile(r"\n?Failed to [^\n]* after \d+/\d+ attempts \(total backoff .*", re.DOTALL)


def connect() -> None:
    """Join the Ray that submitted this job (or that RAY_ADDRESS names); without one, start one on this machine.

    On a machine with fewer than four cores four are declared: reading data, training workers and their coordinators
    take turns on the real ones.
    """
    import ray

    be_quiet()
    if ray.is_initialized():
        return
    # Jobs show progress and raise errors themselves; what workers print besides goes to the screen on request only.
    shown = {"logging_level": "WARNING", "log_to_driver": is_verbose()}
    if os.environ.get("RAY_ADDRESS"):
        ray.init(runtime_env={"env_vars": worker_variables()}, **shown)
        return
    ray.init("local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False, **shown)
    protect_token()


def protect_token() -> None:
    """Let only its owner read the token of this machine's Ray, which Ray writes for everybody to read.

    Whoever has it may run code on the cluster.
    """
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    with suppress(OSError):  # there is none, or it is somebody else's
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)


def each(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    """`function` of each number, one Ray task each, as they are done. What it gives must go into JSON."""
    import ray.data

    rows = [{"number": number} for number in numbers]
    done = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map(_call, fn_kwargs={"function": function})
    return (json.loads(row["result"]) for row in done.iter_rows())


def _call(row: dict[str, Any], *, function: Callable[[int], Any]) -> dict[str, str]:
    return {"result": json.dumps(function(int(row["number"])))}


def actor_pool(
    actors: int | tuple[int, int], cpus_per_actor: int, gpus_per_actor: float = 0
) -> ray.data.ActorPoolStrategy:
    """The pool of actors. At its start a CPU is left for the tasks that feed it, or nothing would ever run.

    Where the cluster has fewer GPUs than the actors would take, there are fewer actors.

    An actor has three batches at once, to read, to compute and to write, and as many wait for it.
    """
    import ray.data

    least, most = (actors, actors) if isinstance(actors, int) else actors
    if not 1 <= least <= most:
        raise ValueError(f"actors is {actors}; give a positive number, or the least and the most of them")
    there = ray.cluster_resources()
    room = (int(there.get("CPU", 0)) - 1) // max(1, cpus_per_actor)
    if gpus_per_actor:
        room = min(room, int(there.get("GPU", 0) / gpus_per_actor))
    return ray.data.ActorPoolStrategy(
        min_size=max(1, min(least, room)),
        max_size=most,
        max_tasks_in_flight_per_actor=6,
        max_concurrent_calls_per_actor=3,
        enable_true_multi_threading=True,
    )


def cause_of(error: BaseException) -> BaseException:
    """What a task raised, without the traceback of its process and the advice that Ray wraps it in."""
    from ray.data.exceptions import UserCodeException
    from ray.exceptions import RayTaskError

    while True:
        inner = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(error, UserCodeException) and inner is None:
            inner = error.__cause__
        if not isinstance(inner, BaseException) or inner is error:
            error.args = tuple(RAY_ADVICE.sub("", each) if isinstance(each, str) else each for each in error.args)
            if isinstance(error, OSError) and RAY_ADVICE.search(str(error.filename)):
                error.filename = None
            return error
        error = inner
