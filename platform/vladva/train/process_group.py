"""Process group: the workers of a run meet on the network that Ray uses, and the run says which of them is where."""

from __future__ import annotations

import os
import platform
import socket
from dataclasses import dataclass
from typing import Any

from ray.train.torch import TorchConfig
from ray.train.torch.config import _TorchBackend

from vladva.train.worker_places import WorkerPlace, write_places

INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass
class RayNetworkConfig(TorchConfig):
    """PyTorch's process group, on the interface that holds the node's address in Ray.

    Left alone, Gloo binds to whatever the machine's own name resolves to, which Debian makes 127.0.1.1: no other node
    reaches that. Interfaces that the environment names already are kept.
    """

    run_uri: str = ""

    @property
    def backend_cls(self) -> type:
        return _RayNetworkBackend


class _RayNetworkBackend(_TorchBackend):
    def on_start(self, worker_group: Any, backend_config: RayNetworkConfig) -> None:  # type: ignore[override]
        found = worker_group.execute(join_ray_network)
        places = [WorkerPlace(rank, *place) for rank, place in enumerate(found)]
        write_places(backend_config.run_uri, places)
        super().on_start(worker_group, backend_config)


def join_ray_network() -> tuple[str, str, str, tuple[int, ...]]:
    """Set the interface of this worker's process group; returns the fields of its WorkerPlace after the rank."""
    import ray
    import ray.util

    address = ray.util.get_node_ip_address()
    interface = interface_of(address)
    if interface:
        for variable in INTERFACE_VARIABLES:
            os.environ.setdefault(variable, interface)
    gpus = tuple(int(gpu) for gpu in ray.get_gpu_ids())
    return platform.node(), address, os.environ.get(INTERFACE_VARIABLES[0], ""), gpus


def interface_of(address: str) -> str:
    """Name of the network interface that holds an address; empty if none does."""
    import psutil

    families = (socket.AF_INET, socket.AF_INET6)
    for name, addresses in psutil.net_if_addrs().items():
        if any(held.family in families and held.address.partition("%")[0] == address for held in addresses):
            return name
    return ""
