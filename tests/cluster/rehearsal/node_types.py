#!/usr/bin/env python
"""What Ray's autoscaler makes of the node types of a file: tests/cluster/rehearsal/node_types.py ray_cluster.yaml

Machines are made up (`ray.cluster_utils.AutoscalingCluster`), the autoscaler is real. Run it on a host of a rehearsal:
it begins with `ray stop --force`, which on a shared machine ends everybody's Ray. The last line is JSON.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.cluster_utils import AutoscalingCluster

# What Ray's class reads from a file that its wheels leave out.
MADE_UP: dict[str, Any] = {
    "cluster_name": "rehearsal",
    "provider": {
        "type": "fake_multinode",
        "use_node_id_as_ip": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    },
    "head_node_type": "ray.head.default",
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{f"{role}commands": [] for role in ("initialization_", "setup_", "head_setup_", "worker_setup_")},
    **{f"{role}_start_ray_commands": [] for role in ("head", "worker")},
    **{name: [] for name in ("cluster_synced_files", "rsync_exclude", "rsync_filter")},
}
IDLE_MINUTES = 0.15
MOST_NODES = 2  # of a type: each is a raylet of this machine
WITHIN_S = 120.0


class MadeUpMachines(AutoscalingCluster):
    """Ray's cluster of made-up machines."""

    def _generate_config(
        self, head_resources: dict[str, Any], worker_node_types: dict[str, Any], **others: Any
    ) -> dict[str, Any]:
        others.pop("autoscaler_v2")
        head = {"resources": head_resources, "node_config": {}, "max_workers": 0}
        return {**MADE_UP, "available_node_types": {**worker_node_types, "ray.head.default": head}, **others}


def main() -> None:
    content = yaml.safe_load(Path(sys.argv[1]).read_text())
    types = content["available_node_types"]
    head = types.pop(content["head_node_type"])
    for name, node_type in types.items():
        node_type["node_config"] = {}
        node_type["resources"][name] = 1  # so that a node tells its type
        node_type["max_workers"] = min(node_type["max_workers"], MOST_NODES)
    cluster = MadeUpMachines(
        head_resources=dict(head["resources"]),
        worker_node_types=types,
        max_workers=content["max_workers"],
        upscaling_speed=content["upscaling_speed"],
        idle_timeout_minutes=IDLE_MINUTES,
    )
    cluster.start(override_env={"RAY_AUTH_MODE": "disabled"})
    try:
        ray.init("auto", logging_level="ERROR", log_to_driver=False)
        seen = observe(list(types))
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(seen))


def observe(names: list[str]) -> dict[str, Any]:
    """What comes, for what is asked, and whether it goes."""
    seen: dict[str, Any] = {"before": running(names)}

    @ray.remote
    def hold(seconds: float) -> None:
        time.sleep(seconds)

    # A task of one CPU: the head must not take it, and a GPU machine is not for it.
    ray.get(hold.options(num_cpus=1).remote(0), timeout=WITHIN_S)
    seen["for a CPU task"] = running(names)
    group = ray.util.placement_group([{"GPU": 1, "CPU": 1}])
    ray.get(group.ready(), timeout=WITHIN_S)
    seen["for a GPU"] = running(names)
    # More than the spot pool holds: its twin on demand takes the rest.
    spot = [ray.util.placement_group([{"GPU": 4}]) for _ in range(MOST_NODES + 1)]
    ray.get([each.ready() for each in spot], timeout=WITHIN_S)
    seen["for more GPUs than spot has"] = running(names)
    for each in (group, *spot):
        ray.util.remove_placement_group(each)
    wait(lambda: not any(running(names).values()))
    seen["idle"] = running(names)
    return seen


def running(names: list[str]) -> dict[str, int]:
    """Node type -> machines of it that are alive."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return {name: sum(name in resources for resources in alive) for name in names}


def wait(reached: Callable[[], bool]) -> None:
    """Until it holds, or the time is over: what is seen then is judged by who asked."""
    deadline = time.monotonic() + WITHIN_S
    while not reached() and time.monotonic() < deadline:
        time.sleep(1)


if __name__ == "__main__":
    os.environ["RAY_AUTH_MODE"] = "disabled"
    main()
