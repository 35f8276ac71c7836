"""Mining: against a twin that compares every sample with every other; from table to shards that training reads."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tests.index.exact_store import ExactStore
from tests.support import without_ray
from tests.support.small_corpora import run_over, scan_here
from vladva.config import DataConfig
from vladva.core import ray_tasks, storage
from vladva.core.hashing import digest
from vladva.data import shard_copy
from vladva.data.shard_index import ShardIndex
from vladva.data.shard_writer import ShardWriter
from vladva.embed.corpus import ITEM
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.mine import negatives as mining
from vladva.mine.negatives import (
    EqualImages,
    MinedNegative,
    MiningConfig,
    MiningQuery,
    NegativeFinder,
    copy_with_negatives,
    negatives_uri,
)
from vladva.report.negatives_page import write_negatives_page
from vladva.train.data_loader import ChunkReader

WIDTH = 8
MODEL = {"fingerprint": "0123456789abcdef", "dimension": WIDTH}
WIDE = MiningConfig(per_sample=5, neighbours=10_000, margin=0.05, relative=0.9)


def unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


class Corpus:
    """Samples with one or two captions; some share an image, some a caption with another sample."""

    def __init__(self, samples: int = 40) -> None:
        self.images_ND = unit(samples, 1)
        self.ids = [f"000000.tar#{number:03d}" for number in range(samples)]
        self.captions = {name: [f"caption {n}", f"second {n}"][: 1 + n % 2] for n, name in enumerate(self.ids)}
        self.captions[self.ids[7]] = ["caption 3"]  # a text that is another sample's as well
        texts = [(name, i, text) for name in self.ids for i, text in enumerate(self.captions[name])]
        noise = unit(len(texts), 2)
        self.text_vectors = {}
        for row, (name, i, _) in enumerate(texts):
            vector = self.images_ND[self.ids.index(name)] + 0.8 * noise[row]
            self.text_vectors[name, i] = vector / np.linalg.norm(vector)
        self.same_image = {self.ids[10]: b"a", self.ids[11]: b"a", self.ids[20]: b"b", self.ids[21]: b"b"}

    @property
    def equal(self) -> EqualImages:
        captions: dict[bytes, set[str]] = {}
        for name, image in self.same_image.items():
            captions.setdefault(image, set()).update(self.captions[name])
        return EqualImages(self.same_image, {image: frozenset(texts) for image, texts in captions.items()})

    def finder(self, config: MiningConfig, equal: EqualImages | None = None) -> NegativeFinder:
        def store(ids: list[str], vectors: np.ndarray, **columns: list) -> ExactStore:
            values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.astype(np.float32).ravel()), WIDTH)
            return ExactStore(pa.table({"id": ids, "embedding": values, **columns}), "model")

        keys = list(self.text_vectors)
        texts = store(
            [f"{name}#{i}" for name, i in keys],
            np.stack([self.text_vectors[key] for key in keys]),
            text=[self.captions[name][i] for name, i in keys],
        )
        images = store(self.ids, self.images_ND, caption=[self.captions[name][0] for name in self.ids])
        return NegativeFinder(texts, images, equal or self.equal, config)

    def query(self, number: int) -> MiningQuery:
        name = self.ids[number]
        vectors = np.stack([self.text_vectors[name, i] for i in range(len(self.captions[name]))])
        return MiningQuery(name, self.images_ND[number], self.captions[name], vectors)


def slow_negatives(corpus: Corpus, number: int, config: MiningConfig) -> dict[str, float]:
    """Text -> by how much it is less similar than the sample's own; every rule written out."""
    name, image = corpus.ids[number], corpus.images_ND[number]
    relatives = {name} | {
        other
        for other in corpus.ids
        if name in corpus.same_image and corpus.same_image.get(other) == corpus.same_image[name]
    }
    own_texts = {text for relative in relatives for text in corpus.captions[relative]}
    mine = [float(corpus.text_vectors[name, i] @ image) for i in range(len(corpus.captions[name]))]
    gaps: dict[str, float] = {}

    def consider(text: str, positive: float, similarity: float) -> None:
        low_enough = similarity <= positive - config.margin and (
            positive <= 0 or similarity <= config.relative * positive
        )
        if low_enough and text not in own_texts:
            gaps[text] = min(gaps.get(text, np.inf), positive - similarity)

    for other in corpus.ids:
        if other in relatives:
            continue
        for i, text in enumerate(corpus.captions[other]):
            consider(text, max(mine), float(corpus.text_vectors[other, i] @ image))
        for i, positive in enumerate(mine):
            other_image = corpus.images_ND[corpus.ids.index(other)]
            consider(corpus.captions[other][0], positive, float(corpus.text_vectors[name, i] @ other_image))
    return dict(sorted(gaps.items(), key=lambda item: (item[1], item[0]))[: config.per_sample])


@pytest.mark.parametrize(
    "config", [WIDE, replace(WIDE, margin=0.3), replace(WIDE, relative=0.5), replace(WIDE, per_sample=1)]
)
def test_equals_slow_twin(config: MiningConfig) -> None:
    corpus = Corpus()
    find = corpus.finder(config)
    ways = set()
    for number in range(len(corpus.ids)):
        found = find(corpus.query(number))
        expected = slow_negatives(corpus, number, config)
        assert [each.text for each in found] == list(expected)
        assert [each.gap for each in found] == pytest.approx(list(expected.values()), abs=1e-6)
        ways |= {each.found_by for each in found}
    assert ways == {"image", "caption"}


def test_what_the_rules_keep_out_comes_in_without_them() -> None:
    """Negative controls, one for each rule."""
    corpus = Corpus()
    nothing_known = EqualImages({}, {})
    corpus.images_ND[11] = corpus.images_ND[10]
    near = 0.97 * corpus.text_vectors[corpus.ids[10], 0] + 0.1 * unit(1, 9)[0]  # a caption of the equal image
    corpus.text_vectors[corpus.ids[11], 0] = near / np.linalg.norm(near)
    lenient = replace(WIDE, margin=0.0, relative=1.0)

    def found(config: MiningConfig, equal: EqualImages | None = None) -> list[MinedNegative]:
        return corpus.finder(config, equal)(corpus.query(10))

    assert any(each.owner == corpus.ids[11] for each in found(lenient, nothing_known))
    assert not any(each.owner == corpus.ids[11] for each in found(lenient))
    assert min(each.gap for each in found(lenient)) < 0.05
    assert min(each.gap for each in found(WIDE)) >= 0.05
    assert corpus.finder(WIDE)(replace(corpus.query(10), captions=[])) == []
    # The text of sample 7 is one that sample 3 has, too: of another image, and yet no negative.
    texts = [each.text for each in corpus.finder(replace(lenient, per_sample=100))(corpus.query(3))]
    assert "caption 3" not in texts


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"per_sample": 0}, "per_sample is 0"), ({"relative": 1.5}, "relative 1.5"), ({"margin": -1}, "margin is -1")],
)
def test_settings_that_make_no_negatives_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(WIDE, **changes)


# --- shards ----------------------------------------------------------------------------------------------------------


def png(seed: int) -> bytes:
    body = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(body, "PNG")
    return body.getvalue()


@pytest.fixture
def mined(tmp_path: Path, tiny: str, monkeypatch: pytest.MonkeyPatch) -> tuple[ShardIndex, str]:
    """A scanned data set of 30 samples, two of them with one image, and a table of its embeddings in OUT."""
    without_ray.leave_ray_out(monkeypatch)
    data, out = str(tmp_path / "data"), str(tmp_path / "out")
    with ShardWriter(data, 8) as writer:
        for number in range(30):
            image = png(4 if number == 5 else number)
            members = {"png": image, "json": json.dumps({"captions": [f"short {number}"], "scene": number}).encode()}
            if number % 5 == 2:  # captions in a text; no JSON at all
                members = {"png": image, "txt": f"short {number}".encode()}
            if number == 3:
                members["json"] = json.dumps({"caption": "short 3", "negatives": ["wrong on purpose"]}).encode()
            writer.write(f"{number:06d}", members)
    scan_here(data)
    index = ShardIndex.open(data)
    refs = index.samples(0, 30)
    [items] = mining._items(index, 30, 0, 30)
    vectors = {}
    for number, ref in enumerate(refs):
        image = unit(1, 4 if number == 5 else number)[0]
        vectors[ref.id], vectors[f"{ref.id}#0"] = image, image + 0.5 * unit(1, 100 + number)[0]
    contents = [
        digest(png(4 if int(i["id"][11:17]) == 5 else int(i["id"][11:17])) if i["kind"] == "image" else i["text"])
        for i in items
    ]
    rows = pa.Table.from_pylist(items, ITEM).drop_columns(["image"])
    rows = rows.append_column("content", pa.array(contents, pa.binary(16)))
    table = storage.join(out, mining.MINED, "table")
    writer = TableWriter(table, MODEL, index.data_uri)
    write_part(table, rows, np.stack([vectors[i["id"]] for i in items]), MODEL)
    writer.commit()
    return index, out


CONFIG = MiningConfig(per_sample=3, neighbours=30)


def content(uri: str) -> dict[str, bytes]:
    with tarfile.open(uri) as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_shards_are_copied_with_negatives_that_training_reads(
    mined: tuple[ShardIndex, str], tiny: str, tmp_path: Path
) -> None:
    index, out = mined
    summary = copy_with_negatives(index, out, CONFIG)
    assert summary.samples == 30
    assert 0 < summary.negatives <= 90
    scan_here(out)
    copied = ShardIndex.open(out)
    assert copied.shards == index.shards
    for before, after in zip(index.samples(0, 30), copied.samples(0, 30), strict=True):
        assert (before.id, before.captions, before.crc32) == (after.id, after.captions, after.crc32)
        mined_here = [text for text in after.negatives if text not in before.negatives]
        assert after.negatives[: len(before.negatives)] == before.negatives
        assert len(mined_here) <= 3
        number = int(before.id[-6:])
        forbidden = {4, 5} if number in (4, 5) else {number}
        assert not {f"short {n}" for n in forbidden} & set(mined_here)
    assert copied.samples(3, 1)[0].negatives[0] == "wrong on purpose"
    for shard in index.shards:
        old, new = content(f"{index.data_uri}/{shard}"), content(f"{out}/{shard}")
        assert all(new[name] == data for name, data in old.items() if not name.endswith(".json"))
        for name, data in old.items():
            if name.endswith(".json"):
                was, is_now = json.loads(data), json.loads(new[name])
                assert {**is_now, "negatives": []} == {**was, "negatives": []}
    run = run_over(DataConfig(out, hard_negatives=2, run_length=2), tmp_path, tiny)
    batch = ChunkReader(run)(0)
    assert len(batch.text_owners) > 4
    assert (
        len(ChunkReader(replace(run, data=replace(run.data, uri=index.data_uri)))(0).text_owners) <= 5
    )  # but for one: none


def test_an_interrupted_job_goes_on(mined: tuple[ShardIndex, str], monkeypatch: pytest.MonkeyPatch) -> None:
    index, out = mined
    whole = str(Path(out).parent / "whole")
    shutil.copytree(out, whole)
    copy_with_negatives(index, whole, CONFIG)
    calls: list[str] = []

    def interrupted(uri: str, out_uri: str, additions: dict) -> int:
        calls.append(uri)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return shard_copy.copy_shard(uri, out_uri, additions)

    monkeypatch.setattr(mining, "copy_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        copy_with_negatives(index, out, CONFIG)
    assert not Path(out, index.shards[2]).exists()
    summary = copy_with_negatives(index, out, CONFIG)
    assert summary.copied_shards == 2  # of four: two were there
    assert len(calls) == 5
    for shard in index.shards:
        assert Path(out, shard).read_bytes() == Path(whole, shard).read_bytes()
    again = copy_with_negatives(index, out, CONFIG)
    assert (again.copied_shards, again.negatives) == (0, summary.negatives)
    with pytest.raises(ValueError, match=r"mined otherwise \(margin was 0.05, is 0.2\)"):
        copy_with_negatives(index, out, replace(CONFIG, margin=0.2))


def test_the_page_shows_samples_with_their_negatives(mined: tuple[ShardIndex, str]) -> None:
    index, out = mined
    summary = copy_with_negatives(index, out, CONFIG)
    page = Path(write_negatives_page("", index, summary)).read_text()
    assert page.count("<article>") == summary.with_negatives <= 50
    rows = pa.parquet.read_table(negatives_uri(out, index.shards[0])).to_pylist()
    assert rows[0]["negative"] in page
    assert "data:image/png;base64," in page


def test_a_table_is_of_short_captions_by_their_numbers(mined: tuple[ShardIndex, str]) -> None:
    """A long caption keeps its number, and is left out."""
    index, _ = mined
    [items] = mining._items(index, 2, 0, 30)  # "short 3" is two words: none is short
    assert {item["kind"] for item in items} == {"image"}
    assert items[0]["caption"] is None


@pytest.mark.parametrize("spoil", [lambda rows: rows[:-940], lambda rows: rows])
def test_a_damaged_tar_is_copied_up_to_the_damage(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    with ShardWriter(str(tmp_path), 10) as writer:
        for number in range(3):
            writer.write(f"{number}", {"png": png(number), "json": b'{"caption": "a"}'})
    source = tmp_path / "000000.tar"
    data = source.read_bytes()
    body = data.rstrip(b"\0")
    cut = spoil(body) != body
    source.write_bytes(spoil(body) if cut else data)
    left_out = shard_copy.copy_shard(str(source), str(tmp_path / "copy.tar"), {"0": {"negatives": ["b"]}, "9": {}})
    copied = content(str(tmp_path / "copy.tar"))
    assert json.loads(copied["0.json"]) == {"caption": "a", "negatives": ["b"]}
    assert copied["0.png"] == png(0)
    assert ("2.png" in copied) == (not cut)
    assert (left_out > 0) == cut
    assert "9.json" not in copied


def test_the_job_s_each_is_the_one_of_the_cluster() -> None:
    """The tests above patch it; this is what they patch."""
    assert mining.ray_tasks is ray_tasks
