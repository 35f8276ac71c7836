"""Prepare: all that a source names is delivered, merged, left out or in the quarantine table, and nothing else."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.prepare import main, parse
from tests.support.s3_server import BUCKET, s3_server
from tests.support.source_variants import CAPTIONS, IMAGES, VARIANTS, image, write_variant
from tests.support.without_ray import count_words, leave_ray_out
from vladva.core import ray_tasks, storage
from vladva.data.scan import scan
from vladva.data.shard_index import ShardIndex, read_samples
from vladva.data.source import SourceOptions
from vladva.prepare import pipeline as prepare_module
from vladva.prepare import statistics
from vladva.prepare.join import Join
from vladva.prepare.pipeline import Prepared, prepare
from vladva.prepare.plan import read_plan_table


@pytest.fixture
def without_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    leave_ray_out(monkeypatch)


def delivered(uri: str) -> dict[bytes, list[str]]:
    """Image -> captions, read back through the index."""
    index = ShardIndex.open(uri)
    refs = index.samples(0, index.num_samples)
    assert len({ref.id for ref in refs}) == len(refs)
    return dict(zip(read_samples(uri, refs), [ref.captions for ref in refs], strict=True))


def quarantined(prepared: Prepared) -> list[tuple[str, str]]:
    """(place, reason) of what was refused."""
    rows = pq.read_table(prepared.quarantine_uri).to_pylist()
    assert Counter(row["reason"] for row in rows) == prepared.quarantined
    return sorted((row.get("place", row["id"]), row["reason"]) for row in rows)


def write_folder(folder: Path, count: int) -> dict[str, bytes]:
    """Images with a text each."""
    folder.mkdir(parents=True)
    pictures = {f"{number:03d}.png": image("PNG", number) for number in range(count)}
    for name, data in pictures.items():
        (folder / name).write_bytes(data)
        (folder / name).with_suffix(".txt").write_text(f"image {name}")
    return pictures


def tars(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.tar"))}


# --- what goes in comes out ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_format_comes_out_byte_for_byte(variant: str, tmp_path: Path, without_ray: None) -> None:
    options = write_variant(variant, tmp_path / "source")
    out = "" if variant == "webdataset" else str(tmp_path / "out")
    prepared = prepare(str(tmp_path / "source"), out, count_words, options, samples_per_shard=2)
    assert delivered(prepared.uri) == {IMAGES[name]: CAPTIONS[name] for name in IMAGES}
    rows = 10 if variant in ("parquet, paths", "csv", "tsv", "tsv, unquoted", "json lines") else 5
    unread = "file that the format coco does not read"  # instances_train2017.json
    left_out = {"karpathy": {"split test": 1}, "coco": {unread: 1}}.get(variant, {})
    assert (prepared.found, prepared.samples, prepared.merged) == (rows + sum(left_out.values()), 5, rows - 5)
    assert (prepared.left_out, prepared.quarantined) == (left_out, {})
    if out:
        assert (prepared.shards, prepared.written, prepared.scanned) == (3, 3, 3)
    again = prepare(str(tmp_path / "source"), out, count_words, options, samples_per_shard=2)
    assert replace(again, seconds=0) == replace(prepared, written=0, scanned=0, seconds=0)


def test_a_sample_says_where_it_came_from(tmp_path: Path, without_ray: None) -> None:
    options = replace(write_variant("csv", tmp_path / "source"), id_column="filename")
    prepare(str(tmp_path / "source"), str(tmp_path / "out"), count_words, options)
    with tarfile.open(tmp_path / "out/000000.tar") as tar:
        names = tar.getnames()
        about = json.load(tar.extractfile(names[3]))  # type: ignore[arg-type]
    assert names[:4] == ["000000000.jpg", "000000000.json", "000000001.png", "000000001.json"]
    assert about["source"] == {"id": "images/b.png", "file": "images/b.png", "place": "pairs.csv, line 3"}


def test_the_same_path_with_other_ids_is_two_samples_and_the_same_id_twice_is_one(
    tmp_path: Path, without_ray: None
) -> None:
    write_variant("csv", tmp_path / "source")
    rows = ["id,path,caption", "1,images/a.jpg,one", "2,images/a.jpg,two", "1,images/b.png,three"]
    (tmp_path / "source/pairs.csv").write_text("\n".join(rows))
    options = SourceOptions(id_column="id")
    prepared = prepare(str(tmp_path / "source"), str(tmp_path / "out"), count_words, options, max_bad_fraction=0.5)
    index = ShardIndex.open(prepared.uri)
    assert [ref.captions for ref in index.samples(0, 2)] == [["one"], ["two"]]
    assert quarantined(prepared) == [("pairs.csv, line 4", "duplicate key")]


# --- joins -----------------------------------------------------------------------------------------------------------

LONG = [
    {"key": name.partition(".")[0], "long": f"a long caption of {name}"}
    for name in [*IMAGES, "z.jpg"]
    if name != "b.png"
]


def write_long(folder: Path, ending: str) -> str:
    file = folder / f"long{ending}"
    if ending == ".parquet":
        pq.write_table(pa.Table.from_pylist(LONG), file, row_group_size=2)
    elif ending == ".jsonl":
        file.write_text("\n".join([*map(json.dumps, LONG), "", '{"key": "a", "long']))
    else:
        file.write_text("\n".join(["key,long", *(f"{row['key']},{row['long']}" for row in LONG), "a,b,c"]))
    return str(file)


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".csv"])
def test_captions_are_joined_and_what_has_no_partner_is_listed(ending: str, tmp_path: Path, without_ray: None) -> None:
    write_variant("folder, texts", tmp_path / "source")
    join = Join.parse(write_long(tmp_path, ending), "stem=key", ["long"])
    prepared = prepare(str(tmp_path / "source"), str(tmp_path / "out"), count_words, join=join)
    assert delivered(prepared.uri) == {
        IMAGES[name]: CAPTIONS[name] + [f"a long caption of {name}"] * (name != "b.png") for name in IMAGES
    }
    bad = int(ending != ".parquet")
    counts = {"rows": 4, "rows_without": 1, "rows_rejected": bad, "samples": 4, "samples_without": 1}
    assert prepared.joined == counts
    unmatched = [(row["side"], row["id"]) for row in read_plan_table(prepared.uri, "unmatched")]
    reason = {".jsonl": "(broken JSON)", ".csv": "(broken row)"}
    assert unmatched == [("sample", "images/b.png"), ("table", "z"), *[("table", reason.get(ending))] * bad]


def test_tars_are_rewritten_to_join_captions(tmp_path: Path, without_ray: None) -> None:
    write_variant("webdataset", tmp_path / "source")
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    with pytest.raises(ValueError, match="leave --out away to scan them where they are"):
        prepare(source, out, count_words)
    table = tmp_path / "long.csv"
    table.write_text("id,caption\na,more of a\nc,more of c\n")
    with pytest.raises(ValueError, match="to join captions shards are written, name their folder with --out"):
        prepare(source, "", count_words, join=Join.parse(str(table), "id"))
    before = tars(tmp_path / "source")
    with pytest.raises(ValueError, match="no file of its own, join on its id or key"):
        prepare(source, out, count_words, join=Join.parse(str(table), "stem=id"))
    prepared = prepare(source, out, count_words, join=Join.parse(str(table), "key=id"), samples_per_shard=3)
    more = {"a.jpg": ["more of a"], "c.jpeg": ["more of c"]}
    assert delivered(out) == {IMAGES[name]: CAPTIONS[name] + more.get(name, []) for name in IMAGES}
    assert prepared.joined["samples_without"] == 3
    assert tars(tmp_path / "source") == before


def test_a_join_that_finds_nothing_says_what_was_compared(tmp_path: Path, without_ray: None) -> None:
    write_variant("csv", tmp_path / "source")
    with pytest.raises(ValueError, match=r"no row .* the id of a sample .*'images/a.jpg'.* the first rows \['a'"):
        prepare(str(tmp_path / "source"), str(tmp_path / "out"), count_words,
                join=Join.parse(write_long(tmp_path, ".csv"), "key", ["long"]))  # fmt: skip
    for on in ("=key", "who=key", "id="):
        with pytest.raises(ValueError, match=r"--join-on is .* FIELD one of id, key, path, name, stem"):
            Join.parse("x.csv", on)
    with pytest.raises(ValueError, match=r"must end in one of .parquet"):
        Join.parse("x.xlsx", "id")


# --- bad corpora -----------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [struct.pack(">I", len(b)) + n + b + struct.pack(">I", zlib.crc32(n + b)) for n, b in chunks]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = image("JPEG", 99)
BAD = {  # reason -> (image, caption)
    "corrupt image": (JPEG[:-40], b"cut off"),  # its header is whole
    "zero bytes": (b"", b"nothing"),
    "not an image": (b"<html>404 not found</html>", b"a page"),
    "too many pixels": (bomb(20_000, 20_000), b"a bomb"),
    "no caption": (JPEG, b" "),
    "caption is not UTF-8": (JPEG, "gr\N{LATIN SMALL LETTER U WITH DIAERESIS}n".encode("latin-1")),
}


def bad_tars(folder: Path) -> tuple[dict[bytes, list[str]], list[tuple[str, str]]]:
    """270 samples in 27 shards, 3% of them bad, a shard cut off and an empty one; what is good, and (id, reason)."""
    folder.mkdir()
    random = Random(0)
    places = dict(zip(random.sample(range(250), len(BAD)), BAD, strict=True))
    good, bad = {}, []
    for shard in range(27):
        body = io.BytesIO()
        with tarfile.open(fileobj=body, mode="w") as tar:
            for number in range(10 * shard, 10 * shard + 10):
                reason = places.get(number)
                data, text = BAD[reason] if reason else (image("JPEG", number), f"image {number}".encode())
                members = [(f"{number}.jpg", data), (f"{number}.txt", text)]
                if number in (5, 105):
                    members += [(f"{number}.jpg", JPEG), (f"{number}.txt", b"the second of this key")]
                    bad.append((f"{shard:05d}.tar#{number}", "duplicate key"))
                for name, content in members:
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
                if reason:
                    bad.append((f"{shard:05d}.tar#{number}", reason))
                else:
                    good[data] = [text.decode()]
        (folder / f"{shard:05d}.tar").write_bytes(body.getvalue())
    (folder / "00027.tar").write_bytes(b"")
    cut = (folder / "00026.tar").read_bytes()
    last = image("JPEG", 269)
    (folder / "00026.tar").write_bytes(cut[: cut.index(last) + 100])  # inside the last image
    del good[last]
    cut_off = [("00026.tar", "truncated tar"), ("00026.tar#269", "no image")]  # the sample it ends in is named, too
    return good, sorted([*bad, ("00027.tar", "empty tar"), *cut_off])


def test_of_a_bad_corpus_of_tars_all_that_is_good_is_delivered(tmp_path: Path, without_ray: None) -> None:
    good, bad = bad_tars(tmp_path / "data")
    uri = str(tmp_path / "data")
    with pytest.raises(ValueError, match=r"2 of 28 shards are bad, more than max_bad_fraction = 0.05"):
        prepare(uri, "", count_words)
    prepared = prepare(uri, "", count_words, max_bad_fraction=0.1)
    assert quarantined(prepared) == bad
    assert len(bad) == len(BAD) + 5
    assert delivered(uri) == good
    assert (prepared.samples, prepared.found) == (len(good), len(good) + len(bad))


def test_training_reads_every_good_sample_of_a_bad_corpus(tmp_path: Path, without_ray: None) -> None:
    from vladva.config import ClusterConfig, DataConfig, TrainConfig
    from vladva.models.preprocessor import Preprocessor
    from vladva.recipes import RECIPES
    from vladva.train.data_loader import ChunkReader

    good, _ = bad_tars(tmp_path / "data")
    prepare(str(tmp_path / "data"), "", Preprocessor("tiny").count_tokens, max_bad_fraction=0.1)
    data, alone = DataConfig(uri=str(tmp_path / "data"), run_length=1), ClusterConfig(workers=1)
    train = TrainConfig(steps=1, global_batch=1, chunk_size=1)
    reader = ChunkReader(replace(RECIPES["tiny"](), data=data, train=train, cluster=alone))
    found = {}
    for chunk in range(len(good)):
        [(_, _, _, content, _)] = samples = reader.fetch(chunk)
        found[content] = [example.short for example in reader.examples(chunk, samples)]
    assert found == good


def bad_table(folder: Path, count: int = 300) -> tuple[dict[bytes, list[str]], list[tuple[str, str]]]:
    """A CSV of `count` images, 3% bad or missing; what is good, and (place, reason) of the others."""
    (folder / "images").mkdir(parents=True)
    places = dict(
        zip(Random(1).sample(range(count), len(BAD) + 2), [*BAD, "missing file", "duplicate key"], strict=True)
    )
    lines, good, bad = [b"id,path,caption"], {}, []
    for number in range(count):
        reason = places.get(number, "")
        default = (image("JPEG", number), f"image {number}".encode())
        data, text = BAD.get(reason, default)
        if reason != "missing file":
            (folder / f"images/{number}.jpg").write_bytes(data)
        called = b"%d" % (number - 1 if reason == "duplicate key" else number)
        lines.append(called + b",images/%d.jpg," % number + text)
        if reason:
            bad.append((f"pairs.csv, line {number + 2}", reason))
        else:
            good[data] = [text.decode()]
    (folder / "pairs.csv").write_bytes(b"\n".join([*lines, b"1,2"]))
    return good, sorted([*bad, (f"pairs.csv, line {count + 2}", "broken row")])


def test_of_a_bad_table_all_that_is_good_is_delivered(tmp_path: Path, without_ray: None) -> None:
    good, bad = bad_table(tmp_path / "source")
    source, out, options = str(tmp_path / "source"), str(tmp_path / "out"), SourceOptions(id_column="id")
    with pytest.raises(ValueError, match=r"^8 of 301 samples are bad, more than --max-bad-fraction 0.01 allows: 1 "):
        prepare(source, out, count_words, options, samples_per_shard=40, max_bad_fraction=0.01)
    prepared = prepare(source, out, count_words, options, samples_per_shard=40)
    assert quarantined(prepared) == bad
    assert delivered(out) == good
    assert (prepared.found, prepared.samples) == (301, 301 - len(bad))
    index_rows = pq.read_table(tmp_path / "out/_index/quarantine.parquet").to_pylist()
    assert [row["reason"] for row in index_rows] == ["corrupt image"]  # what only decoding finds


# --- going on, and starting anew -------------------------------------------------------------------------------------


def killed_after(count: int) -> Callable[..., Iterator[Any]]:
    """Tasks of which the job sees so many before it is killed; one more has been done."""

    def run(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
        for number in numbers:
            result = json.loads(json.dumps(function(number)))
            if number == count:
                raise KeyboardInterrupt
            yield result

    return run


def test_what_was_killed_goes_on_and_gives_the_same_bytes(
    tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "source", 20)
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    whole = prepare(source, str(tmp_path / "whole"), count_words, samples_per_shard=3)
    with monkeypatch.context() as patch:
        patch.setattr(ray_tasks, "each", killed_after(3))
        with pytest.raises(KeyboardInterrupt):
            prepare(source, out, count_words, samples_per_shard=3)
    assert list(tars(tmp_path / "out")) == [f"00000{number}.tar" for number in range(4)]
    os.remove(tmp_path / "out/_prepare/receipts/000001.parquet")  # as after a kill between shard and receipt
    os.truncate(tmp_path / "out/000002.tar", 100)  # and as after an accident
    kept = (tmp_path / "out/000000.tar").stat().st_mtime_ns
    resumed = prepare(source, out, count_words, samples_per_shard=3)
    assert (resumed.shards, resumed.written, whole.written) == (7, 5, 7)
    assert tars(tmp_path / "out") == tars(tmp_path / "whole")
    assert (tmp_path / "out/000000.tar").stat().st_mtime_ns == kept
    assert ShardIndex.open(out).fingerprint == ShardIndex.open(whole.uri).fingerprint
    assert prepare(source, out, count_words, samples_per_shard=3).written == 0


def test_a_changed_source_or_other_options_are_refused(tmp_path: Path, without_ray: None) -> None:
    write_folder(tmp_path / "source", 4)
    source, out = str(tmp_path / "source"), str(tmp_path / "out")
    prepare(source, out, count_words, samples_per_shard=1)
    before = tars(tmp_path / "out")
    with pytest.raises(ValueError, match=r"\(samples_per_shard was 1, is 3\): choose another --out, .*--overwrite"):
        prepare(source, out, count_words, samples_per_shard=3)
    (tmp_path / "source/001.txt").write_text("another text")
    with pytest.raises(ValueError, match=r"\(files was 8 with digest \w+, is 8 with digest"):
        prepare(source, out, count_words, samples_per_shard=1)
    assert tars(tmp_path / "out") == before
    (tmp_path / "out/notes.md").write_text("mine")
    anew = prepare(source, out, count_words, samples_per_shard=3, overwrite=True)
    assert (anew.shards, anew.written) == (2, 2)
    assert ["another text"] in delivered(out).values()
    assert (tmp_path / "out/notes.md").exists()

    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/x.tar").write_bytes(before["000000.tar"])
    with pytest.raises(ValueError, match="holds shards of other origin"):
        prepare(source, str(tmp_path / "foreign"), count_words)
    with pytest.raises(ValueError, match="is inside the source"):
        prepare(source, f"{source}/out", count_words)
    with pytest.raises(ValueError, match="folder is written as shards, name their folder with --out"):
        prepare(source, "", count_words)


def test_a_source_of_which_nothing_is_good_says_so(tmp_path: Path, without_ray: None) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/pairs.csv").write_text("path,caption\ngone.jpg,a\n")
    with pytest.raises(ValueError, match="1 of 1 samples are bad, .* 1 missing file. The first: pairs.csv, line 2"):
        prepare(str(tmp_path / "source"), str(tmp_path / "out"), count_words, max_bad_fraction=1.0)
    (tmp_path / "source/pairs.csv").write_text("path,caption\n")
    with pytest.raises(ValueError, match="none of the 0 entries of table can be used"):
        prepare(str(tmp_path / "source"), str(tmp_path / "out2"), count_words)


# --- negative controls: what is lost or altered between writing and scan is noticed ----------------------------------


def without_a_sample(content: bytes) -> bytes:
    """The tar with its first sample left out."""
    body = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(content)) as old, tarfile.open(fileobj=body, mode="w") as new:
        for member in old.getmembers()[2:]:
            new.addfile(member, old.extractfile(member))
    return body.getvalue()


def with_other_bytes(content: bytes) -> bytes:
    """The tar with an image that is good and not the one that was written."""
    old, new = image("PNG", 0), image("PNG", 99)
    assert len(old) == len(new)
    return content.replace(old, new)


def with_a_broken_image(content: bytes) -> bytes:
    """The tar with a byte of an image turned over, so that the scan refuses it."""
    place = content.index(image("PNG", 0)) + 60
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


@pytest.mark.parametrize("spoil", [without_a_sample, with_other_bytes, with_a_broken_image])
def test_a_shard_that_is_not_what_was_written_is_noticed(
    spoil: Callable[[bytes], bytes], tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_folder(tmp_path / "source", 6)
    source, out = str(tmp_path / "source"), str(tmp_path / "out")

    def scan_spoilt(*arguments: Any, **options: Any) -> Any:
        shard = tmp_path / "out/000000.tar"
        shard.write_bytes(spoil(shard.read_bytes()))
        return scan(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "scan", scan_spoilt)
        with pytest.raises(ValueError, match=r"000000.tar does not hold .*000000000\): delete it and run again"):
            prepare(source, out, count_words, samples_per_shard=3)
    os.remove(tmp_path / "out/000000.tar")
    mended = prepare(source, out, count_words, samples_per_shard=3)
    assert (mended.written, mended.samples, mended.quarantined) == (1, 6, {})


def test_a_refusal_that_is_not_counted_is_noticed(
    tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad_table(tmp_path / "source", 60)
    monkeypatch.setattr(prepare_module, "verify_shards", lambda *_: [])  # loses what the scan has refused
    with pytest.raises(AssertionError, match="61 found, 60 accounted for"):
        prepare(str(tmp_path / "source"), str(tmp_path / "out"), count_words, SourceOptions(id_column="id"),
                max_bad_fraction=0.2)  # fmt: skip


# --- the job, Ray, S3 ------------------------------------------------------------------------------------------------


def test_the_job_leaves_training_nothing_to_scan(
    tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from vladva.config import DataConfig
    from vladva.recipes import RECIPES
    from vladva.train.data_loader import run_preprocessor

    good, bad = bad_table(tmp_path / "source", 200)
    source, out = str(tmp_path / "source/pairs.csv"), str(tmp_path / "out")
    command = ["jobs/prepare.py", source, "--out", out, "--id-column", "id", "--samples-per-shard", "40"]
    monkeypatch.setattr(sys, "argv", command)
    main()
    assert delivered(out) == good
    said = capsys.readouterr().out
    assert f"201 found: {len(good)} samples, {len(bad)} quarantined (" in said
    assert f"The page: {out}/_index/summary.html. Next: jobs/train.py RECIPE --data.uri {out}" in said
    assert "Where everything went" in (tmp_path / "out/_index/summary.html").read_text()

    config = replace(RECIPES["tiny"](), data=DataConfig(uri=out))
    assert scan(out, run_preprocessor(config).count_tokens).num_scanned == 0  # as training begins
    main_without_verify = [*command, "--no-verify"]
    monkeypatch.setattr(sys, "argv", main_without_verify)
    main()
    assert scan(out, run_preprocessor(config).count_tokens).num_scanned == 5  # negative control: headers do not do


def test_ray_tasks_write_what_one_process_writes(tmp_path: Path, ray_cluster: None) -> None:
    def count_letters(texts: list[str]) -> list[int]:  # here, so that it travels to the workers
        return [len(text) for text in texts]

    good, bad = bad_table(tmp_path / "source", 200)
    source, options = str(tmp_path / "source"), SourceOptions(id_column="id")
    prepared = prepare(source, str(tmp_path / "many"), count_letters, options, samples_per_shard=20)
    counted = statistics.compute_statistics(prepared.uri)
    assert delivered(prepared.uri) == good
    assert quarantined(prepared) == bad
    with pytest.MonkeyPatch.context() as patch:
        leave_ray_out(patch)
        alone = prepare(source, str(tmp_path / "one"), count_letters, options, samples_per_shard=20)
        assert statistics.compute_statistics(alone.uri) == counted
    assert tars(tmp_path / "one") == tars(tmp_path / "many")
    assert len(tars(tmp_path / "one")) == alone.shards == 10


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--join-on", "id"], "--captions-from and --join-on belong together"),
        (["--captions-from", "x.csv"], "--captions-from and --join-on belong together"),
        (["--samples-per-shard", "0"], "--samples-per-shard is 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused(arguments: list[str], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse(["source", *arguments])


@pytest.mark.slow
def test_s3_gives_what_the_disk_gives(tmp_path: Path, without_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    options = write_variant("karpathy", tmp_path / "source")
    local = prepare(str(tmp_path / "source"), str(tmp_path / "out"), count_words, options, samples_per_shard=2)
    with s3_server(tmp_path / "server") as variables:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        base = f"s3://{BUCKET}/source"
        for file in sorted((tmp_path / "source").rglob("*.*")):
            storage.write_bytes_atomically(
                storage.join(base, str(file.relative_to(tmp_path / "source"))), file.read_bytes()
            )
        options = replace(options, images=f"{base}/coco")
        out = f"s3://{BUCKET}/out"
        for source in (base, f"{base}/dataset_coco.json"):
            remote = prepare(source, out, count_words, options, samples_per_shard=2)
            assert (remote.samples, remote.left_out) == (5, {"split test": 1})
        assert remote.written == 0
        assert delivered(out) == delivered(local.uri)
        for name, content in tars(tmp_path / "out").items():
            assert storage.read_bytes(storage.join(out, name)) == content
