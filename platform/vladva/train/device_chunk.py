"""A chunk's arrays on the device: one pinned, asynchronous copy a chunk, the next one's while this one is computed.

A copy of its own for each small array would cost a step some 180 of them, each waiting for the one before. So all
arrays of a chunk lie in one buffer, and are views of it on the device. On a CPU there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vladva.models.batch import as_tensors

if TYPE_CHECKING:
    from vladva.models.batch import MicroBatch

ALIGNMENT = 64  # bytes; more than any number needs


class Place(NamedTuple):
    """Where an array is in the buffer."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class DeviceChunk:
    """What the model's forward takes of a chunk: tokens of images and texts, and pixels where they are asked for."""

    image: dict[str, Tensor]
    text: dict[str, Tensor]
    pixels: dict[str, Tensor] | None


def arrays_of(chunk: MicroBatch, *, with_pixels: bool) -> dict[str, np.ndarray]:
    """The chunk's arrays, by record and field."""
    records = {"image": chunk.image, "text": chunk.text}
    if with_pixels and chunk.pixels is not None:
        records["pixels"] = chunk.pixels  # type: ignore[assignment]  # records of arrays alike
    return {f"{name}.{f.name}": getattr(record, f.name) for name, record in records.items() for f in fields(record)}


def in_one_buffer(arrays: dict[str, np.ndarray]) -> tuple[Tensor, dict[str, Place]]:
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


def views_of(buffer: Tensor, places: dict[str, Place]) -> dict[str, Tensor]:
    """The arrays as views of the buffer."""
    return {
        name: buffer[place.offset : place.offset + place.dtype.itemsize * int(np.prod(place.shape))]
        .view(place.dtype)
        .view(place.shape)
        for name, place in places.items()
    }


def on_device(chunk: MicroBatch, device: torch.device, *, with_pixels: bool) -> DeviceChunk:
    """The chunk on the device; on a GPU the copy may still be under way, in the order of the current stream."""
    if device.type != "cuda":
        pixels = as_tensors(chunk.pixels, device) if with_pixels and chunk.pixels is not None else None
        return DeviceChunk(as_tensors(chunk.image, device), as_tensors(chunk.text, device), pixels)
    buffer, places = in_one_buffer(arrays_of(chunk, with_pixels=with_pixels))
    return from_parts(views_of(buffer.pin_memory().to(device, non_blocking=True), places))


def from_parts(tensors: dict[str, Tensor]) -> DeviceChunk:
    """The records of the tensors named `record.field`."""
    records: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        record, _, field = name.partition(".")
        records.setdefault(record, {})[field] = tensor
    return DeviceChunk(records["image"], records["text"], records.get("pixels"))


def feed(wanted: Iterable[tuple[MicroBatch, bool]], device: torch.device) -> Iterator[DeviceChunk]:
    """The chunks on the device, in order, each with its pixels or not; the next is copied while one is computed."""
    if device.type != "cuda" or not torch.cuda.is_available():  # not there: a rehearsal on pretended devices
        yield from (on_device(chunk, device, with_pixels=with_pixels) for chunk, with_pixels in wanted)
        return
    computing, copying = torch.cuda.current_stream(device), torch.cuda.Stream(device)

    def copied(chunk: MicroBatch, with_pixels: bool) -> tuple[DeviceChunk, torch.cuda.Event]:
        with torch.cuda.stream(copying):
            return on_device(chunk, device, with_pixels=with_pixels), copying.record_event()

    ahead = (copied(*each) for each in wanted)
    following = next(ahead, None)
    while following is not None:
        found, done = following
        following = next(ahead, None)
        computing.wait_event(done)
        for part in (found.image, found.text, found.pixels or {}):
            for tensor in part.values():
                tensor.record_stream(computing)  # or its memory might be given to the next copy too early
        yield found
