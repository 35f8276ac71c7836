"""One tar: what is found in it, and what is named as wrong at no cost to the rest."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.support.shards import BAD_CAPTIONS, BAD_IMAGES, JPEG, PNG, Members, count_words, image, scanned, tar_of
from vladva.data.examples import read_text
from vladva.data.shard_index import read_samples
from vladva.data.sidecar import SampleRef


def test_rows_say_where_the_bytes_are(tmp_path: Path) -> None:
    images = {"jpg": image("JPEG"), "webp": image("WEBP"), "gif": image("GIF", mode="P"), "PNG": image("PNG")}
    members = [("./folder/", b"")]
    for number, (ending, data) in enumerate(images.items()):
        members += [(f"folder/{number}.{ending}", data), (f"folder/{number}.txt", b" two words \n")]
    content = tar_of(
        [*members, ("folder/README", b"no ending"), ("folder/.hidden.jpg", b"?"), ("folder/0.stats.json", b"?")]
    )
    rows, quarantined = scanned(tmp_path, content)
    assert quarantined == {}
    assert [row["id"] for row in rows] == [f"a.tar#folder/{number}" for number in range(4)]
    for row, data in zip(rows, images.values(), strict=True):
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
    images = [image(seed=number) for number in range(3)]
    content = tar_of([(f"{i}.{end}", data) for i in range(3) for end, data in (("png", images[i]), ("txt", b"text"))])
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
