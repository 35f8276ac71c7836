"""Shared paths: what one node of a real cluster of two does not see is refused before any work."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from vladva.core import shared_path
from vladva.core.shared_path import check_paths, refuse_temporary


def test_a_job_without_ray_checks_nothing_but_the_place(tmp_path: Path) -> None:
    check_paths(reads=[("--data", str(tmp_path / "none"))], writes=[("--out", str(tmp_path / "out"))])
    assert not list(tmp_path.iterdir())


def test_the_copy_of_the_working_directory_is_no_place_for_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "runtime_resources/working_dir_files/_ray_pkg_0123"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    with pytest.raises(ValueError, match=r"storage '.vladva/tiny' is in the uploaded copy .* use s3://"):
        check_paths(writes=[("storage", ".vladva/tiny")])
    refuse_temporary("storage", "s3://bucket/runs")
    refuse_temporary("storage", str(tmp_path / "runs"))


class TestOtherNode:
    """What a node without the driver's disk answers: `unseen` with the files gone, changed or as they are."""

    def test_the_same_disk(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/one.tar").write_bytes(b"1234")
        probes = [shared_path._existing("--data", str(tmp_path / "data")), shared_path._write("--out", str(tmp_path))]
        assert shared_path.unseen(probes) == {}

    def test_another_disk(self, tmp_path: Path) -> None:
        (tmp_path / "data").mkdir()
        (tmp_path / "data/one.tar").write_bytes(b"1234")
        probes = [shared_path._existing("--data", str(tmp_path / "data")), shared_path._write("--out", str(tmp_path))]
        (tmp_path / "data/one.tar").write_bytes(b"123")  # a folder of the same name, with other files
        os.remove(probes[1].file)
        assert shared_path.unseen(probes) == {0: "another content, or none", 1: "no such file"}

    def test_a_copy_of_the_folder_is_not_the_folder(self, tmp_path: Path) -> None:
        probe = shared_path._write("--out", str(tmp_path))
        Path(probe.file).write_bytes(bytes(32))
        assert shared_path.unseen([probe]) == {0: "another content, or none"}


def test_a_probe_leaves_nothing(tmp_path: Path) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    old.mkdir()
    (old / "kept").write_text("")
    for folder in (new, old):
        shared_path._remove(shared_path._write("--out", str(folder)))
    assert [path.name for path in tmp_path.rglob("*")] == ["old", "kept"]


def test_a_folder_that_cannot_be_written_names_its_field(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="--out .* cannot be written"):
        shared_path._write("--out", str(tmp_path / "file/out"))


@pytest.fixture
def two_nodes(ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The one node of the tests' Ray asked as if it were another: the question and the answer go through Ray."""
    import ray

    own = ray.get_runtime_context().get_node_id()
    monkeypatch.setattr(shared_path, "_other_nodes", lambda: {own: "10.0.0.2"})
    return


def test_through_ray(two_nodes: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/one.tar").write_bytes(b"1234")
    check_paths(reads=[("--data", str(tmp_path / "data"))], writes=[("--out", str(tmp_path / "out"))])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]

    there = shared_path._existing("--data", str(tmp_path / "data"))
    monkeypatch.setattr(shared_path, "_existing", lambda field, uri: there._replace(size=5))
    with pytest.raises(ValueError, match=r"--data .* is not the same on every node: .* not seen on 10\.0\.0\.2 "):
        check_paths(reads=[("--data", str(tmp_path / "data"))], writes=[("--out", str(tmp_path / "out"))])
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
