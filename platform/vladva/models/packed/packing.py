"""Packing: a padded batch of prompts -> groups of like length, in which every token is there once and none is padding.

A token is the same as another if it and all before it are. Prompts are sorted, and each takes what it begins with from
the prompt before it, up to its first image. So the tokens of a group are the nodes of a tree of prompts: `gather_index`
leads from a prompt's token to the node, `source_index` from a node to the first prompt that has it.

On a CPU a few tokens that nothing reads fill a group, and its prompts, up to one of few sizes: oneDNN compiles, and
keeps, a product for every size that it meets (2 ms, as long as many run). A GPU's kernels take any size.

B prompts, T tokens of the longest (and a few more), N different tokens (and a few more).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from vladva.models.transfer import to_device


@dataclass(frozen=True)
class Packed:
    """A group of prompts as N tokens, each of them once; the last ones may be there for the size alone."""

    prompts: torch.Tensor  # [B] their rows in the batch
    ids: torch.Tensor  # [N]
    gather_index: torch.Tensor  # [B, T] which of the N each token is; of padding, any
    source_index: torch.Tensor  # [N] a position among the B * T where each token is; 0 for those of no prompt
    num_unique: int  # tokens of prompts among the N
    lengths: torch.Tensor  # [B]
    image_index: torch.Tensor  # [K] which of the N the K image tokens are
    feature: torch.Tensor  # [K] which image feature of the batch each of them takes

    def arrays(self) -> dict[str, np.ndarray]:
        """All tensors, of a group that is on the host."""
        return {name: value.numpy() for name, value in vars(self).items() if name != "num_unique"}

    def to(self, device: torch.device) -> Packed:
        """The same, of a group that is on the host, on a device."""
        if device.type == "cpu":
            return self
        return Packed(**to_device(self.arrays(), device), num_unique=self.num_unique)

    def positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Those of the group's prompts [3, B, T], of positions [3, rows, tokens] of the batch."""
        steps = torch.arange(self.gather_index.shape[1], device=positions.device).clamp_(max=positions.shape[2] - 1)
        return positions[:, self.prompts[:, None], steps]


def groups(lengths: np.ndarray, limit: int, threads: int = 1, *, padding: float = math.inf) -> Iterator[np.ndarray]:
    """Rows of each group: like lengths together, about `limit` tokens at most, and about equally many.

    More groups than one are as many as `threads` can share evenly. Of these, one is cut where its rows would be padded
    by more than `padding` tokens: thirty short prompts and a long one are attended to as thirty-one long ones.
    """
    order = np.argsort(lengths, kind="stable")
    number = max(1, -(-int(lengths.sum()) // limit))
    if number > threads:
        number = -(-number // threads) * threads
    shares = np.minimum(lengths[order].cumsum() * number // (lengths.sum() + 1), number - 1)
    for share in range(number):
        rows = order[shares == share]
        if len(rows):
            yield from _of_like_lengths(rows, lengths[rows].tolist(), padding)


def _of_like_lengths(rows: np.ndarray, lengths: list[int], padding: float) -> Iterator[np.ndarray]:
    """Runs of rows, given in the order of their lengths, that are padded by at most `padding` tokens."""
    first, padded = 0, 0
    for number in range(1, len(rows)):
        padded += (number - first) * (lengths[number] - lengths[number - 1])  # those before it become as long
        if padded > padding:
            yield rows[first:number]
            first, padded = number, 0
    yield rows[first:]


def pack(
    ids_BT: np.ndarray, lengths: np.ndarray, rows: np.ndarray, image_token: int, *, few_sizes: bool = True
) -> Packed:
    """Pack some rows of a batch; a prompt takes the tokens that it begins with from the prompt before it, if it can.

    few_sizes: fill B * T and N up to `round_up`, as a CPU wants it.
    """
    longest = int(lengths[rows].max())
    # Sorted, prompts that begin alike are neighbours.
    rows = rows[np.lexsort(ids_BT[rows, :longest].T[::-1])]
    width = round_up(longest) if few_sizes else longest
    ids = np.pad(ids_BT[rows, :longest], ((0, 0), (0, width - longest)))
    is_image, lengths = ids == image_token, lengths[rows]
    inside = np.arange(width) < lengths[:, None]

    # A token is shared if it, and all before it, are those of the prompt before; no image token is.
    same = (ids[1:] == ids[:-1]) & ~is_image[1:] & inside[1:] & inside[:-1]
    shared = np.zeros_like(inside)
    shared[1:] = np.logical_and.accumulate(same, axis=1)
    unique = inside & ~shared

    # Unique tokens are numbered in order; a shared one has the number of the nearest prompt before it that has its own.
    gather_index = unique.ravel().cumsum().reshape(unique.shape) - 1
    gather_index = np.maximum.accumulate(np.where(unique, gather_index, 0), axis=0)

    # Image features are numbered over the whole batch, which the vision tower has seen at once.
    feature_BT = (ids_BT == image_token).ravel().cumsum().reshape(ids_BT.shape) - 1
    num_unique = int(unique.sum())
    filling = (0, round_up(num_unique) - num_unique if few_sizes else 0)
    arrays = {
        "prompts": rows,
        "ids": np.pad(ids[unique], filling),
        "gather_index": gather_index,
        "source_index": np.pad(np.flatnonzero(unique), filling),
        "lengths": lengths,
        "image_index": np.flatnonzero(is_image[unique]),
        "feature": feature_BT[rows, :longest][(unique & is_image)[:, :longest]],
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return Packed(**tensors, num_unique=num_unique)


def round_up(tokens: int) -> int:
    """The least size that is not below: there are eight between a power of two and the next."""
    step = 2 ** max(0, tokens.bit_length() - 4)
    return -(-tokens // step) * step
