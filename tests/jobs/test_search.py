"""jobs/search.py --rerank: the nearest, in the order in which the unadapted generator says yes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from jobs import search
from tests.support.small_corpora import scan_here
from vladva.core.hashing import digest
from vladva.core.images import decode_image
from vladva.data.scenes.corpus import write_scenes
from vladva.data.shard_index import ShardIndex
from vladva.embed.corpus import ITEM, read_item_images
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.index.build import build_index
from vladva.mine.negatives import mining_rows
from vladva.models.embedder import load_embedder
from vladva.models.resolve import describe
from vladva.models.yes_probability import yes_probabilities

SAMPLES = 12
QUERY = "a small red circle to the left of a large blue square"


class Indexed:
    """Twelve scenes with their captions, embedded by the tiny model, in an index of images and one of texts."""

    def __init__(self, folder: Path, tiny: str) -> None:
        write_scenes(str(folder), train=SAMPLES, test=1, negatives=0, samples_per_shard=SAMPLES)
        data = str(folder / "train")
        scan_here(data)
        self.embedder, description = load_embedder(tiny), describe(tiny, adapter=True, dtype="float32")[1]
        items = mining_rows(ShardIndex.open(data), 30, 0, SAMPLES)
        self.texts = {item["id"]: item["text"] for item in items if item["kind"] == "text"}
        images = [item for item in items if item["kind"] == "image"]
        bodies = read_item_images(data, images)
        self.images = dict(zip([item["id"] for item in images], map(decode_image, bodies), strict=True))
        vectors_ND = np.concatenate(
            [
                self.embedder.embed_images(list(self.images.values())),
                self.embedder.embed_texts(list(self.texts.values())),
            ]
        )
        rows = pa.Table.from_pylist([*images, *(item for item in items if item["kind"] == "text")], ITEM)
        contents = pa.array([digest(name) for name in rows["id"].to_pylist()], pa.binary(16))
        writer = TableWriter(str(folder / "table"), description, data)
        rows = rows.drop_columns(["image"]).append_column("content", contents)
        write_part(str(folder / "table"), rows, vectors_ND, description)
        writer.commit()
        self.index = {kind: str(folder / f"{kind}s") for kind in ("image", "text")}
        for kind, uri in self.index.items():
            build_index(str(folder / "table"), uri, kind=kind)
        self.query_image = folder / "query.png"
        next(iter(self.images.values())).save(self.query_image)


@pytest.fixture(scope="module")
def indexed(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> Indexed:
    return Indexed(tmp_path_factory.mktemp("indexed"), tiny)


def searched(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[tuple[str, float]]:
    """(id, score) of the hits that the command prints."""
    shown: list[tuple[str, float]] = []
    monkeypatch.setattr(search, "print_hits", lambda hits: shown.extend((hit.id, hit.score) for hit in hits))
    monkeypatch.setattr(sys, "argv", ["jobs/search.py", *arguments])
    search.main()
    return shown


def test_images_are_in_the_order_of_yes(indexed: Indexed, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query = (indexed.index["image"], QUERY, "--model", tiny)
    plain = searched(monkeypatch, *query, "-k", "12")
    found = searched(monkeypatch, *query, "-k", "3", "--rerank", "8")
    # By hand: each of the eight nearest asked alone, then sorted.
    candidates = [name for name, _ in plain[:8]]
    answers = {
        name: float(yes_probabilities(indexed.embedder, [indexed.images[name]], [QUERY])[0]) for name in candidates
    }
    expected = sorted(candidates, key=lambda name: -answers[name])[:3]
    assert [name for name, _ in found] == expected
    assert [score for _, score in found] == pytest.approx([answers[name] for name in expected], abs=1e-4)
    assert len(set(answers.values())) == 8
    assert [name for name, _ in plain[:3]] != expected  # negative control: re-ranking does something


def test_texts_are_in_the_order_of_yes(indexed: Indexed, tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    query = (indexed.index["text"], "--image", str(indexed.query_image), "--model", tiny)
    nearest = [name for name, _ in searched(monkeypatch, *query, "-k", "6")]
    found = searched(monkeypatch, *query, "-k", "6", "--rerank", "6")
    image = decode_image(indexed.query_image.read_bytes())
    answers = {name: float(yes_probabilities(indexed.embedder, [image], [indexed.texts[name]])[0]) for name in nearest}
    assert [name for name, _ in found] == sorted(nearest, key=lambda name: -answers[name])


def test_an_image_is_not_compared_with_an_image(
    indexed: Indexed, tiny: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        searched(
            monkeypatch,
            *(indexed.index["image"], "--image", str(indexed.query_image), "--model", tiny, "--rerank", "4"),
        )
    assert "kind = 'text'" in capsys.readouterr().err
