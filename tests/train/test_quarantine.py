"""Samples that spoil after the scan: training goes on with others, the same for any W and when resumed, and says so."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.checkpoints import build_llava
from tests.support.small_corpora import run_over, scan_here, write_corpus
from vladva.config import ClusterConfig, DataConfig, OptimConfig, RunConfig
from vladva.core import storage
from vladva.data.sampler import SampleFinder
from vladva.models.batch import MicroBatch
from vladva.models.preprocessor import Preprocessor
from vladva.train.audit import check_chunks
from vladva.train.audit_log import AuditLog, ChunkRecord, counted_spans, find_audit_files, read_chunks
from vladva.train.data_loader import STAND_INS, ChunkReader
from vladva.train.launch import train
from vladva.train.quarantine import TrainingQuarantine, read_quarantine
from vladva.train.tracking import read_metrics

STEPS, CHUNKS = 6, 4  # of four samples each: 96 of 103


def spoil(uri: str, numbers: list[int]) -> list[str]:
    """Overwrite the images of these samples where they are; the shards keep their sizes and times. Their ids."""
    index = SampleFinder(run_over(DataConfig(uri), uri)).indexes[0]
    names = []
    for number in numbers:
        [ref] = index.samples(number, 1)
        path = Path(uri) / ref.shard
        before = path.stat()
        with path.open("r+b") as file:
            file.seek(ref.offset + ref.length // 2)
            file.write(bytes(ref.length // 2))
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        names.append(ref.id)
    return names


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Six steps over 103 samples."""
    uri = str(tmp_path_factory.mktemp("corpus"))
    write_corpus(uri, 103)
    scan_here(uri)
    return run_over(DataConfig(uri, run_length=2), tmp_path_factory.mktemp("runs"), steps=STEPS)


@pytest.fixture(scope="module")
def spoilt(config: RunConfig) -> set[str]:
    """The ids of samples that are no longer what the scan saw; the first stand-in of one of them is another."""
    schedule = SampleFinder(config).schedule
    planned = [run.first + i for number in range(24) for run in schedule.chunk(number) for i in range(run.count)]
    first = planned[5]
    return set(spoil(config.data.uri, [first, schedule.stand_in(0, 0, first, 0), planned[40]]))


def record_of(batch: MicroBatch) -> ChunkRecord:
    return ChunkRecord(batch.number // CHUNKS, batch.number, batch.ids, tuple(batch.replacements()))


def test_spoilt_samples_are_replaced_by_the_plans_rule(config: RunConfig, spoilt: set[str]) -> None:
    reader = ChunkReader(config)
    schedule, index, seen = reader.find.schedule, reader.find.indexes[0], set()
    for batch in reader.batches(range(STEPS * CHUNKS)):
        planned = [run.first + i for run in schedule.chunk(batch.number) for i in range(run.count)]
        by_position = {each.position: each for each in batch.replacements()}
        for position, number in enumerate(planned):
            [ref] = index.samples(number, 1)
            assert (position in by_position) == (ref.id in spoilt)
            if position not in by_position:
                assert batch.ids[position] == ref.id
                continue
            seen.add(ref.id)
            assert by_position[position].id == ref.id
            assert by_position[position].reason.startswith("changed file")
            drawn = [index.samples(schedule.stand_in(0, 0, number, k), 1)[0].id for k in range(STAND_INS)]
            assert batch.ids[position] == next(name for name in drawn if name not in spoilt)
        assert not spoilt & set(batch.ids)
    assert seen <= spoilt
    assert len(seen) >= 2


def test_stand_ins_do_not_depend_on_what_was_read_before(config: RunConfig, spoilt: set[str]) -> None:
    """Two workers, or a run that goes on at any chunk, get what one worker gets from the start."""
    whole = list(ChunkReader(config).batches(range(24)))
    for numbers in (range(0, 24, 2), range(1, 24, 2), range(7, 24)):
        for batch in ChunkReader(config).batches(numbers):
            twin = whole[batch.number]
            assert (batch.ids, batch.replaced) == (twin.ids, twin.replaced)
            assert (batch.pixels.values == twin.pixels.values).all()


def test_what_the_model_cannot_take_is_replaced_too(
    config: RunConfig, spoilt: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It shows when a chunk is put together, with an error that names no sample."""
    good = ChunkReader(config)(0)
    [ref] = [ref for _, ref in SampleFinder(config)(0) if ref.id == good.ids[2]]
    plain = Preprocessor.item_prompt

    def refuses(self: Preprocessor, *item: Any) -> list[int]:
        if item[0] == ref.captions[0]:
            raise IndexError("index out of range in self")
        return plain(self, *item)

    monkeypatch.setattr(Preprocessor, "item_prompt", refuses)
    batch = ChunkReader(config)(0)
    assert [(each.id, each.reason) for each in batch.replacements()] == [
        (ref.id, "IndexError: index out of range in self")
    ]
    assert [name for i, name in enumerate(batch.ids) if i != 2] == [name for i, name in enumerate(good.ids) if i != 2]
    assert batch.ids[2] not in good.ids


def test_where_nothing_can_be_used_the_run_stops(
    config: RunConfig, spoilt: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(self: Preprocessor, *item: Any) -> list[int]:
        raise KeyError("chat_template")

    monkeypatch.setattr(Preprocessor, "item_prompt", refuses)
    with pytest.raises(ValueError, match=f"nor can any of {STAND_INS} samples drawn to stand in for it.*chat_template"):
        ChunkReader(config)(0)


def test_a_fault_of_the_storage_is_no_fault_of_a_sample(
    config: RunConfig, spoilt: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise storage.TransientStorageError("503")

    monkeypatch.setattr(storage, "read_ranges", fails)
    with pytest.raises(storage.TransientStorageError):
        ChunkReader(config)(0)


def test_the_audit_counts_them_and_refuses_others_in_their_place(
    config: RunConfig, spoilt: set[str], tmp_path: Path
) -> None:
    run, batches = replace(config, storage=str(tmp_path)), list(ChunkReader(config).batches(range(24)))
    log = AuditLog(run.uri, 0, 1, 0)
    for step in range(STEPS):
        log.step(step, batches[step * CHUNKS : (step + 1) * CHUNKS])
    log.write(STEPS)
    files = find_audit_files(run.uri)
    record = list(read_chunks(files, counted_spans(files, STEPS)))
    assert record == [record_of(batch) for batch in batches]

    find, count = SampleFinder(config), sum(len(batch.replacements()) for batch in batches)
    figures = check_chunks(record, find, STEPS).figures()
    assert (figures["replaced"], figures["delivered"]) == (count, 96 - count)
    assert not any(figures[name] for name in ("duplicated", "missing", "unknown", "wrong_steps"))

    at, spoilt_chunk = next((i, each) for i, each in enumerate(record) if each.replaced)
    position = spoilt_chunk.replaced[0].position
    other = next(name for each in record for name in each.ids if name not in spoilt_chunk.ids)
    changed = list(spoilt_chunk.ids)
    changed[position] = other
    record[at] = spoilt_chunk._replace(ids=changed)  # not what the plan draws
    assert check_chunks(record, find, STEPS).wrong_steps == {spoilt_chunk.step}
    record[at] = spoilt_chunk._replace(replaced=())  # a stand-in, and nobody says for what
    figures = check_chunks(record, find, STEPS).figures()
    assert (figures["missing"], figures["wrong_steps"]) == (1, 1)


def test_too_many_stop_the_run_on_every_rank(config: RunConfig, spoilt: set[str], tmp_path: Path) -> None:
    """3 of 103 are bad: 2% are too few for that, and 5% are enough."""
    batches = list(ChunkReader(config).batches(range(24)))
    for limit in (0.05, 0.001):
        run = replace(config, name=str(limit), storage=str(tmp_path))
        run = replace(run, data=replace(run.data, max_bad_fraction=limit))
        quarantine = TrainingQuarantine(run, 103, 0)

        def steps(quarantine: TrainingQuarantine = quarantine) -> None:
            for step in range(STEPS):
                quarantine.step(step, batches[step * CHUNKS : (step + 1) * CHUNKS], torch.device("cpu"))

        if limit == 0.05:
            steps()
            quarantine.write()
        else:
            with pytest.raises(ValueError, match=r"more than data.max_bad_fraction 0.001 of 103; the last is .*\.tar#"):
                steps()
        rows = read_quarantine(run.uri)
        assert {row["id"] for row in rows} <= spoilt
        assert all(row["reason"].startswith("changed file") for row in rows)
    # What was found after the checkpoint that a run goes on from is found again.
    assert [row["step"] for row in TrainingQuarantine(run, 103, rows[0]["step"]).rows] == []


@pytest.mark.slow
def test_two_workers_and_a_resumed_run_train_on_the_same(
    ray_cluster: None, config: RunConfig, spoilt: set[str], tmp_path: Path
) -> None:
    model = replace(config.model, checkpoint=build_llava(tmp_path / "llava"), lora_rank=4)
    one = replace(config, name="one", storage=str(tmp_path), model=model, optim=OptimConfig(lr=1e-2))
    one = replace(one, train=replace(one.train, checkpoint_every=2, keep_last=3))
    one = replace(one, cluster=ClusterConfig(workers=1, cpus_per_worker=0.5))
    two = replace(one, name="two", cluster=ClusterConfig(workers=2, cpus_per_worker=0.5))
    resumed = replace(two, name="resumed")
    train(one)
    train(two)
    shutil.copytree(one.uri, resumed.uri)
    for step in (4, 6):
        shutil.rmtree(Path(resumed.uri) / "checkpoints" / f"step-{step}")
    (Path(resumed.uri) / "config.json").write_text(json.dumps(resumed.to_json()))
    train(resumed)
    expected = read_quarantine(one.uri)
    assert {row["id"] for row in expected} <= spoilt
    for run in (two, resumed):
        assert read_quarantine(run.uri) == expected
        losses = [row["loss"] for row in read_metrics(run.uri)]
        assert losses == pytest.approx([row["loss"] for row in read_metrics(one.uri)], rel=1e-4)
        assert read_metrics(run.uri)[-1]["quarantined"] == len(expected)
