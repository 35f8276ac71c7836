"""A chunk in one buffer is the chunk: every array, of every type, whatever its length."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vladva.data.examples import Example
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import render
from vladva.models.batch import MicroBatch, as_tensors
from vladva.models.preprocessor import Preprocessor
from vladva.models.transfer import ALIGNMENT, in_one_buffer, views_of
from vladva.train.device_chunk import arrays_of, feed, from_parts, on_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def chunks(tiny: str) -> list[MicroBatch]:
    """Three chunks of two scenes; one of texts."""
    preprocessor = Preprocessor(tiny)
    rows = [
        Example(str(number), render(scene), "a scene", "and what there is in it")
        for number, (scene, _) in zip(range(6), scenes("train"), strict=False)
    ]
    found = [preprocessor.collate(number, rows[2 * number : 2 * number + 2]) for number in range(3)]
    return [*found, preprocessor.collate(3, [Example("t", "a text", "another", None)])]


def test_every_array_is_a_view_of_the_buffer(chunks: list[MicroBatch]) -> None:
    for chunk in chunks:
        buffer, places = in_one_buffer(arrays_of(chunk, with_pixels=True))
        assert all(place.offset % ALIGNMENT == 0 for place in places.values())
        tensors = views_of(buffer, places)
        start = buffer.untyped_storage().data_ptr()
        assert all(tensor.untyped_storage().data_ptr() == start for tensor in tensors.values())
        found = from_parts(tensors)
        for part, record in ((found.image, chunk.image), (found.text, chunk.text), (found.pixels, chunk.pixels)):
            if record is None:
                assert part is None
                continue
            expected = as_tensors(record, CPU)
            assert part.keys() == expected.keys()
            for name, tensor in part.items():
                assert tensor.dtype == expected[name].dtype
                assert torch.equal(tensor, expected[name])


def test_arrays_of_all_types_and_lengths_stay_apart() -> None:
    arrays = {
        "a.bytes": np.arange(7, dtype=np.uint8),
        "a.flags": np.array([True, False, True]),
        "a.none": np.zeros((0, 3), np.int64),
        "a.numbers": np.arange(6, dtype=np.int64).reshape(2, 3),
        "a.turned": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a.one": np.array(5, np.int64),
    }
    tensors = views_of(*in_one_buffer(arrays))
    for name, array in arrays.items():
        assert torch.equal(tensors[name], torch.from_numpy(np.ascontiguousarray(array)).reshape(array.shape)), name


def test_chunks_come_in_order_with_pixels_where_they_are_wanted(chunks: list[MicroBatch]) -> None:
    wanted = [(chunks[0], True), (chunks[1], False), (chunks[2], True), (chunks[3], True)]
    fed = list(feed(wanted, CPU))
    for found, (chunk, with_pixels) in zip(fed, wanted, strict=True):
        alone = on_device(chunk, CPU, with_pixels=with_pixels)
        assert torch.equal(found.image["ids"], alone.image["ids"])
        assert (found.pixels is None) == (not with_pixels or chunk.pixels is None)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_it_is_the_same(chunks: list[MicroBatch]) -> None:
    device = torch.device("cuda")
    for found, chunk in zip(feed([(chunk, True) for chunk in chunks], device), chunks, strict=True):
        for part, record in ((found.image, chunk.image), (found.text, chunk.text), (found.pixels, chunk.pixels)):
            for name, tensor in (part or {}).items():
                expected = as_tensors(record, CPU)[name.removeprefix("host_")]  # what the host keeps besides
                assert torch.equal(tensor.cpu(), expected)
