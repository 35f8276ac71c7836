"""Run a function in W processes that talk over gloo on this machine.

The processes are forked from one that has imported everything already, so that many small groups cost little. Only for
scripts that tests start: a process with threads must not fork.
"""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any


def run(world: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call function(rank, *arguments) in `world` processes at a time; raises RuntimeError when one of them fails."""
    # Slow imports that DeepSpeed and the model make at their first use, once for all ranks.
    import deepspeed.runtime.zero.muon.muon_optimizer
    import peft

    assert deepspeed
    assert peft

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if child == 0:
            _run_rank(rank, world, port, function, arguments)
        children.append(child)
    statuses = [os.waitpid(child, 0)[1] for child in children]
    if any(statuses):
        raise RuntimeError(f"{function.__name__}{arguments} failed on ranks {[r for r, s in enumerate(statuses) if s]}")


def _run_rank(rank: int, world: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    import torch
    from torch import distributed

    status = 1
    try:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        torch.set_num_threads(1)
        distributed.init_process_group("gloo")
        function(rank, *arguments)
        distributed.barrier()
        distributed.destroy_process_group()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
