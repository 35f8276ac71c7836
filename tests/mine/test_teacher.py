"""The teacher's vectors: from a table in any order to each sample's caption; without a cluster."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from tests.support.small_corpora import run_over, scan_here, write_corpus
from vladva.config import DataConfig, LossConfig, RunConfig
from vladva.data.sample_vectors import SampleVectors, teacher_uri
from vladva.data.shard_index import ShardIndex
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.losses.pairs import TEACHER_NORM, to_teacher_numbers
from vladva.mine import teacher
from vladva.models.batch import MicroBatch
from vladva.train.data_loader import ChunkReader
from vladva.train.memory_plan import plan_memory

MODEL = {"fingerprint": "0123456789abcdef", "dimension": 6}
SAMPLES = 70
UNREADABLE = "000002.tar#000047#0"  # what the teacher could not embed


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny: str) -> RunConfig:
    """Seventy samples in shards of twenty, each with a short and a long caption."""
    uri = str(tmp_path_factory.mktemp("data"))
    write_corpus(uri, SAMPLES)
    scan_here(uri)
    run = run_over(DataConfig(uri, run_length=2), tmp_path_factory.mktemp("runs"), tiny, steps=2)
    return replace(run, loss=LossConfig(false_negatives_above=0.8))


def embedding_of(name: str) -> np.ndarray:
    """What the teacher makes of an item: random, by its name."""
    return np.random.default_rng(list(name.encode())).normal(size=MODEL["dimension"]).astype(np.float32)


@pytest.fixture(scope="module")
def vectors(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> SampleVectors:
    """Of a table whose rows are in another order than the samples, in several files, by several tasks."""
    index = ShardIndex.open(config.data.uri)
    items = [
        item
        for first in range(0, SAMPLES, 32)
        for item in next(teacher._short_captions(index, 5, first, min(32, SAMPLES - first)))
    ]
    assert len(items) == SAMPLES  # the long captions are left out
    items = [item for item in items if item["id"] != UNREADABLE]
    np.random.default_rng(0).shuffle(items)
    table = str(tmp_path_factory.mktemp("table"))
    writer = TableWriter(table, MODEL, index.data_uri, "float16")
    for first in range(0, len(items), 16):
        rows = pa.Table.from_pylist(items[first : first + 16]).append_column(
            "content", pa.array([bytes(16)] * len(items[first : first + 16]), pa.binary(16))
        )
        embeddings = np.stack([embedding_of(item["id"]) for item in items[first : first + 16]])
        write_part(table, rows, embeddings, MODEL, "float16")
    writer.commit()
    uri = teacher_uri(config, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teacher, "SAMPLES_PER_TASK", 25)
        teacher.align(table, index, uri)
    return SampleVectors.open(uri, index)


def test_each_caption_has_its_own_vector(vectors: SampleVectors) -> None:
    for number in range(SAMPLES):
        [ref] = vectors.index.samples(number, 1)
        expected = to_teacher_numbers(torch.from_numpy(embedding_of(f"{ref.id}#0"))[None].half().float()).numpy()[0]
        found = vectors(number, 0)
        assert found.dtype == np.int16
        if f"{ref.id}#0" == UNREADABLE:
            assert not found.any()  # similar to nothing
        else:
            assert np.array_equal(found, expected)
            assert abs(np.linalg.norm(found.astype(float)) - TEACHER_NORM) < 2
        assert not vectors(number, 1).any()  # the long caption
        assert not vectors(number, None).any()
    assert not np.array_equal(vectors(0, 0), vectors(1, 0))  # negative control


def test_batches_carry_the_vectors_of_their_captions(config: RunConfig, vectors: SampleVectors) -> None:
    reader = ChunkReader(config)
    numbers = [run.first + i for run in reader.find.schedule.chunk(3) for i in range(run.count)]
    batch = reader(3)
    assert np.array_equal(batch.teacher, np.stack([vectors(number, 0) for number in numbers]))
    again = MicroBatch.from_row(batch.to_row())
    assert np.array_equal(again.teacher, batch.teacher)
    assert ChunkReader(replace(config, loss=LossConfig()))(3).teacher is None


def test_vectors_of_other_samples_are_refused(config: RunConfig, vectors: SampleVectors, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="start the run with"):
        ChunkReader(replace(config, name="another"))
    write_corpus(str(tmp_path), SAMPLES + 1)
    scan_here(str(tmp_path))
    with pytest.raises(ValueError, match="of other samples"):
        SampleVectors.open(vectors.uri, ShardIndex.open(str(tmp_path)))


def test_what_is_there_is_not_made_again(config: RunConfig, vectors: SampleVectors) -> None:
    told: list[str] = []
    teacher.teach(config, told.append)
    teacher.teach(replace(config, name="another", loss=LossConfig()), told.append)  # asks for none
    assert told == []


def test_a_teacher_without_a_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set loss\.false_negatives_above"):
        LossConfig(teacher="tiny")
    with pytest.raises(ValueError, match="at most 1"):
        LossConfig(false_negatives_above=1.5)
    assert RunConfig.from_json(json.loads(json.dumps(_run().to_json()))) == _run()


def _run() -> RunConfig:
    return replace(run_over(DataConfig("data"), "runs"), loss=LossConfig(false_negatives_above=0.9, teacher="tiny"))


def test_the_memory_plan_counts_the_vectors() -> None:
    taught, plain = (plan_memory(run).device for run in (_run(), replace(_run(), loss=LossConfig())))
    assert taught["teacher's vectors"] > 0
    assert "teacher's vectors" not in plain
    assert {name: size for name, size in taught.items() if name in ("weights", "optimizer")} == {
        name: plain[name] for name in ("weights", "optimizer")
    }
