"""A cluster that is too small says so: at once where it cannot grow, every 15 s while it might, and then gives up."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import combinations_with_replacement

import pytest

from vladva.config import ClusterConfig
from vladva.recipes import tiny as tiny_recipe
from vladva.train import capacity
from vladva.train.capacity import Nodes, Room, room_of, wait_for_room
from vladva.train.launch import train

GPU_NODE = {"CPU": 8.0, "GPU": 2.0, "memory": 1e9}
CPU_NODE = {"CPU": 4.0}


@pytest.mark.parametrize(
    ("nodes", "worker", "room"),
    [
        ([(GPU_NODE, 2)], {"CPU": 1, "GPU": 1}, Room(4, True)),
        ([(GPU_NODE, 2)], {"CPU": 4, "GPU": 1}, Room(3, True)),  # one node's last CPU is the reader's
        ([(GPU_NODE, 2), (CPU_NODE, 1)], {"CPU": 4, "GPU": 1}, Room(4, True)),
        ([(CPU_NODE, 1)], {"CPU": 0.5}, Room(6, True)),
        ([(CPU_NODE, 1)], {"CPU": 4}, Room(0, True)),
        ([({"CPU": 0.5, "GPU": 1}, 3)], {"GPU": 1}, Room(3, False)),
        ([(CPU_NODE, 5)], {"CPU": 1, "GPU": 1}, Room(0, True)),
        ([], {"CPU": 1}, Room(0, False)),
    ],
)
def test_room(nodes: list, worker: dict[str, float], room: Room) -> None:
    assert room_of(nodes, worker) == room


def test_room_is_what_trying_every_placement_finds() -> None:
    """Slow twin: put n workers and the reader on the nodes in every way."""
    draw = random.Random(0)
    for _ in range(60):
        nodes = [{"CPU": draw.randint(0, 4), "GPU": draw.randint(0, 2)} for _ in range(draw.randint(1, 3))]
        worker = {"CPU": draw.randint(1, 2), "GPU": draw.randint(0, 1)}
        room = room_of([(node, 1) for node in nodes], {k: v for k, v in worker.items() if v})
        for wanted in range(1, 8):

            def fits(places: tuple[int, ...], reader: int, nodes: list = nodes, worker: dict = worker) -> bool:
                return all(
                    node[name] >= places.count(i) * worker[name] + (name == "CPU" and i == reader)
                    for i, node in enumerate(nodes)
                    for name in node
                )

            ways = combinations_with_replacement(range(len(nodes)), wanted)
            possible = any(fits(places, reader) for places in ways for reader in range(len(nodes)))
            assert room.holds(wanted) == possible, (nodes, worker, wanted)


def asked(workers: int, **changes: float) -> ClusterConfig:
    return ClusterConfig(workers=workers, gpus_per_worker=1, **changes)


def test_what_can_never_fit_is_refused_at_once() -> None:
    """Two nodes may join the one that is there: six GPUs, not eight."""
    nodes = Nodes([GPU_NODE], [(GPU_NODE, 3)], GPU_NODE)
    told: list[str] = []
    with pytest.raises(
        ValueError, match=r"too small: the run needs 8 workers of 1 CPU and 1 GPU .* room for 2 workers"
    ):
        wait_for_room(asked(8, wait_s=600), told.append, look=lambda: nodes)
    assert not told
    wait_for_room(asked(8, min_workers=2), told.append, look=lambda: nodes)


def test_what_may_come_is_waited_for_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capacity, "SAY_S", 0.05)
    nodes = [Nodes([GPU_NODE] * n, [(GPU_NODE, 3)], {"CPU": 8.0 * n, "GPU": 2.0 * n}) for n in (1, 1, 1, 2, 3)]
    told: list[str] = []
    wait_for_room(asked(6, wait_s=1), told.append, look=lambda: nodes.pop(0))
    assert not nodes
    assert len(told) >= 2
    assert told[0].startswith("waiting for machines: the run needs 6 workers of 1 CPU and 1 GPU each")
    assert "1 nodes with 8 CPU and 2 GPU, room for 2 workers" in told[0]


@pytest.mark.parametrize(
    ("free", "message"),
    [
        ({"CPU": 8.0, "GPU": 1.0}, r"after 0 s \(cluster.wait_s\).*others use the cluster, free are 1 of 2 GPU needed"),
        ({"CPU": 2.0, "GPU": 2.0}, r"free are 2 of 3 CPU needed"),
    ],
)
def test_what_others_hold_is_waited_for_and_given_up(free: dict[str, float], message: str) -> None:
    nodes = Nodes([GPU_NODE], None, free)
    with pytest.raises(ValueError, match=message):
        wait_for_room(asked(2, wait_s=0.05), lambda line: None, look=lambda: nodes)


def test_a_run_on_this_machine_that_asks_for_too_much(ray_cluster: None) -> None:
    """Four CPUs and no GPU."""
    nothing: list[str] = []
    for cluster, message in (
        (ClusterConfig(workers=1, gpus_per_worker=1), r"workers of 1 CPU and 1 GPU each.*room for 0 workers"),
        (ClusterConfig(workers=5, cpus_per_worker=1), r"room for 3 workers"),
        (ClusterConfig(workers=1, cpus_per_worker=4), r"room for 0 workers"),
    ):
        with pytest.raises(ValueError, match=message):
            wait_for_room(cluster, nothing.append)
    wait_for_room(ClusterConfig(workers=3), nothing.append)
    assert not nothing


def test_training_asks_before_it_starts(ray_cluster: None, scenes: object, tmp_path: object) -> None:
    recipe = tiny_recipe()
    run = replace(recipe, storage=str(tmp_path), data=replace(recipe.data, uri=f"{scenes}/train"))
    run = replace(run, cluster=replace(run.cluster, workers=2, gpus_per_worker=1))
    with pytest.raises(ValueError, match="the cluster is too small: the run needs 2 workers of 0.5 CPU and 1 GPU"):
        train(run)
