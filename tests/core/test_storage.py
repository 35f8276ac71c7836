"""Storage: local paths against the operating system, S3 against a real server with a proxy that injects faults."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
from pyarrow import fs

from tests.support.s3_server import BUCKET, FaultyProxy, faulty_proxy, s3_server
from vladva.core import object_store, storage
from vladva.core.storage import ByteRange


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProxy]:
    """A proxy in front of a real S3 server; AWS_* variables lead to the proxy."""
    with (
        s3_server(tmp_path_factory.mktemp("s3")) as variables,
        faulty_proxy(variables["AWS_ENDPOINT_URL"]) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in (variables | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        patch.setattr(storage, "FIRST_PAUSE", 0.01)
        yield proxy


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty folder, once on disk and once in S3."""
    if request.param == "s3":
        request.getfixturevalue("proxy")
        return f"s3://{BUCKET}/{tmp_path.name}"
    return str(tmp_path)


def noise(length: int, seed: int = 0) -> bytes:
    return Random(seed).randbytes(length)


# --- URIs ------------------------------------------------------------------------------------------------------------


def test_one_file_has_the_same_path_in_every_local_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for uri in (str(tmp_path / "a/b"), f"file://{tmp_path}/a/b", "a/b", "./a/b"):
        filesystem, path = storage.open_storage(uri)
        assert isinstance(filesystem, fs.LocalFileSystem)
        assert path == str(tmp_path / "a/b")
        assert storage.absolute(uri) == str(tmp_path / "a/b")


@pytest.mark.parametrize("uri", ["gs://bucket/key", "s3://", "s3:///key", "file://host/path", "http://host/path"])
def test_a_uri_that_cannot_be_read_is_refused_by_name(uri: str) -> None:
    with pytest.raises(ValueError, match=r"s3://bucket/key") as caught:
        storage.read_bytes(uri)
    assert uri in str(caught.value)


def test_join() -> None:
    assert storage.join("s3://bucket/", "a", "/b/") == "s3://bucket/a/b"
    assert storage.join("/data", "a.tar") == "/data/a.tar"


# --- whole objects, on disk and in S3 --------------------------------------------------------------------------------


def test_what_is_written_is_read_and_listed(folder: str) -> None:
    assert storage.list_files(folder) == []
    contents = {"b.tar": noise(10), "a/c.tar": b"", "a.txt.gz": noise(100_000)}
    for name, data in contents.items():
        storage.write_bytes_atomically(storage.join(folder, name), data)
    for name, data in contents.items():
        assert storage.read_bytes(storage.join(folder, name)) == data
    assert storage.list_files(folder) == [storage.join(folder, name) for name in ("a.txt.gz", "a/c.tar", "b.tar")]
    assert storage.list_files(folder, ".tar") == [storage.join(folder, name) for name in ("a/c.tar", "b.tar")]
    assert [info.size for info in storage.list_infos(folder)] == [100_000, 0, 10]
    assert storage.exists(storage.join(folder, "a"))
    assert storage.exists(storage.join(folder, "a/c.tar"))
    assert not storage.exists(storage.join(folder, "a/d.tar"))
    storage.write_bytes_atomically(storage.join(folder, "b.tar"), b"new")
    assert storage.read_bytes(storage.join(folder, "b.tar")) == b"new"
    storage.delete_file(storage.join(folder, "b.tar"))
    assert not storage.exists(storage.join(folder, "b.tar"))


def test_json_keeps_every_character(folder: str) -> None:
    uri = storage.join(folder, "deep/er.json")
    storage.write_json(uri, {"caption": "grüne Äpfel 苹果", "counts": [1, 2.5, None]})
    assert storage.read_json(uri) == {"caption": "grüne Äpfel 苹果", "counts": [1, 2.5, None]}


def test_a_missing_file_is_file_not_found(folder: str) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(folder, "none"))
    with pytest.raises(FileNotFoundError):
        storage.read_ranges([ByteRange(storage.join(folder, "none"), 0, 1)])


def test_an_interrupted_write_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "state.json")
    storage.write_bytes_atomically(uri, b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        storage.write_bytes_atomically(uri, b"new")
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["state.json"]


# --- ranges ----------------------------------------------------------------------------------------------------------


def test_ranges_equal_slices(folder: str) -> None:
    random = Random(1)
    files = {storage.join(folder, f"{number}.bin"): noise(300_000, seed=number) for number in range(3)}
    for uri, data in files.items():
        storage.write_bytes_atomically(uri, data)
    ranges = []
    for _ in range(60):
        offset = random.randrange(300_000)
        ranges.append(ByteRange(random.choice(list(files)), offset, random.randrange(300_001 - offset)))
    ranges += [ranges[0], ByteRange(next(iter(files)), 0, 0), ByteRange(next(iter(files)), 0, 300_000)]
    assert storage.read_ranges(ranges) == [files[uri][start : start + count] for uri, start, count in ranges]
    assert storage.read_ranges([]) == []


def test_a_range_past_the_end_is_an_error(folder: str) -> None:
    uri = storage.join(folder, "file")
    storage.write_bytes_atomically(uri, noise(100))
    for offset in (90, 200):
        with pytest.raises(EOFError, match=r"ends (at 100|before the bytes)"):
            storage.read_ranges([ByteRange(uri, offset, 11)])


def test_a_stream_reads_blocks_and_seeks(folder: str) -> None:
    data, uri = noise(100_000), storage.join(folder, "file")
    storage.write_bytes_atomically(uri, data)
    with storage.open_stream(uri, 1_000) as stream:
        assert stream.read(10) == data[:10]
        assert stream.read(5_000) == data[10:5_010]
        assert stream.seek(90_000) == 90_000
        assert stream.read() == data[90_000:]
        assert stream.seek(-5, os.SEEK_END) == 99_995
        assert stream.read(10) == data[-5:]
        assert stream.seek(200_000) == 200_000
        assert stream.read(1) == b""


def gets(proxy: FaultyProxy) -> list[str | None]:
    return [part for method, part, _ in proxy.requests if method == "GET"]


def test_neighbours_share_a_request(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = f"s3://{BUCKET}/ranges.bin"
    data = noise(1 << 20)
    storage.write_bytes_atomically(uri, data)
    proxy.requests.clear()
    near = [ByteRange(uri, 1_000 * number, 900) for number in (2, 0, 1)]
    far = ByteRange(uri, 900_000, 50)
    parts = storage.read_ranges([*near, far])
    assert parts == [data[start : start + count] for _, start, count in (*near, far)]
    assert sorted(gets(proxy), key=str) == ["bytes=0-2899", "bytes=900000-900049"]
    assert {method for method, _, _ in proxy.requests} == {"GET"}  # nothing is asked beside the bytes
    monkeypatch.setattr(storage, "MAX_GAP", 99)  # one byte less than the gap
    proxy.requests.clear()
    assert storage.read_ranges(near) == parts[:3]
    assert len(gets(proxy)) == 3


# --- faults ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def impatient(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyProxy]:
    """The proxy, to clients that take a second without a byte for a stall, during one test."""
    monkeypatch.setattr(object_store, "REQUEST_TIMEOUT_S", 1.0)
    storage._s3.cache_clear()
    yield proxy
    storage._s3.cache_clear()


@pytest.mark.parametrize("fault", ["503", "reset", "truncate", "short", "stall"])
def test_every_fault_is_retried_and_logged(
    fault: str, impatient: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    uri, data = f"s3://{BUCKET}/faults-{fault}.bin", noise(50_000)
    storage.write_bytes_atomically(uri, data)
    ranges = [ByteRange(uri, 0, 40_000)]
    with caplog.at_level(logging.WARNING, logger="vladva.core.storage"):
        impatient.faults = iter([fault])
        assert storage.read_ranges(ranges) == [data[:40_000]]
        impatient.faults = iter([fault])
        assert storage.read_bytes(uri) == data
    assert len(caplog.records) == 2
    assert all(uri in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(("fault", "retries"), [("truncate", 1), ("stall", 3)])  # half an error says its status
@pytest.mark.slow
def test_faults_in_answers_that_are_no_objects_are_retried(
    fault: str, retries: int, impatient: FaultyProxy, caplog: pytest.LogCaptureFixture
) -> None:
    folder = f"s3://{BUCKET}/answers-{fault}"
    storage.write_bytes_atomically(f"{folder}/file", b"")
    with caplog.at_level(logging.WARNING, logger="vladva.core.storage"):
        impatient.faults = iter([fault])
        assert storage.list_files(folder) == [f"{folder}/file"]
        impatient.faults = iter([fault])
        with pytest.raises(FileNotFoundError):
            storage.read_bytes(f"{folder}/nothing")
        impatient.faults = iter([fault])
        assert storage.read_bytes(f"{folder}/file") == b""  # the server says 416
    assert len(caplog.records) == retries


@pytest.mark.slow
@pytest.mark.parametrize("place", range(4))  # of the first fault, in the order of requests
def test_the_filesystem_of_other_libraries_survives_faults_in_another_process(place: int, proxy: FaultyProxy) -> None:
    filesystem, path = storage.open_storage(f"s3://{BUCKET}/library-{place}")
    filesystem = pickle.loads(pickle.dumps(filesystem))
    proxy.faults = iter(["ok"] * place + ["503"] * 3)
    filesystem.create_dir(path)  # as Ray Train begins
    with filesystem.open_output_stream(f"{path}/file") as out:
        out.write(b"content")
    with filesystem.open_input_file(f"{path}/file") as file:
        assert file.read() == b"content"
    assert next(proxy.faults, None) is None


def test_a_stream_survives_faults_in_the_middle(proxy: FaultyProxy) -> None:
    uri, data = f"s3://{BUCKET}/stream.bin", noise(100_000)
    storage.write_bytes_atomically(uri, data)
    proxy.faults = iter(["503", "ok", "ok", "truncate", "reset", "ok", "short"])
    with storage.open_stream(uri, 10_000) as stream:
        assert b"".join(iter(lambda: stream.read(3_000), b"")) == data
    assert next(proxy.faults, None) is None


@pytest.mark.parametrize("size", [1_000, 12 << 20])
def test_a_write_survives_faults(size: int, proxy: FaultyProxy) -> None:
    uri = f"s3://{BUCKET}/written-{size}.bin"
    proxy.faults = iter(["503", "reset", "503"])
    storage.write_bytes_atomically(uri, noise(size))
    assert storage.read_bytes(uri) == noise(size)


def test_a_storage_that_stays_broken_is_an_error(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "ATTEMPTS", 3)
    storage.write_bytes_atomically(f"s3://{BUCKET}/file", b"data")
    proxy.requests.clear()
    proxy.faults = iter(["503"] * 100)
    with pytest.raises(OSError, match="503"):
        storage.read_bytes(f"s3://{BUCKET}/file")
    proxy.faults = iter(())
    assert len(proxy.requests) == 3


def test_wrong_keys_are_refused_at_once(proxy: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    proxy.requests.clear()
    with pytest.raises(PermissionError, match="not open to these keys"):
        storage.read_bytes(f"s3://{BUCKET}/file")
    assert len(proxy.requests) == 1
