"""Devices: where a process computes, by what Ray assigned to it.

Ray hides the GPUs of a node from none of its processes that asked for none (since 2.60): torch sees them there, though
they are other processes'. So no actor asks torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable

NO_GPU = {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
"""Environment of a process that must find no GPU: neither torch nor DeepSpeed, which looks for one by itself."""


def assigned_device() -> str:
    """ "cuda" in a Ray process that was given a GPU; elsewhere "cpu", and every GPU is hidden from then on.

    To be called before anything has asked torch for devices. Raises ValueError where torch does not see the GPU.
    """
    import ray

    if not (ray.is_initialized() and ray.get_gpu_ids()):
        os.environ |= NO_GPU
        return "cpu"

    import torch

    if not torch.cuda.is_available():
        raise ValueError(
            f"Ray gave this process GPU {', '.join(map(str, ray.get_gpu_ids()))} of {os.uname().nodename}, but torch "
            f"{torch.__version__} finds none there: install a torch with CUDA and the driver, or ask for no GPU"
        )
    return "cuda"


def gpus_for(wanted: float | None, *, actors: int = 1) -> float:
    """GPUs of each of `actors` that hold a model: what is wanted, or else a whole one, where the cluster has any.

    Where it has fewer than actors, they share: half a GPU each, or less.
    """
    import ray

    if wanted is not None:
        return wanted
    there = int(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0
    return min(1.0, there / actors)


def say_where(tell: Callable[[str], None], gpus: float, dtype: str) -> None:
    """Tell the user where the actors compute, where that was left to us."""
    place = f"on {gpus:g} GPU an actor" if gpus else "on CPUs"
    tell(f"computing {place} in {dtype} (--gpus-per-actor, --dtype)")
