"""The writer's tars: of the given size, the same bytes for the same samples, complete or not there."""

from __future__ import annotations

import json
import os
import tarfile
from pathlib import Path

import pytest

from tests.support.shards import write_shards
from vladva.data.shard_writer import ShardWriter


def test_shards_are_tars_of_the_given_size(tmp_path: Path) -> None:
    images = write_shards(str(tmp_path / "new/folder"), num_samples=10, samples_per_shard=4)
    files = sorted((tmp_path / "new/folder").iterdir())
    assert [file.name for file in files] == ["000000.tar", "000001.tar", "000002.tar"]
    found = []
    for file in files:
        with tarfile.open(file) as tar:
            found.append({member.name: tar.extractfile(member).read() for member in tar})  # type: ignore[union-attr]
    assert [len(shard) for shard in found] == [8, 8, 4]
    assert found[1]["0004.png"] == images[4]
    assert json.loads(found[2]["0009.json"])["captions"][0] == "image 9"


def test_the_same_samples_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shards(str(tmp_path / "a"), 3, 4)
    monkeypatch.setattr("time.time", lambda: 1e9)
    os.umask(os.umask(0o077))
    write_shards(str(tmp_path / "b"), 3, 4)
    assert (tmp_path / "a/000000.tar").read_bytes() == (tmp_path / "b/000000.tar").read_bytes()


def test_an_exception_leaves_only_complete_shards(tmp_path: Path) -> None:
    def write_three_and_fail() -> None:
        with ShardWriter(str(tmp_path), 2) as writer:
            for key in ("0", "1", "2"):
                writer.write(key, {"txt": b"caption"})
            raise KeyError

    with pytest.raises(KeyError):
        write_three_and_fail()
    assert os.listdir(tmp_path) == ["000000.tar"]


@pytest.mark.parametrize("key", ["a.b", "folder/a.b", ""])
def test_a_key_that_would_be_cut_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="first dot"):
        ShardWriter(str(tmp_path), 2).write(key, {"txt": b"caption"})
