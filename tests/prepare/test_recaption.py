"""Recaptioning: what is missing is written by the model, marked, and read by training; nothing else changes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest

from jobs import prepare as prepare_job
from tests.support.small_corpora import scan_here
from vladva.core.images import decode_image
from vladva.data.scenes.captions import captions
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import png, render
from vladva.data.shard_index import ShardIndex
from vladva.data.shard_writer import ShardWriter
from vladva.models.embedder import load_lvlm
from vladva.prepare import recaption as module
from vladva.prepare.recaption import REQUESTS, RecaptionConfig, Recaptioner, captioned_uri, claim_captions, summarize

CONFIG = RecaptionConfig(max_tokens=80)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two shards of six scenes: with both captions, a short one, a long one, none, none but a negative; no image."""
    with ShardWriter(str(tmp_path / "data"), 3) as writer:
        for number, (scene, random) in zip(range(6), scenes("train"), strict=False):
            worded = captions(scene, random)
            short, long = worded[0], worded[-1]
            image = png(render(scene))
            members = [
                {"png": image, "json": json.dumps({"captions": [short, long], "note": 7}).encode()},
                {"png": image, "txt": short.encode()},
                {"png": image, "json": json.dumps({"caption": long}).encode()},
                {"png": image},
                {"png": image, "json": json.dumps({"negatives": ["a lie"]}).encode()},
                {"png": b"no image", "json": json.dumps({"caption": short}).encode()},
            ][number]
            writer.write(f"{number:06d}", members)
    return tmp_path / "data"


def content(uri: Path) -> dict[str, bytes]:
    with tarfile.open(uri) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def fill(data: Path, out: Path, shards: list[str], tiny: str, config: RecaptionConfig = CONFIG) -> None:
    Recaptioner({"model": tiny}, str(data), str(out), config)(pa.table({"shard": shards}))


SHARDS = ["000000.tar", "000001.tar"]


def test_what_is_missing_is_written_and_marked(data: Path, tiny: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    fill(data, out, SHARDS, tiny)
    old = content(data / SHARDS[0]) | content(data / SHARDS[1])
    new = content(out / SHARDS[0]) | content(out / SHARDS[1])
    assert all(new[name] == each for name, each in old.items() if not name.endswith(".json"))
    assert new["000000.json"] == old["000000.json"]  # has both
    assert new["000005.json"] == old["000005.json"]  # its image cannot be read
    lvlm = load_lvlm(tiny)
    written = 0
    for number, lacking in ((1, ["long"]), (2, ["short"]), (3, ["short", "long"]), (4, ["short", "long"])):
        found = json.loads(new[f"{number:06d}.json"])
        image = decode_image(io.BytesIO(old[f"{number:06d}.png"]).getvalue())
        expected = []
        for kind in lacking:  # by the model itself, asked one by one
            asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": REQUESTS[kind]}]}]
            answer = "".join(lvlm.generate(asked, [image], max_tokens=80)).strip()
            if CONFIG.kind_of(lvlm.preprocessor.count_tokens([answer])[0]) == kind:
                expected.append(answer)
        written += len(expected)
        assert found["generated"] == expected
        assert found["generated_by"] == [tiny]
        assert found["captions"][-len(expected) :] == expected
    assert json.loads(new["000004.json"])["negatives"] == ["a lie"]
    summary = summarize(str(out), SHARDS, 2)
    assert (summary.images, summary.short + summary.long, summary.short + summary.long + summary.unfit) == (
        5,
        written,
        6,
    )
    assert written >= 4

    for uri in (data, out):
        scan_here(str(uri))
    before, after = (
        {ref.id: ref for ref in ShardIndex.open(str(uri)).samples(0, n)} for uri, n in ((data, 3), (out, 5))
    )
    assert set(after) - set(before) == {"000001.tar#000003", "000001.tar#000004"}  # had no caption: not used
    for name, ref in before.items():
        assert set(ref.captions) <= set(after[name].captions)


def test_an_interrupted_job_goes_on_shard_by_shard(data: Path, tiny: str, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    fill(data, whole, SHARDS, tiny)
    fill(data, out, SHARDS[:1], tiny)
    assert Path(captioned_uri(str(out), SHARDS[0])).exists()
    assert not Path(captioned_uri(str(out), SHARDS[1])).exists()
    stamp = Path(out / SHARDS[0]).stat().st_mtime_ns
    left = [shard for shard in SHARDS if not Path(captioned_uri(str(out), shard)).exists()]
    fill(data, out, left, tiny)
    assert Path(out / SHARDS[0]).stat().st_mtime_ns == stamp
    for shard in SHARDS:
        assert (out / shard).read_bytes() == (whole / shard).read_bytes()


def test_only_the_kinds_that_are_asked_for(data: Path, tiny: str, tmp_path: Path) -> None:
    fill(data, tmp_path / "out", SHARDS[:1], tiny, RecaptionConfig(("short",), max_tokens=80))
    new = content(tmp_path / "out" / SHARDS[0])
    assert "000001.json" not in new  # lacks a long one only


def test_what_is_there_is_not_captioned_by_another_model(tmp_path: Path) -> None:
    claim_captions(str(tmp_path), "data", "one", CONFIG)
    claim_captions(str(tmp_path), "data", "one", CONFIG)
    with pytest.raises(ValueError, match=r"model was one, is another"):
        claim_captions(str(tmp_path), "data", "another", CONFIG)
    with pytest.raises(ValueError, match="tiny is no kind"):
        RecaptionConfig(("tiny",))


def test_refusals_before_any_work(data: Path, tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inside the source"):
        module.recaption(str(data), str(data / "out"), tiny, CONFIG)
    (tmp_path / "pairs.csv").write_text("image,caption\na.png,a\n")
    with pytest.raises(ValueError, match="no tar shards"):
        module.recaption(str(tmp_path / "pairs.csv"), str(tmp_path / "out"), tiny, CONFIG)


def test_the_command_captions_shards_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="write them first, with --out"):
        prepare_job.parse([str(tmp_path), "--recaption", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
