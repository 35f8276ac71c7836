"""A chunk's arrays on the device: one pinned, asynchronous copy a chunk, the next one's while this one is computed.

Packing reads token ids on the host, so the host's own arrays go with the device's. On a CPU there is nothing to copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vladva.models.batch import on_host
from vladva.models.transfer import to_device

if TYPE_CHECKING:
    from vladva.models.batch import MicroBatch


@dataclass
class DeviceChunk:
    """What the model's forward takes of a chunk: tokens of images and texts, and pixels where they are asked for."""

    image: dict[str, Tensor]
    text: dict[str, Tensor]
    pixels: dict[str, Tensor] | None
    text_pixels: dict[str, Tensor] | None  # of positives that are images


def arrays_of(chunk: MicroBatch, *, with_pixels: bool) -> dict[str, np.ndarray]:
    """The chunk's arrays, by record and field; with the pixels of its queries or without."""
    records = {"image": chunk.image, "text": chunk.text}
    if with_pixels and chunk.pixels is not None:
        records["pixels"] = chunk.pixels  # type: ignore[assignment]  # records of arrays alike
    if chunk.text_pixels is not None:
        records["text_pixels"] = chunk.text_pixels  # type: ignore[assignment]
    return {f"{name}.{f.name}": getattr(record, f.name) for name, record in records.items() for f in fields(record)}


def on_device(chunk: MicroBatch, device: torch.device, *, with_pixels: bool) -> DeviceChunk:
    """The chunk on the device; on a GPU the copy may still be under way, in the order of the current stream."""
    there = from_parts(to_device(arrays_of(chunk, with_pixels=with_pixels), device))
    if device.type != "cpu":
        there.image |= on_host(chunk.image)
        there.text |= on_host(chunk.text)
        for tensors, pixels in ((there.pixels, chunk.pixels), (there.text_pixels, chunk.text_pixels)):
            if tensors is not None and pixels is not None:
                tensors.update(on_host(pixels))
    return there


def from_parts(tensors: dict[str, Tensor]) -> DeviceChunk:
    """The records of the tensors named `record.field`."""
    records: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        record, _, field = name.partition(".")
        records.setdefault(record, {})[field] = tensor
    return DeviceChunk(records["image"], records["text"], records.get("pixels"), records.get("text_pixels"))


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
        for part in (found.image, found.text, found.pixels or {}, found.text_pixels or {}):
            for tensor in part.values():
                if tensor.is_cuda:
                    tensor.record_stream(computing)  # or its memory might be given to the next copy too early
        yield found
