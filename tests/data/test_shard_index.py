"""Samples have numbers, and come back byte for byte by ranged reads."""

from __future__ import annotations

import pickle
from pathlib import Path
from random import Random

import pytest

from tests.support.shards import PNG, count_words, run_here, scanned, tar_of, write_shards
from vladva.core import storage
from vladva.data import scan as scan_module
from vladva.data.scan import scan
from vladva.data.shard_index import ShardIndex, read_samples
from vladva.data.sidecar import SampleRef


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[bytes]]:
    """A scanned data set of 1,200 images in shards of 530, 530 and 140, and the images."""
    uri = str(tmp_path_factory.mktemp("corpus"))
    images = write_shards(uri, num_samples=1_200, samples_per_shard=530, size=(2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_run", run_here)
        summary = scan(uri, count_words)
    assert (summary.num_shards, summary.num_scanned) == (3, 3)
    assert (summary.num_samples, summary.num_quarantined, summary.reasons) == (1_200, 0, {})
    assert str(summary) == "1,200 samples in 3 shards (3 scanned now), none quarantined"
    return uri, images


def test_samples_are_numbered_by_shard_and_offset(corpus: tuple[str, list[bytes]]) -> None:
    index = ShardIndex.open(corpus[0])
    assert index.num_samples == 1_200
    everything = index.samples(0, 1_200)
    assert [ref.id for ref in everything] == [f"{i // 530:06d}.tar#{i:04d}" for i in range(1_200)]
    random = Random(0)
    edges = [(0, 1), (511, 2), (512, 1), (529, 2), (530, 1), (1_041, 3), (1_059, 3), (1_199, 1), (500, 600), (7, 0)]
    for first, count in [*edges, *((random.randrange(1_100), random.randrange(100)) for _ in range(50))]:
        assert index.samples(first, count) == everything[first : first + count]
    with pytest.raises(IndexError, match="samples 1199 to 1201 of 1200"):
        index.samples(1_199, 2)
    assert pickle.loads(pickle.dumps(index)).samples(600, 3) == everything[600:603]


def test_samples_come_back_byte_for_byte(corpus: tuple[str, list[bytes]]) -> None:
    uri, images = corpus
    index = ShardIndex.open(uri)
    refs = [*index.samples(525, 10), *index.samples(3, 4), *index.samples(1_199, 1)]
    assert read_samples(uri, refs) == [*images[525:535], *images[3:7], images[1_199]]
    assert refs[0].captions == ["image 525", "this one has number 525 of 1200"]
    assert refs[0].caption_tokens == [2, 7]


def test_a_run_is_one_read(corpus: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int | None]] = []
    read = storage.LocalDisk.read

    def counted(self: storage.LocalDisk, path: str, offset: int = 0, length: int | None = None) -> bytes:
        reads.append((offset, length))
        return read(self, path, offset, length)

    uri, images = corpus
    refs = ShardIndex.open(uri).samples(525, 10)  # over the end of a shard
    monkeypatch.setattr(storage.LocalDisk, "read", counted)
    assert read_samples(uri, refs) == images[525:535]
    assert len(reads) == 2


def test_a_shard_that_changed_after_the_scan_is_noticed(tmp_path: Path) -> None:
    content = tar_of([("a.png", PNG), ("a.txt", b"a"), ("b.png", PNG), ("b.txt", b"b")])
    rows, _ = scanned(tmp_path, content)
    refs = [SampleRef(**{name: value for name, value in row.items() if name != "key"}) for row in rows]
    (tmp_path / "a.tar").write_bytes(content.replace(PNG[40:60], PNG[40:59] + b"?", 1))
    assert read_samples(str(tmp_path), refs[1:]) == [PNG]
    with pytest.raises(ValueError, match=r"a.tar#a: changed file: not what the scan saw there"):
        read_samples(str(tmp_path), refs)
    (tmp_path / "a.tar").write_bytes(content[: refs[1].offset + 10])
    with pytest.raises(ValueError, match=r"a.tar#b: truncated file"):
        read_samples(str(tmp_path), refs[1:])
