"""Transfer: the arrays of a batch to a device, by one pinned, asynchronous copy.

A copy of its own for each small array would cost a training step some 180 of them, each waiting for the one before. So
all arrays lie in one buffer, and are views of it on the device. On a CPU there is nothing to gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 64  # bytes; more than any number needs


class Place(NamedTuple):
    """Where an array is in the buffer."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


def in_one_buffer(arrays: Mapping[str, np.ndarray]) -> tuple[Tensor, dict[str, Place]]:
    """All arrays in one buffer of bytes, and where each is."""
    places, end = {}, 0
    for name, array in arrays.items():
        places[name] = Place(end, torch.from_numpy(np.empty(0, array.dtype)).dtype, array.shape)
        end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
    whole = np.zeros(end, np.uint8)
    for name, array in arrays.items():
        offset = places[name].offset
        whole[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return torch.from_numpy(whole), places


def views_of(buffer: Tensor, places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The arrays as views of the buffer."""
    return {
        name: buffer[place.offset : place.offset + place.dtype.itemsize * int(np.prod(place.shape))]
        .view(place.dtype)
        .view(place.shape)
        for name, place in places.items()
    }


def to_device(arrays: Mapping[str, np.ndarray], device: torch.device | str) -> dict[str, Tensor]:
    """The arrays on the device; on a GPU the copy may still be under way, in the order of the current stream."""
    device = torch.device(device)
    if device.type != "cuda":
        return {name: torch.tensor(array, device=device) for name, array in arrays.items()}
    buffer, places = in_one_buffer(arrays)
    return views_of(buffer.pin_memory().to(device, non_blocking=True), places)
