"""Cluster: the Ray that a job runs on."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vladva.core.errors import StorageRefusedError
from vladva.core.quiet import be_quiet, is_verbose, quiet_ray_data, quiet_retries, unheard, worker_variables

if TYPE_CHECKING:
    import ray.data

CAUSE = re.compile(
    r"^(?P<name>[\w.]+): (?P<text>(?:(?!^[\w.]+: ).)*?)\n\nThe above exception was the direct cause",
    re.DOTALL | re.MULTILINE,
)
USER_ERRORS: dict[str, type[Exception]] = {
    **dict.fromkeys(("ValueError", "InvalidSampleError", "FingerprintMismatch"), ValueError),
    **dict.fromkeys(("OSError", "PermissionError", "StorageRefusedError"), StorageRefusedError),
    "FileNotFoundError": FileNotFoundError,
}
# What Ray Data adds to the text of whatever a task of its raises.
RAY_ADVICE = re.compile(r"\n?Failed to [^\n]* after \d+/\d+ attempts \(total backoff .*", re.DOTALL)


def connect() -> None:
    """Join the Ray that submitted this job (or that RAY_ADDRESS names); without one, start one on this machine.

    On a machine with fewer than four cores four are declared: reading data, training workers and their coordinators
    take turns on the real ones.
    """
    import ray
    import ray.data

    be_quiet()
    if ray.is_initialized():
        return
    # Jobs show progress and raise errors themselves; what workers print besides goes to the screen on request only.
    start = partial(ray.init, logging_level=logging.WARNING, log_to_driver=is_verbose())
    with unheard():
        if os.environ.get("RAY_ADDRESS"):
            start(runtime_env={"env_vars": worker_variables()})
        else:
            start("local", num_cpus=max(4, os.cpu_count() or 1), include_dashboard=False)
            protect_token()
    quiet_ray_data()
    quiet_retries()


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

    def call(row: dict[str, Any]) -> dict[str, str]:
        return {"result": json.dumps(function(int(row["number"])))}

    done = ray.data.from_items(rows, override_num_blocks=max(1, len(rows))).map(call)
    return (json.loads(row["result"]) for row in done.iter_rows())


# --- pools of actors, and what feeds them ----------------------------------------------------------------------------

# Tasks that feed a pool of actors ask for next to no CPU, and each actor for that much less than its CPUs. So on a node
# of fewer than 250 CPUs as many feeders fit beside the actors as there are actors, however many these are: when nodes
# are lost, and actors begin again on those that are left until every CPU is taken, what feeds them still runs. A node
# without CPUs (the head of a cluster) takes neither.
FEEDER_CPUS = 0.004


def actor_cpus(cpus_per_actor: int) -> float:
    """What an actor asks Ray for."""
    return max(0.0, cpus_per_actor - FEEDER_CPUS)


def cluster_cpus() -> int:
    """CPUs of the cluster that this process has joined; 1 without one."""
    if not _has_cluster():
        return 1
    import ray

    return int(ray.cluster_resources().get("CPU", 0))


def actor_pool(
    actors: int | tuple[int, int], cpus_per_actor: int, gpus_per_actor: float = 0
) -> ray.data.ActorPoolStrategy:
    """The pool of actors.

    Where the cluster has fewer GPUs than the actors would take, there are fewer actors.

    An actor has three batches at once, to read, to compute and to write, and as many wait for it.
    """
    import ray.data

    least, most = (actors, actors) if isinstance(actors, int) else actors
    if not 1 <= least <= most:
        raise ValueError(f"actors is {actors}; give a positive number, or the least and the most of them")
    share = max(1, cpus_per_actor)
    room = sum(int(node["Resources"].get("CPU", 0)) // share for node in ray.nodes() if node["Alive"])
    if gpus_per_actor:
        room = min(room, int(ray.cluster_resources().get("GPU", 0) / gpus_per_actor))
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

    while isinstance(error, RayTaskError):
        inner = error.cause
        if isinstance(inner, UserCodeException):  # Ray Data's own; what it was raised for is left as text only
            return _as_told(str(error)) or error
        if not isinstance(inner, BaseException) or inner is error:
            break
        error = inner
    error.args = tuple(RAY_ADVICE.sub("", each) if isinstance(each, str) else each for each in error.args)
    if isinstance(error, OSError) and RAY_ADVICE.search(str(error.filename)):
        error.filename = None
    return error


def _as_told(traceback: str) -> BaseException | None:
    """The user's error that a traceback tells of as the cause of another; None for others."""
    found = CAUSE.search(traceback)
    kind = USER_ERRORS.get(found["name"].rpartition(".")[2]) if found else None
    return kind(RAY_ADVICE.sub("", found["text"])) if found and kind else None


def feeder_pool(actors: int | tuple[int, int], cpus_per_actor: int) -> ray.data.TaskPoolStrategy:
    """How many tasks feed a pool of actors at once: one for each CPU that these leave, and of a growing pool more."""
    from ray.data import TaskPoolStrategy

    # Ray warns where a data set has fewer blocks than that.
    warnings.filterwarnings("ignore", "The maximum number of concurrent tasks", UserWarning)
    least, most = (actors, actors) if isinstance(actors, int) else actors
    left = cluster_cpus() - least * cpus_per_actor
    return TaskPoolStrategy(size=max(1, left, 2 * most if most > least else 0))


def in_single_rows(batches: ray.data.Dataset, compute: ray.data.TaskPoolStrategy) -> ray.data.Dataset:
    """The rows that feeders make, each handed on as soon as it is there; it costs no step of its own.

    Ray merges `repartition` into the tasks before it only where both ask for the same, and has no argument for that.
    """
    rows = batches.repartition(target_num_rows_per_block=1)
    step = rows._logical_plan.dag
    for name, value in {"ray_remote_args": {"num_cpus": FEEDER_CPUS}, "compute": compute}.items():
        object.__setattr__(step, name, value)
    return rows


# --- single tasks ----------------------------------------------------------------------------------------------------


def submit(function: Callable[..., Any], *arguments: Any) -> Any:
    """A task on the cluster that this process has joined; without one, `function` is called here and now.

    Returns a reference for `collect`, or for the arguments of another task, which then gets the result.
    """
    if not _has_cluster():
        return function(*arguments)
    return _remote(function, 1).remote(*arguments)


def scatter(function: Callable[..., Sequence[Any]], parts: int, *arguments: Any) -> list[Any]:
    """A task whose result has so many parts, with a reference for each: whoever needs one part fetches no other."""
    if not _has_cluster():
        return list(function(*arguments))
    if parts == 1:  # Ray would give the list itself
        return [_remote(_only, 1).remote(function, *arguments)]
    return list(_remote(function, parts).remote(*arguments))


def collect(references: Sequence[Any]) -> list[Any]:
    """The results of `submit` or `scatter`. What a task raised is raised here, without Ray's report around it."""
    if not _has_cluster():
        return list(references)
    import ray

    try:
        return ray.get(list(references))
    except ray.exceptions.RayTaskError as error:
        raise cause_of(error) from None


def _has_cluster() -> bool:
    ray = sys.modules.get("ray")
    return ray is not None and ray.is_initialized()


@lru_cache(maxsize=64)
def _remote(function: Callable[..., Any], returns: int) -> Any:
    import ray

    # An error of ours is not tried again; a worker that was lost is, however often.
    return ray.remote(num_cpus=1, max_retries=-1, num_returns=returns, scheduling_strategy="SPREAD")(function)


def _only(function: Callable[..., Sequence[Any]], *arguments: Any) -> Any:
    (result,) = function(*arguments)
    return result
