"""Capacity: whether a cluster has room for a run, before it starts; Ray Train waits for machines without a word.

A run needs room for its workers (`cluster.min_workers` of them where that is set), each on one node, and a CPU besides
for the tasks that read its data.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vladva.config import ClusterConfig

if TYPE_CHECKING:
    from vladva.train.preflight import Tell

Resources = Mapping[str, float]
"""Amounts by Ray's names, such as CPU and GPU."""

SAY_S = 15.0
LOOK_S = 1.0
READER: Resources = {"CPU": 1}


class Room(NamedTuple):
    """What a cluster can hold of a run: how many workers, with a CPU left that reads their data or none."""

    workers: int
    reads: bool

    def holds(self, workers: int) -> bool:
        """Whether a run of so many workers can begin."""
        return self.workers >= workers and self.reads


class Nodes(NamedTuple):
    """Nodes as they are; those that an autoscaler may start, each kind with its number, or None without one."""

    there: Sequence[Resources]
    possible: Sequence[tuple[Resources, int]] | None
    free: Resources  # of `there`, together


def worker_resources(cluster: ClusterConfig) -> dict[str, float]:
    """What one worker takes of a node."""
    wanted = {"CPU": cluster.cpus_per_worker, "GPU": float(cluster.gpus_per_worker)}
    return {name: amount for name, amount in wanted.items() if amount}


def room_of(nodes: Sequence[tuple[Resources, int]], worker: Resources) -> Room:
    """Workers that fit on the nodes (each kind with its number), and whether a reader fits besides.

    A node that gives its CPU to the reader may hold one worker less; the one that loses least does.
    """
    workers = sum(count * _times(node, worker) for node, count in nodes)
    losses = [
        _times(node, worker) - _times({**node, "CPU": node.get("CPU", 0) - READER["CPU"]}, worker)
        for node, count in nodes
        if count and node.get("CPU", 0) >= READER["CPU"]
    ]
    return Room(workers - min(losses), True) if losses else Room(workers, False)


def _times(node: Resources, worker: Resources) -> int:
    return max(0, min((int(node.get(name, 0) / amount + 1e-9) for name, amount in worker.items()), default=0))


def wait_for_room(cluster: ClusterConfig, tell: Tell, *, look: Callable[[], Nodes] | None = None) -> None:
    """Return when the run can begin; says every 15 s what is waited for.

    Raises ValueError at once where the cluster can never have the room, and after `cluster.wait_s` where it has not got
    it by then.
    """
    look = look or (lambda: look_at_cluster(worker, wanted))
    worker, wanted = worker_resources(cluster), cluster.min_workers or cluster.workers
    began = time.monotonic()
    said = began - SAY_S
    while True:
        nodes = look()
        problem = _problem(nodes, worker, wanted)
        if problem is None:
            return
        can_grow = nodes.possible is None or room_of(nodes.possible, worker).holds(wanted)
        is_small = not room_of([(node, 1) for node in nodes.there], worker).holds(wanted)
        now = time.monotonic()
        if (is_small and not can_grow) or now - began >= cluster.wait_s:
            waited = "" if is_small and not can_grow else f", after {now - began:.0f} s (cluster.wait_s)"
            raise ValueError(
                f"the cluster is too small{waited}: {problem}. Lower cluster.workers, cluster.cpus_per_worker or "
                f"cluster.gpus_per_worker, set cluster.min_workers, or add nodes"
            )
        if now - said >= SAY_S:
            tell(f"waiting for machines: {problem}")
            said = now
        time.sleep(min(LOOK_S, max(0.01, cluster.wait_s / 10)))


def _problem(nodes: Nodes, worker: Resources, wanted: int) -> str | None:
    """What is missing, in words; None where nothing is."""
    room = room_of([(node, 1) for node in nodes.there], worker)
    each = " and ".join(f"{amount:g} {name}" for name, amount in worker.items())
    asked = f"the run needs {wanted} workers of {each} each, and a CPU to read their data"
    there = f"{len(nodes.there)} nodes with {_sums(nodes.there)}"
    if room.workers < wanted:
        return f"{asked}; there are {there}, room for {room.workers} workers"
    if not room.reads:
        return f"{asked}; the workers take every CPU of {there}"
    total = {name: amount * wanted for name, amount in worker.items()}
    total["CPU"] = total.get("CPU", 0) + READER["CPU"]
    short = [name for name, amount in total.items() if nodes.free.get(name, 0) + 1e-9 < amount]
    if short:
        free = ", ".join(f"{nodes.free.get(name, 0):g} of {total[name]:g} {name} needed" for name in short)
        return f"{asked}; others use the cluster, free are {free}"
    return None


def _sums(nodes: Sequence[Resources]) -> str:
    return " and ".join(f"{sum(node.get(name, 0) for node in nodes):g} {name}" for name in ("CPU", "GPU"))


def look_at_cluster(worker: Resources, wanted: int) -> Nodes:
    """The nodes of the Ray cluster; an autoscaler is asked for those that the run needs."""
    import ray
    from ray._private.state import state  # Ray Train finds there, too, how far a cluster may grow
    from ray.autoscaler.sdk import request_resources

    there = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    config = state.get_cluster_config()
    possible: list[tuple[Resources, int]] | None = None
    if config is not None and config.node_group_configs:
        unlimited = 1 << 20
        possible = [
            (dict(group.resources), unlimited if group.max_count < 0 else group.max_count)
            for group in config.node_group_configs
        ]
        is_small = not room_of([(node, 1) for node in there], worker).holds(wanted)
        request_resources(bundles=[dict(worker)] * wanted + [dict(READER)] if is_small else [])
    elif len(there) == 1 and not os.environ.get("RAY_ADDRESS"):
        possible = [(there[0], 1)]  # a Ray of this machine alone: nobody joins it
    return Nodes(there, possible, ray.available_resources())
