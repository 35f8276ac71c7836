"""Worker places: which worker of a run is on which node, kept in the run's folder for whoever looks."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vladva.core import storage

WORKERS = "workers.json"
"""In the run's folder: the places of the group of workers that was started last."""


@dataclass(frozen=True)
class WorkerPlace:
    """Where a worker runs."""

    rank: int
    node: str
    address: str
    interface: str
    """Network interface that its group talks over; empty where none holds the node's address."""
    gpus: tuple[int, ...] = ()


def write_places(run_uri: str, places: list[WorkerPlace]) -> None:
    """Keep where the workers of a new group are."""
    storage.write_json(storage.join(run_uri, WORKERS), [asdict(place) for place in places])


def read_places(run_uri: str) -> list[WorkerPlace]:
    """Where the workers of a run's newest group are; none before the first."""
    uri = storage.join(run_uri, WORKERS)
    if not storage.exists(uri):
        return []
    return [WorkerPlace(**{**place, "gpus": tuple(place["gpus"])}) for place in storage.read_json(uri)]


def describe_places(places: list[WorkerPlace]) -> str:
    """One line: `2 workers: rank 0 on node-a, rank 1 on node-b`; ranks of one node together."""
    nodes: dict[str, list[int]] = {}
    for place in places:
        nodes.setdefault(f"{place.node} ({place.address})", []).append(place.rank)
    told = [f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))} on {node}" for node, ranks in nodes.items()]
    return f"{len(places)} worker{'s' * (len(places) > 1)}: {'; '.join(told)}"
