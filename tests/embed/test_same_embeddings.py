"""Preparing, embedding and evaluating read a file alike: the same contents, the same embeddings to the bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from tests.support.source_variants import CAPTIONS, IMAGES, VARIANTS, write_variant
from tests.support.without_ray import count_words, leave_ray_out
from vladva.benchmarks.benchmark import find_benchmark
from vladva.data.image_refs import read_images
from vladva.data.shard_index import ShardIndex, read_samples
from vladva.data.source import SourceOptions, open_source
from vladva.embed.corpus import open_corpus, read_item_images
from vladva.embed.pipeline import encode, read_embeddings
from vladva.embed.source_items import source_items
from vladva.embed.table import embedding_matrix
from vladva.evaluate.benchmark_embeddings import embed, open_embeddings
from vladva.prepare.pipeline import prepare

TABLES = [name for name in VARIANTS if name != "webdataset"]  # that is embedded from its index, like prepared data


@pytest.mark.parametrize("variant", TABLES)
def test_prepared_and_embedded_contents_are_the_same(
    variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = write_variant(variant, tmp_path / "source")
    leave_ray_out(monkeypatch)
    prepared = prepare(str(tmp_path / "source"), str(tmp_path / "out"), count_words, options)
    index = ShardIndex.open(prepared.uri)
    refs = index.samples(0, index.num_samples)
    samples = dict(zip(read_samples(prepared.uri, refs), [ref.captions for ref in refs], strict=True))

    source = open_source(str(tmp_path / "source"), options, needs_images=False)
    items = [item for part in source.split() for found in source_items(("image", "text"), part) for item in found]
    images = {item["id"]: item for item in items if item["kind"] == "image"}
    absent = {"crc32": None}
    bodies = [i["image"] or read_item_images(source.uri, [absent | i])[0] for i in images.values()]
    assert bodies == list(samples) == list(IMAGES.values())
    texts = [item["text"] for item in items if item["kind"] == "text"]
    assert sorted(texts) == sorted(text for captions in samples.values() for text in captions)
    ids = [(item["kind"], item["id"]) for item in items if item["kind"] == "text"]
    assert len(set(ids)) == len(ids)


def embeddings(uri: str) -> dict[str, bytes]:
    """Text, or the bytes of the image's caption, -> its embedding."""
    table = read_embeddings(uri)
    rows = zip(table["kind"].to_pylist(), table["text"].to_pylist(), table["caption"].to_pylist(), strict=True)
    names = [text if kind == "text" else f"image of {caption}" for kind, text, caption in rows]
    return dict(zip(names, map(bytes, embedding_matrix(table).astype(np.float32)), strict=True))


def test_three_jobs_give_the_same_embeddings_to_the_bit(tmp_path: Path, ray_cluster: None, tiny: str) -> None:
    write_variant("csv, lists", tmp_path / "source")
    source = str(tmp_path / "source")
    table = tmp_path / "source/pairs.csv"
    good = table.read_text()
    table.write_text(good + "images/z.jpg,one,too many\n")
    prepared = prepare(source, str(tmp_path / "out"), count_words, max_bad_fraction=0.5)
    assert prepared.quarantined == {"broken row": 1}
    found = []
    for name, uri in (("raw", source), ("prepared", prepared.uri)):
        corpus = open_corpus(uri, count_tokens=count_words)
        options = {"actors": 1, "corpus": corpus.uri, "total": corpus.num_items}
        encode(corpus.items, tiny, str(tmp_path / name), read_images=corpus.read_images, **options)
        found.append(embeddings(str(tmp_path / name)))
    assert found[0] == found[1]
    [bad] = pq.read_table(tmp_path / "raw/_quarantine.parquet").to_pylist()
    assert bad["id"] == "pairs.csv, line 7"
    assert bad["reason"].startswith("broken row: 3 cells where the header has 2: images/z.jpg")
    table.write_text(good)
    assert len(found[0]) == 15

    task = find_benchmark("retrieval").read(source)
    embedded = embed(tiny, {"retrieval": task}, str(tmp_path / "evaluation"), dtype="float32", actors=1)
    evaluated = open_embeddings(embedded.tables[embedded.layer])
    texts = [bytes(row) for row in evaluated.of_texts(task.texts).astype(np.float32)]
    assert texts == [found[0][text] for text in task.texts]
    images = [bytes(row) for row in evaluated.of_images(task.images).astype(np.float32)]
    assert images == [found[0][f"image of {captions[0]}"] for captions in CAPTIONS.values()]
    assert read_images(task.images) == list(IMAGES.values())
    assert len(set(texts + images)) == 15  # negative control: they do differ from each other


def test_a_relative_folder_of_images_is_the_same_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = write_variant("coco", tmp_path / "source")
    monkeypatch.chdir(tmp_path)
    relative = SourceOptions(images="source/images")
    items = [
        [item["shard"] for found in source_items(("image",), open_source(uri, given)) for item in found]
        for uri, given in ((str(tmp_path / "source"), options), ("source", relative))
    ]
    assert items[0] == items[1]
    assert all(Path(shard).is_absolute() for shard in items[0])
