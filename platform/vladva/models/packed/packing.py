"""Packing: a padded batch of prompts -> groups of like length, in which every token is there once and none is padding.

A token is the same as another if it and all before it are. Prompts are sorted, and each takes what it begins with from
the prompt before it, up to its first image. A few tokens that nothing looks at fill a group, and its prompts, up to
one of few sizes: a CPU's products are compiled, and kept, for every size that they meet (2 ms, as long as many run).

B prompts, T tokens of the longest (and a few more), N different tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Packed:
    """A group of prompts as N tokens, each of them once; the last ones may be there for the size alone."""

    prompts: torch.Tensor  # [B] their rows in the batch
    ids: torch.Tensor  # [N]
    index: torch.Tensor  # [B, T] the place of each token among the N; of padding, any
    place: torch.Tensor  # [N] the place of each token among the B * T; 0 for those of no prompt
    own: int  # tokens of prompts among the N
    lengths: torch.Tensor  # [B]
    is_image: torch.Tensor  # bool [N]
    feature: torch.Tensor  # the image features, by number, of those

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if name != "own"}
        return Packed(**tensors, own=self.own)

    def positions(self, positions: torch.Tensor) -> torch.Tensor:
        """Those of the group's prompts [3, B, T], of positions [3, rows, tokens] of the batch."""
        steps = torch.arange(self.index.shape[1], device=positions.device).clamp_(max=positions.shape[2] - 1)
        return positions[:, self.prompts[:, None], steps]


def groups(lengths: np.ndarray, limit: int, threads: int = 1) -> Iterator[np.ndarray]:
    """Rows of each group: like lengths together, about `limit` tokens at most, and about equally many.

    More groups than one are as many as `threads` can share evenly.
    """
    order = np.argsort(lengths, kind="stable")
    number = max(1, -(-int(lengths.sum()) // limit))
    if number > threads:
        number = -(-number // threads) * threads
    shares = np.minimum(lengths[order].cumsum() * number // (lengths.sum() + 1), number - 1)
    for share in range(number):
        rows = order[shares == share]
        if len(rows):
            yield rows


def pack(ids_BT: np.ndarray, lengths: np.ndarray, rows: np.ndarray, image_token: int) -> Packed:
    """Pack some rows of a batch; a prompt takes the tokens that it begins with from the prompt before it, if it can."""
    longest = int(lengths[rows].max())
    rows = rows[np.lexsort(ids_BT[rows, :longest].T[::-1])]
    width = full(longest)
    ids = np.pad(ids_BT[rows, :longest], ((0, 0), (0, width - longest)))
    is_image, lengths = ids == image_token, lengths[rows]
    inside = np.arange(width) < lengths[:, None]
    same = (ids[1:] == ids[:-1]) & ~is_image[1:] & inside[1:] & inside[:-1]
    shared = np.zeros_like(inside)
    shared[1:] = np.logical_and.accumulate(same, axis=1)
    own = inside & ~shared
    index = own.ravel().cumsum().reshape(own.shape) - 1
    index = np.maximum.accumulate(np.where(own, index, 0), axis=0)  # the nearest prompt before it that has it itself
    number_BT = (ids_BT == image_token).ravel().cumsum().reshape(ids_BT.shape) - 1  # of the image feature
    count = int(own.sum())
    filling = (0, full(count) - count)
    arrays = {
        "prompts": rows,
        "ids": np.pad(ids[own], filling),
        "index": index,
        "place": np.pad(np.flatnonzero(own), filling),
        "lengths": lengths,
        "is_image": np.pad(is_image[own], filling),
        "feature": number_BT[rows, :longest][(own & is_image)[:, :longest]],
    }
    tensors = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}
    return Packed(**tensors, own=count)


def full(tokens: int) -> int:
    """The least size that is not below: there are eight between a power of two and the next."""
    step = 2 ** max(0, tokens.bit_length() - 4)
    return -(-tokens // step) * step
