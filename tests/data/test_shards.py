"""Shards: what is written is found again byte for byte; what is wrong with a shard is named and costs nothing else."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.support.s3_server import BUCKET, FaultyProxy, faulty_proxy, s3_server
from vladva.core import errors, images, storage
from vladva.core.images import decode_image
from vladva.data import scan as scan_module
from vladva.data.examples import read_text
from vladva.data.scan import scan
from vladva.data.shard_index import ShardIndex, read_samples
from vladva.data.shard_writer import ShardWriter
from vladva.data.sidecar import SCHEMA, SampleRef, Scanner, scan_shard

Members = list[tuple[str, bytes]]


def image(kind: str = "PNG", size: tuple[int, int] = (12, 8), seed: int = 0, mode: str = "RGB") -> bytes:
    """An image of noise, as a file."""
    body = io.BytesIO()
    noise = Random(seed).randbytes(size[0] * size[1] * 4)
    Image.frombytes("RGBA", size, noise).convert(mode).save(body, kind)
    return body.getvalue()


def tar_of(members: Members) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return body.getvalue()


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def scanned(folder: Path, content: bytes, **options: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the index of a shard with this content, and id -> reason of the rest."""
    (folder / "a.tar").write_bytes(content)
    table, quarantined = scan_shard(str(folder), "a.tar", count_words, **options)
    assert table.schema == SCHEMA
    assert len({row.id for row in quarantined}) == len(quarantined)
    return table.to_pylist(), {row.id.removeprefix("a.tar"): row.reason for row in quarantined}


# --- writing ---------------------------------------------------------------------------------------------------------


def write_shards(uri: str, num_samples: int, samples_per_shard: int, size: tuple[int, int] = (12, 8)) -> list[bytes]:
    pictures = [image(size=size, seed=number) for number in range(num_samples)]
    with ShardWriter(uri, samples_per_shard) as writer:
        for number, data in enumerate(pictures):
            meta = {"captions": [f"image {number}", f"this one has number {number} of {num_samples}"]}
            writer.write(f"{number:04d}", {"png": data, "json": json.dumps(meta).encode()})
    return pictures


def test_shards_are_tars_of_the_given_size(tmp_path: Path) -> None:
    pictures = write_shards(str(tmp_path / "new/folder"), num_samples=10, samples_per_shard=4)
    files = sorted((tmp_path / "new/folder").iterdir())
    assert [file.name for file in files] == ["000000.tar", "000001.tar", "000002.tar"]
    found = []
    for file in files:
        with tarfile.open(file) as tar:
            found.append({member.name: tar.extractfile(member).read() for member in tar})  # type: ignore[union-attr]
    assert [len(shard) for shard in found] == [8, 8, 4]
    assert found[1]["0004.png"] == pictures[4]
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


# --- one shard: what is found ----------------------------------------------------------------------------------------


def test_rows_say_where_the_bytes_are(tmp_path: Path) -> None:
    pictures = {"jpg": image("JPEG"), "webp": image("WEBP"), "gif": image("GIF", mode="P"), "PNG": image("PNG")}
    members = [("./folder/", b"")]
    for number, (ending, data) in enumerate(pictures.items()):
        members += [(f"folder/{number}.{ending}", data), (f"folder/{number}.txt", b" two words \n")]
    content = tar_of([*members, ("folder/README", b"no ending"), ("folder/.hidden.jpg", b"?"), ("0.stats.json", b"?")])
    rows, quarantined = scanned(tmp_path, content)
    assert quarantined == {}
    assert [row["id"] for row in rows] == [f"a.tar#folder/{number}" for number in range(4)]
    for row, data in zip(rows, pictures.values(), strict=True):
        assert content[row["offset"] :][: row["length"]] == data
        assert (row["width"], row["height"], row["crc32"]) == (12, 8, zlib.crc32(data))
        assert (row["captions"], row["caption_tokens"]) == (["two words"], [2])


def captions_of(folder: Path, *members: tuple[str, Any]) -> list[str]:
    contents = [
        (f"k.{kind}", value if isinstance(value, bytes) else json.dumps(value).encode()) for kind, value in members
    ]
    rows, quarantined = scanned(folder, tar_of([("k.png", image()), *contents]))
    assert quarantined == {}
    assert rows[0]["caption_tokens"] == count_words(rows[0]["captions"])
    return rows[0]["captions"]


def test_captions_come_from_json_then_text_each_once(tmp_path: Path) -> None:
    assert captions_of(tmp_path, ("txt", "grüne Äpfel".encode())) == ["grüne Äpfel"]
    assert captions_of(tmp_path, ("txt", b"\xef\xbb\xbfwith a mark")) == ["with a mark"]
    assert captions_of(tmp_path, ("json", {"caption": "one"})) == ["one"]
    assert captions_of(tmp_path, ("json", {"caption": ["one", "two"]})) == ["one", "two"]
    assert captions_of(tmp_path, ("json", {"captions": ["one", "", "two", "one"], "caption": "three"})) == [
        *("one", "two", "three")
    ]
    # as img2dataset writes them, the JSON before or after the text
    assert captions_of(tmp_path, ("json", {"caption": "one", "width": 3}), ("txt", b"one")) == ["one"]
    assert captions_of(tmp_path, ("json", {"caption": None}), ("txt", b"one")) == ["one"]
    assert captions_of(tmp_path, ("json", ["no object"]), ("txt", b"one")) == ["one"]


def test_members_of_a_sample_need_not_be_neighbours(tmp_path: Path) -> None:
    members = [("a.txt", b"of a"), ("b.txt", b"of b"), ("b.png", image(seed=1)), ("a.png", image(seed=2))]
    rows, quarantined = scanned(tmp_path, tar_of(members))
    assert quarantined == {}
    assert [(row["key"], row["captions"]) for row in rows] == [("b", ["of b"]), ("a", ["of a"])]  # by offset


# --- one shard: what is wrong ----------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = image("JPEG", (200, 200))
PNG = image("PNG", (60, 60))
WEBP = image("WEBP", (60, 60))
BAD_IMAGES = {
    "zero bytes": b"",
    "not an image": b"<html>404 not found</html>",
    "corrupt image": JPEG[: len(JPEG) // 2],
    "too many pixels": bomb(20_000, 20_000),
}
BAD_CAPTIONS = {
    "no caption": [],
    "caption is not UTF-8": [("txt", "grün".encode("latin-1"))],
    "caption is not text": [("json", b'{"caption": 7}')],
    "broken JSON": [("json", b'{"caption": "on')],
}


@pytest.mark.parametrize("reason", [*BAD_IMAGES, *BAD_CAPTIONS, "no image", "duplicate key"])
def test_a_bad_sample_is_named_and_its_neighbours_are_kept(tmp_path: Path, reason: str) -> None:
    bad: Members = []
    if reason != "no image":
        bad.append(("bad.jpg", BAD_IMAGES.get(reason, JPEG)))
    bad += [(f"bad.{kind}", content) for kind, content in BAD_CAPTIONS.get(reason, [("txt", b"caption")])]
    if reason == "duplicate key":
        bad += [("bad.jpg", PNG), ("bad.txt", b"caption of the second")]
    good = [[(f"{key}.jpg", JPEG), (f"{key}.txt", b"caption")] for key in ("a", "c")]
    rows, quarantined = scanned(tmp_path, tar_of([*good[0], *bad, *good[1]]))
    assert quarantined == {"#bad": reason}
    if reason == "duplicate key":
        assert [(row["key"], row["crc32"]) for row in rows] == [(key, zlib.crc32(JPEG)) for key in ("a", "bad", "c")]
        assert rows[1]["captions"] == ["caption"]
    else:
        assert [row["key"] for row in rows] == ["a", "c"]


def test_samples_of_text_alone_and_hard_negatives(tmp_path: Path) -> None:
    """A text in the JSON stands for an image that is not there; beside an image it is another program's field."""
    alone = {"text": " two dogs run ", "captions": ["dogs are running"], "negatives": ["a cat sleeps", " "]}
    beside = {"text": 7, "caption": "a dog", "negatives": ["a cat"]}
    members = [("a.json", json.dumps(alone).encode()), ("b.png", PNG), ("b.json", json.dumps(beside).encode())]
    nothing = [("c.json", b'{"text": "  ", "caption": "no text"}'), ("d.json", b'{"text": "x", "negatives": [1]}')]
    rows, quarantined = scanned(tmp_path, tar_of([*members, *nothing]))
    assert quarantined == {"#c": "no image", "#d": "caption is not text"}
    assert [(row["key"], row["captions"], row["negatives"]) for row in rows] == [
        ("a", ["dogs are running"], ["a cat sleeps"]),
        ("b", ["a dog"], ["a cat"]),
    ]
    assert [(row["width"], row["height"]) for row in rows] == [(0, 0), (60, 60)]
    ref = SampleRef(**{name: value for name, value in rows[0].items() if name != "key"})
    assert read_text(read_samples(str(tmp_path), [ref])[0]) == "two dogs run"


@pytest.mark.parametrize(
    ("data", "reason", "without_verify"),
    [
        pytest.param(JPEG[:-50], "corrupt image", None, id="JPEG cut at the end"),
        pytest.param(JPEG[:20], "corrupt image", "corrupt image", id="JPEG cut in its header"),
        pytest.param(PNG[: len(PNG) // 2], "corrupt image", None, id="PNG cut"),
        pytest.param(PNG[:500] + bytes(40) + PNG[540:], "corrupt image", None, id="PNG with a hole"),
        pytest.param(WEBP[: len(WEBP) // 2], "corrupt image", "corrupt image", id="WebP cut"),
        pytest.param(b"GIF89a", "corrupt image", "corrupt image", id="GIF cut"),
        pytest.param(image("BMP"), "not an image", "not an image", id="BMP"),
        pytest.param(image("TIFF"), "not an image", "not an image", id="TIFF"),
        pytest.param(bomb(20_000, 20_000), "too many pixels", "too many pixels", id="bomb"),
        pytest.param(bomb(1, 50_000_001), "too many pixels", "too many pixels", id="one pixel too many"),
        pytest.param(bomb(0, 10), "corrupt image", "corrupt image", id="no pixels"),
        pytest.param(image("JPEG", mode="CMYK"), None, None, id="CMYK JPEG"),
        pytest.param(image("JPEG", mode="L"), None, None, id="grey JPEG"),
        pytest.param(image("JPEG", (1, 1)), None, None, id="tiny JPEG"),
        pytest.param(image("PNG", mode="RGBA"), None, None, id="transparent PNG"),
        pytest.param(image("PNG", mode="1"), None, None, id="black and white PNG"),
        pytest.param(image("GIF", mode="P"), None, None, id="GIF"),
        pytest.param(image("WEBP"), None, None, id="WebP"),
    ],
)
def test_the_scan_accepts_what_training_can_decode(data: bytes, reason: str | None, without_verify: str | None) -> None:
    def verdict(verify: bool) -> str | None:
        try:
            images.check_image(data, verify=verify, max_pixels=images.MAX_PIXELS)
        except errors.InvalidSampleError as problem:
            return problem.reason
        return None

    assert verdict(verify=True) == reason
    assert verdict(verify=False) == without_verify
    if reason:
        with pytest.raises(ValueError, match="image"):
            decode_image(data)
    else:
        assert decode_image(data).mode == "RGB"


def test_ids_are_text_whatever_the_names_are(tmp_path: Path) -> None:
    latin = "gr\udcfcn"  # how tarfile shows a byte that is not UTF-8
    long = "x" * 150
    members = [("苹果.png", image()), ("苹果.txt", b"a"), (f"{latin}.png", image()), (f"{latin}.txt", b"b")]
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=tarfile.GNU_FORMAT, errors="surrogateescape") as tar:
        for name, data in [*members, (f"{long}.png", image()), (f"{long}.txt", b"c")]:
            header = tarfile.TarInfo(name)
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    rows, quarantined = scanned(tmp_path, content.getvalue())
    assert quarantined == {}
    assert [row["key"] for row in rows] == ["苹果", "gr\\xfcn", long]


def test_captions_that_no_utf8_can_hold_are_named(tmp_path: Path) -> None:
    content = tar_of([("a.png", image()), ("a.json", b'{"caption": "half a character: \\ud83d"}')])
    assert scanned(tmp_path, content)[1] == {"#a": "caption is not UTF-8"}


# --- whole tars that are wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty tar"),
        (bytes(10_240), "empty tar"),
        (gzip.compress(tar_of([("a.png", image()), ("a.txt", b"a")])), "compressed tar"),
        (b"this is no archive, whatever its name says. " * 50, "not a tar"),
    ],
)
def test_a_file_that_is_no_shard_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    assert scanned(tmp_path, content) == ([], {"": reason})


def test_a_tar_cut_anywhere_keeps_what_came_before(tmp_path: Path) -> None:
    pictures = [image(seed=number) for number in range(3)]
    content = tar_of([(f"{i}.{end}", data) for i in range(3) for end, data in (("png", pictures[i]), ("txt", b"text"))])
    whole, _ = scanned(tmp_path, content)
    mark = len(content.rstrip(b"\0"))  # the text ends here; from the next full block on nothing but zeros follows
    cuts = sorted({*range(1, mark, 97), *range(512, mark, 512), *(n * 512 + 1 for n in range(1, mark // 512))})
    for cut in cuts:
        rows, quarantined = scanned(tmp_path, content[:cut])
        complete = [row for row in whole if row["offset"] + 1024 + 512 + 4 <= cut]  # PNG of < 1024 bytes, header, text
        assert rows[: len(complete)] == complete
        assert all(row in whole for row in rows)
        assert len(rows) <= len(complete) + 1
        assert quarantined[""] in (("not a tar", "truncated tar") if cut < 512 else ("truncated tar",))


def test_a_damaged_header_is_seen(tmp_path: Path) -> None:
    content = bytearray(tar_of([("a.png", image()), ("a.txt", b"a"), ("b.png", image()), ("b.txt", b"b")]))
    rows, _ = scanned(tmp_path, bytes(content))
    content[rows[1]["offset"] - 512 + 100] ^= 0xFF  # a byte of the second image's header
    kept, quarantined = scanned(tmp_path, bytes(content))
    assert kept == rows[:1]
    assert quarantined == {"": "damaged tar"}


# --- data sets -------------------------------------------------------------------------------------------------------


def run_here(scanner: Scanner, listed: list[list[Any]]) -> list[dict[str, Any]]:
    """The scan's tasks one after the other in this process."""
    rows = [{"shard": shard, "size": size, "changed": changed} for shard, size, changed in listed]
    return [json.loads(scanner(row)["facts"]) for row in rows]


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "_run", run_here)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[bytes]]:
    """A scanned data set of 1,200 images in shards of 530, 530 and 140, and the images."""
    uri = str(tmp_path_factory.mktemp("corpus"))
    pictures = write_shards(uri, num_samples=1_200, samples_per_shard=530, size=(2, 2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_run", run_here)
        summary = scan(uri, count_words)
    assert (summary.num_shards, summary.num_scanned) == (3, 3)
    assert (summary.num_samples, summary.num_quarantined, summary.reasons) == (1_200, 0, {})
    assert str(summary) == "1,200 samples in 3 shards (3 scanned now), none quarantined"
    return uri, pictures


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
    uri, pictures = corpus
    index = ShardIndex.open(uri)
    refs = [*index.samples(525, 10), *index.samples(3, 4), *index.samples(1_199, 1)]
    assert read_samples(uri, refs) == [*pictures[525:535], *pictures[3:7], pictures[1_199]]
    assert refs[0].captions == ["image 525", "this one has number 525 of 1200"]
    assert refs[0].caption_tokens == [2, 7]


def test_a_run_is_one_read(corpus: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[tuple[int, int | None]] = []
    read = storage.LocalDisk.read

    def counted(self: storage.LocalDisk, path: str, offset: int = 0, length: int | None = None) -> bytes:
        reads.append((offset, length))
        return read(self, path, offset, length)

    uri, pictures = corpus
    refs = ShardIndex.open(uri).samples(525, 10)  # over the end of a shard
    monkeypatch.setattr(storage.LocalDisk, "read", counted)
    assert read_samples(uri, refs) == pictures[525:535]
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


def test_only_what_changed_is_scanned_again(tmp_path: Path, without_ray: None) -> None:
    uri = str(tmp_path)
    write_shards(uri, 12, 4)
    first = scan(uri, count_words)
    assert scan(uri, count_words).num_scanned == 0
    assert ShardIndex.open(uri).fingerprint == first.fingerprint

    (tmp_path / "_index/manifest.json").unlink()  # as after a scan that was killed at the end
    with pytest.raises(ValueError, match=r"has no complete index in .*/_index: scan its shards first"):
        ShardIndex.open(uri)
    resumed = scan(uri, count_words)
    assert (resumed.num_scanned, resumed.fingerprint) == (0, first.fingerprint)

    (tmp_path / "000001.tar").write_bytes(tar_of([("new.png", PNG), ("new.txt", b"new")]))
    changed = scan(uri, count_words)
    assert (changed.num_scanned, changed.num_samples) == (1, 9)
    assert changed.fingerprint != first.fingerprint
    assert [ref.id for ref in ShardIndex.open(uri).samples(3, 3)] == [
        *("000000.tar#0003", "000001.tar#new", "000002.tar#0008")
    ]

    (tmp_path / "000002.tar").unlink()
    assert scan(uri, count_words).num_samples == 5
    assert sorted(os.listdir(tmp_path / "_index")) == [
        *("000000.tar.parquet", "000001.tar.parquet", "manifest.json", "quarantine.parquet")
    ]
    recounted = scan(uri, lambda texts: [len(text) for text in texts])  # another tokenizer
    assert recounted.num_scanned == 2
    assert ShardIndex.open(uri).samples(0, 1)[0].caption_tokens == [
        len("image 0"),
        len("this one has number 0 of 12"),
    ]


def bad_corpus(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Write 200 samples in 10 shards, 3% of the members bad; ids of the good, id -> reason of the bad."""
    random = Random(0)
    kinds = {**BAD_IMAGES, **dict.fromkeys(BAD_CAPTIONS, JPEG)}
    chosen = dict(zip(random.sample(range(200), len(kinds)), kinds, strict=True))
    good, bad = set(), {}
    for shard in range(10):
        members: Members = []
        for number in range(shard * 20, shard * 20 + 20):
            reason = chosen.get(number, "")
            captions = BAD_CAPTIONS.get(reason, [("txt", b"caption")])
            members += [(f"{number}.jpg", kinds.get(reason, JPEG)), *((f"{number}.{e}", c) for e, c in captions)]
            if reason:
                bad[f"{shard}.tar#{number}"] = reason
            else:
                good.add(f"{shard}.tar#{number}")
        (folder / f"{shard}.tar").write_bytes(tar_of(members))
    return good, bad


def test_ray_tasks_find_what_one_process_finds(tmp_path: Path, ray_cluster: None) -> None:
    good, bad = bad_corpus(tmp_path)
    summary = scan(str(tmp_path), count_words, str(tmp_path / "elsewhere"))
    assert (summary.num_shards, summary.num_scanned, summary.num_samples) == (10, 10, len(good))
    assert summary.reasons == Counter(bad.values())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_run", run_here)
        assert scan(str(tmp_path), count_words).fingerprint == summary.fingerprint
    (tmp_path / "elsewhere/manifest.json").unlink()
    assert scan(str(tmp_path), count_words, str(tmp_path / "elsewhere")).num_scanned == 0
    index = ShardIndex.open(str(tmp_path), str(tmp_path / "elsewhere"))
    assert {ref.id for ref in index.samples(0, index.num_samples)} == good


def test_bad_samples_are_listed_and_the_rest_is_delivered(tmp_path: Path, without_ray: None) -> None:
    good, bad = bad_corpus(tmp_path)
    summary = scan(str(tmp_path), count_words)
    index = ShardIndex.open(str(tmp_path))
    assert {ref.id for ref in index.samples(0, index.num_samples)} == good
    rows = pq.read_table(tmp_path / "_index/quarantine.parquet").to_pylist()
    assert {row["id"]: row["reason"] for row in rows} == bad
    assert summary.num_quarantined == len(bad) == 8
    assert summary.reasons == Counter(bad.values())
    assert f"{len(good)} samples in 10 shards (10 scanned now), 8 quarantined (1 " in str(summary)
    # the same through the other door: what was quarantined is still known when nothing is scanned
    again = scan(str(tmp_path), count_words)
    assert (again.num_scanned, again.reasons) == (0, summary.reasons)

    with pytest.raises(ValueError, match=r"8 of 200 samples and 0 of 10 shards are bad, more than max_bad_fraction"):
        scan(str(tmp_path), count_words, max_bad_fraction=0.03)
    (tmp_path / "7.tar").write_bytes((tmp_path / "7.tar").read_bytes()[:2_000])
    with pytest.raises(
        ValueError, match=r"The worst: 7.tar \(. of . samples, damaged\), .*truncated tar|raise max_bad"
    ) as e:
        scan(str(tmp_path), count_words)
    assert "1 of 10 shards" in str(e.value)
    with pytest.raises(ValueError, match="scan its shards first"):
        ShardIndex.open(str(tmp_path))  # the old index no longer holds, and the new one was refused
    assert scan(str(tmp_path), count_words, max_bad_fraction=0.2).num_scanned == 0  # the work was kept


def test_a_folder_without_shards_says_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no .tar shards: check the path"):
        scan(str(tmp_path), count_words)
    with pytest.raises(ValueError, match=r"holds no .tar shards"):
        scan(str(tmp_path / "missing"), count_words)


def test_a_data_set_without_a_good_sample_says_so(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(tar_of([("a.png", PNG)])))
    with pytest.raises(ValueError, match=r"1 compressed tar. The worst: a.tar"):
        scan(str(tmp_path), count_words)
    with pytest.raises(ValueError, match="the data set is empty, none of its 1 shards holds a good sample"):
        scan(str(tmp_path), count_words, max_bad_fraction=1.0)


# --- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProxy]:
    with (
        s3_server(tmp_path_factory.mktemp("s3")) as variables,
        faulty_proxy(variables["AWS_ENDPOINT_URL"]) as proxy,
        pytest.MonkeyPatch.context() as patch,
    ):
        for name, value in (variables | {"AWS_ENDPOINT_URL": proxy.url}).items():
            patch.setenv(name, value)
        patch.setattr(storage, "FIRST_PAUSE", 0.01)
        yield proxy


def test_s3_with_faults_gives_what_the_disk_gives(tmp_path: Path, proxy: FaultyProxy, without_ray: None) -> None:
    pictures = write_shards(str(tmp_path), 60, 20)
    uri = f"s3://{BUCKET}/data"
    faults = Random(0)
    proxy.faults = iter(lambda: faults.choice(["503", "reset", "truncate", "short", *["ok"] * 12]), "")
    write_shards(uri, 60, 20)
    local, remote = scan(str(tmp_path), count_words), scan(uri, count_words)
    assert remote.fingerprint == local.fingerprint
    assert remote.num_scanned == 3
    assert scan(uri, count_words).num_scanned == 0
    index = ShardIndex.open(uri)
    assert index.samples(0, 60) == ShardIndex.open(str(tmp_path)).samples(0, 60)
    random = Random(1)
    for _ in range(15):
        first = random.randrange(50)
        assert read_samples(uri, index.samples(first, 10)) == pictures[first : first + 10]
    proxy.faults = iter(())
    assert sum(fault != "ok" for _, _, fault in proxy.requests) > 5
