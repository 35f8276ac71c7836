"""Pairs whose sides are more than an image and a caption: read from shards, or quarantined with what is wrong."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.shards import count_words, image, run_here, scanned, tar_of
from vladva.core.hashing import short_hash
from vladva.data.image_refs import read_images
from vladva.data.pair_items import PairItems
from vladva.data.scan import VERSION
from vladva.data.sidecar import ListedShard, SampleRef, Scanner, ScanSettings

QUERY, POSITIVE = image(seed=1), image(seed=2, size=(20, 10))
WORDS = {"text": " but in\nblue ", "instruction": "Find the same."}


def described(**content: Any) -> bytes:
    return json.dumps(content).encode()


def sample(**content: Any) -> list[tuple[str, bytes]]:
    return [("a.positive.png", POSITIVE), ("a.png", QUERY), ("a.json", described(**content))]


def test_a_query_with_words_and_another_image_as_positive(tmp_path: Path) -> None:
    wanted = {"image": "positive.png", "text": "x", "instruction": "Find what changed."}
    [row], bad = scanned(tmp_path, tar_of(sample(query=WORDS, positive=wanted)))
    assert not bad
    assert (row["key"], row["width"], row["captions"]) == ("a", 12, [])
    pair = PairItems.from_row(row["pair"])
    assert pair is not None
    assert (pair.query_text, pair.query_instruction) == ("but in\nblue", "Find the same.")
    assert (pair.positive_text, pair.positive_instruction) == ("x", "Find what changed.")
    ref = SampleRef(**{**{name: value for name, value in row.items() if name != "key"}, "pair": pair})
    positive = ref.positive(str(tmp_path))
    assert positive is not None
    assert read_images([ref.image(str(tmp_path)), positive]) == [QUERY, POSITIVE]
    assert pair.positive is not None
    assert (pair.positive.width, pair.positive.height) == (20, 10)
    assert PairItems.from_row(pair.to_row()) == pair


def test_words_as_positive_are_captions_and_may_have_an_instruction(tmp_path: Path) -> None:
    both = {"text": "a ring", "instruction": "Find the image."}
    rows, bad = scanned(tmp_path, tar_of(sample(query=WORDS, positive=both, captions=["other", "a ring"])))
    assert not bad
    assert rows[0]["captions"] == ["a ring", "other"]
    assert rows[0]["pair"]["positive"] is None
    text = [("t.json", described(text="find it", query={"instruction": "Q"}, positive={"image": "positive.png"}))]
    [row], bad = scanned(tmp_path, tar_of([*text, ("t.positive.png", POSITIVE)]))
    assert not bad
    assert (row["width"], row["pair"]["query_instruction"], row["pair"]["positive"]["width"]) == (0, "Q", 20)


def test_what_is_not_there_or_not_understood_is_quarantined(tmp_path: Path) -> None:
    named = {"image": "positive.png"}
    broken = [("a.positive.png", POSITIVE[:40]), ("a.png", QUERY), ("a.json", described(positive=named))]
    for members, reason in (
        (sample(query=WORDS, positive={"image": "target.png"}), "no positive"),
        (sample(query=WORDS, positive={"image": "png"}), "no positive"),
        (sample(query=WORDS, positive={"image": "json"}), "no positive"),
        (broken, "no positive"),
        (sample(query={"txt": "a"}, captions=["b"]), "unknown field of a pair"),
        (sample(query={"text": 3}, captions=["b"]), "a field of a pair is not text"),
        (sample(query={"text": " "}, captions=["b"]), "a field of a pair is not text"),
        (sample(query=WORDS), "no caption"),
        ([("a.json", described(text="a", query={"text": "b"}, captions=["c"]))], "two texts in a query"),
    ):
        rows, bad = scanned(tmp_path, tar_of(members))
        assert (rows, bad["#a"]) == ([], reason)
    rows, _ = scanned(tmp_path, tar_of(sample(query="another program's", positive=["theirs"], captions=["b"])))
    assert [row["pair"] for row in rows] == [None]


def test_plain_shards_keep_the_digest_that_runs_know_them_by(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of([("a.png", QUERY), ("a.json", described(captions=["x"], negatives=["y"]))]))
    settings = ScanSettings(version=VERSION, verify=True, max_pixels=1 << 20, probe=[])
    scanner = Scanner(str(tmp_path), str(tmp_path / "_index"), count_words, settings)
    listed = ListedShard(shard="a.tar", size=(tmp_path / "a.tar").stat().st_size, changed=1)
    [facts] = run_here(scanner, [listed])
    [row], _ = scanned(tmp_path, (tmp_path / "a.tar").read_bytes())
    before_there_were_pairs = ["key", "offset", "length", "captions", "negatives", "crc32"]
    assert facts["digest"] == short_hash([{name: row[name] for name in before_there_were_pairs}])
    (tmp_path / "a.tar").write_bytes(tar_of(sample(query=WORDS, captions=["x"])))
    [one] = run_here(replace(scanner, index_uri=str(tmp_path / "_one")), [listed])
    (tmp_path / "a.tar").write_bytes(tar_of(sample(query={**WORDS, "text": "but in red"}, captions=["x"])))
    [other] = run_here(replace(scanner, index_uri=str(tmp_path / "_other")), [listed])
    assert one["digest"] != other["digest"]  # other words are other data
    assert one["notes"]["sample with a query or a positive of its own"] == 1


@pytest.mark.parametrize("known", [True, False])
def test_an_image_that_no_sample_names_is_passed_over_or_a_sample(tmp_path: Path, known: bool) -> None:
    members = sample(captions=["x"], **({"positive": {"image": "positive.png"}} if known else {}))
    rows, bad = scanned(tmp_path, tar_of([*members, ("a.positive.txt", b"its own caption")]))
    assert not bad
    assert [row["key"] for row in rows] == ["a.positive", "a"]  # with a caption it is a sample, too
