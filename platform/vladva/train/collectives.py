"""Collectives: what the ranks of a run exchange. W ranks; outside a process group W is 1 and nothing is exchanged."""

from __future__ import annotations

import torch
from torch import Tensor, distributed

from vladva.core.ranks import rank_and_world


def gather(local: Tensor) -> Tensor:
    """Rows of all ranks, [n, ...] -> [W n, ...], in the order of ranks; only the rank's own rows carry gradient."""
    rank, world = rank_and_world()
    if world == 1:
        return local
    parts = [torch.empty_like(local) for _ in range(world)]
    distributed.all_gather(parts, local.detach().contiguous())
    parts[rank] = local
    return torch.cat(parts)


def gather_ragged(local: Tensor) -> Tensor:
    """As `gather`, where ranks have different numbers of rows, or none."""
    if rank_and_world()[1] == 1:
        return local
    counts = gather(torch.tensor([len(local)], device=local.device)).tolist()
    padded = torch.cat([local, local.new_zeros(max(counts) - len(local), *local.shape[1:])])
    rows = gather(padded).view(len(counts), *padded.shape)
    return torch.cat([part[:count] for part, count in zip(rows, counts, strict=True)])


def all_reduce_sum(value: Tensor) -> Tensor:
    """Sum over the ranks, without gradient."""
    value = value.detach().clone()
    if rank_and_world()[1] > 1:
        distributed.all_reduce(value)
    return value
