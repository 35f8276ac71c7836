"""Packing: a padded batch of prompts -> groups of like length, in which every token is there once and none is padding.

A token is the same as another if it and all before it are. Prompts are sorted, and each takes what it begins with from
the prompt before it, up to its first picture.

B prompts, T tokens of the longest, N different tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Packed:
    """A group of prompts as N tokens, each of them once."""

    prompts: torch.Tensor  # [B] their rows in the batch
    ids: torch.Tensor  # [N]
    index: torch.Tensor  # [B, T] the place of each token among the N; of padding, any
    place: torch.Tensor  # [N] the place of each token among the B * T
    lengths: torch.Tensor  # [B]
    is_image: torch.Tensor  # bool [N]
    feature: torch.Tensor  # the image features, by number, of those

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        return Packed(**{name: value.to(device) for name, value in vars(self).items()})


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
    is_image_BT = ids_BT == image_token
    number_BT = is_image_BT.ravel().cumsum().reshape(ids_BT.shape) - 1  # of the image feature
    longest = int(lengths[rows].max())
    rows = rows[np.lexsort(ids_BT[rows, :longest].T[::-1])]
    ids, is_image, lengths = ids_BT[rows, :longest], is_image_BT[rows, :longest], lengths[rows]
    inside = np.arange(longest) < lengths[:, None]
    same = (ids[1:] == ids[:-1]) & ~is_image[1:] & inside[1:] & inside[:-1]
    shared = np.zeros_like(inside)
    shared[1:] = np.logical_and.accumulate(same, axis=1)
    own = inside & ~shared
    index = own.ravel().cumsum().reshape(own.shape) - 1
    index = np.maximum.accumulate(np.where(own, index, 0), axis=0)  # the nearest prompt before it that has it itself
    arrays = (
        rows,
        ids[own],
        index,
        np.flatnonzero(own),
        lengths,
        is_image[own],
        number_BT[rows, :longest][own & is_image],
    )
    return Packed(*(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays))
