"""Audit: a record that is right passes; one id twice, one lost, batches swapped and the like are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.small_corpora import run_over, scan_here, write_corpus
from vladva.config import DataConfig, RunConfig
from vladva.core import storage
from vladva.data.sampler import SampleFinder
from vladva.models.batch import MicroBatch
from vladva.train import audit, audit_log
from vladva.train.audit_log import AuditFile, AuditLog, ChunkRecord, counted_spans, find_audit_files

STEPS = 13  # of 16; an epoch is 6 of the 103 samples, 7 are left over
Record = list[ChunkRecord]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run over 103 good samples and 5 bad ones."""
    uri = str(tmp_path_factory.mktemp("corpus"))
    write_corpus(uri, 103, bad=5)
    scan_here(uri)
    return run_over(DataConfig(uri, run_length=2), tmp_path_factory.mktemp("runs"), steps=STEPS)


@pytest.fixture(scope="module")
def mixed(config: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run over two data sets whose ids are alike: the one of 103, and 40 others at half its weight."""
    uri = str(tmp_path_factory.mktemp("other"))
    write_corpus(uri, 40)
    scan_here(uri)
    return replace(config, data=replace(config.data, mix=(f"{config.data.uri}=2", f"{uri}=1")))


def record_of(config: RunConfig) -> Record:
    """What the workers of a run keep, where all goes well."""
    find = SampleFinder(config)
    return [
        ChunkRecord(number // 4, number, [find.name(run.source, ref.id) for run, ref in find(number)])
        for number in range(config.train.steps * 4)
    ]


def test_a_run_that_went_well(config: RunConfig) -> None:
    report = audit.check_chunks(record_of(config), SampleFinder(config), STEPS)
    assert report.ok
    assert report.figures() == {
        "steps": 13,
        "epochs": 2,
        "delivered": 208,
        "replaced": 0,
        "duplicated": 0,
        "missing": 0,
        "left_out": 14,
        "quarantined": 5,
        "unknown": 0,
        "wrong_steps": 0,
    }


def test_a_mix_that_went_well(mixed: RunConfig) -> None:
    """208 samples are 104 runs; the pattern of 3 gives 70 and 34 of them: epochs of 51 runs, and of 20."""
    report = audit.check_chunks(reversed(record_of(mixed)), SampleFinder(mixed), STEPS)
    assert report.ok
    assert [(each.epochs, each.delivered, each.left_out, each.quarantined) for each in report.data_sets] == [
        (1, 140, 1, 5),
        (1, 68, 0, 0),
    ]


def test_few_ids_at_a_time_give_the_same(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = audit.check_chunks(record_of(config), SampleFinder(config), STEPS)
    monkeypatch.setattr(audit, "ROWS_PER_BUCKET", 10)
    monkeypatch.setattr(audit, "PIECE", 7)
    assert audit.check_chunks(record_of(config), SampleFinder(config), STEPS) == whole


def double(record: Record) -> None:
    record[9][2][1] = record[1][2][0]  # both in the first epoch; what stood there is missing


def lose(record: Record) -> None:
    record[9][2].pop()


def lose_a_chunk(record: Record) -> None:
    del record[9]


def lose_in_the_unfinished_epoch(record: Record) -> None:
    record[50][2].pop()


def swap_batches(record: Record) -> None:
    for i in range(4):
        a, b = record[4 + i], record[8 + i]
        record[4 + i], record[8 + i] = a._replace(ids=b.ids), b._replace(ids=a.ids)


def swap_samples(record: Record) -> None:
    record[9][2].reverse()


def repeat_a_chunk(record: Record) -> None:
    record.append(record[9])


def invent(record: Record) -> None:
    record[9][2][0] = record[9][2][0] + "x"


def go_on(record: Record) -> None:
    record.append(ChunkRecord(STEPS, STEPS * 4, record[0].ids))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (double, {"duplicated": 1, "missing": 1, "wrong_steps": 1}),
        (lose, {"missing": 1, "wrong_steps": 1}),
        (lose_a_chunk, {"missing": 4, "wrong_steps": 1}),
        (lose_in_the_unfinished_epoch, {"missing": 1, "wrong_steps": 1}),
        (swap_batches, {"wrong_steps": 2}),
        (swap_samples, {"wrong_steps": 1}),
        (repeat_a_chunk, {"duplicated": 4, "wrong_steps": 1}),
        (invent, {"unknown": 1, "missing": 1, "wrong_steps": 1}),
        (go_on, {"wrong_steps": 1}),
    ],
)
def test_what_went_wrong_is_found(
    damage: Callable[[Record], None], expected: dict[str, int], config: RunConfig, mixed: RunConfig
) -> None:
    for run in (config, mixed):
        record = record_of(run)
        damage(record)
        report = audit.check_chunks(record, SampleFinder(run), STEPS)
        assert not report.ok
        figures = report.figures()
        names = ("duplicated", "missing", "unknown", "wrong_steps")
        assert {name: figures[name] for name in names if figures[name]} == expected


def test_a_sample_of_the_other_data_set_is_not_taken_for_its_namesake(mixed: RunConfig) -> None:
    record = record_of(mixed)
    step, number, ids, _ = next(each for each in record if each.ids[0].startswith("1:"))
    record[number] = ChunkRecord(step, number, ["0:" + ids[0][2:], *ids[1:]])
    report = audit.check_chunks(record, SampleFinder(mixed), STEPS)
    assert report.wrong_steps == {step}
    assert report.data_sets[1].missing == 1
    assert "1 missing; batches that are not the planned ones in steps" in report.problems()


# --- the record in storage -------------------------------------------------------------------------------------------


def test_what_counts_is_what_the_newest_checkpoint_rests_on() -> None:
    """Attempt 1 ends after 8 steps, 6 of which were saved; 2 begins there, and again at 8; the newest is 10."""
    files = [
        AuditFile(1, 0, 6, 0, 2, "a"),
        AuditFile(1, 6, 8, 0, 2, "b"),
        AuditFile(2, 6, 8, 0, 1, "c"),
        AuditFile(3, 8, 12, 0, 1, "d"),
    ]
    assert counted_spans(files, 10) == {1: (0, 6), 2: (6, 8), 3: (8, 10)}
    assert counted_spans([*files, AuditFile(4, 2, 4, 0, 1, "e")], 4) == {1: (0, 2), 2: (6, 2), 3: (8, 2), 4: (2, 4)}


def batch(number: int, ids: list[str]) -> MicroBatch:
    return MicroBatch(number, ids, *[None] * (len(MicroBatch.__dataclass_fields__) - 3))


def attempt(run: RunConfig, world: int, start: int, saves: range) -> None:
    """Workers that begin at `start`, and write at every step of `saves`."""
    record = record_of(run)
    logs = [AuditLog(run.uri, rank, world, start) for rank in range(world)]
    for steps in saves:
        for rank, log in enumerate(logs):
            for step in range(log.start, steps):
                numbers = range(step * 4 + rank, step * 4 + 4, world)
                log.step(step, [batch(number, list(record[number].ids)) for number in numbers])
            log.write(steps)


@pytest.mark.slow
def test_a_run_that_was_killed_and_went_on_with_other_workers(config: RunConfig, tmp_path: Path) -> None:
    run = replace(config, storage=str(tmp_path))
    attempt(run, 2, 0, range(2, 9, 2))
    attempt(run, 1, 6, range(7, STEPS + 1))  # the checkpoint after 8 steps was not finished
    assert [part.attempt for part in find_audit_files(run.uri)] == [1] * 8 + [2] * 7
    storage.write_json(storage.join(run.uri, "config.json"), run.to_json())
    command = [sys.executable, "jobs/audit.py", run.uri]

    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "has no checkpoint: train it with --train.audit" in refused.stderr

    state = {"step": STEPS, "files": {}, "data_fingerprint": SampleFinder(run).fingerprint}
    storage.write_json(storage.join(run.uri, "checkpoints", f"step-{STEPS}", "state.json"), state)
    passed = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = json.loads(passed.stdout.splitlines()[-1])
    assert figures == audit.audit(run.uri).figures()
    assert (figures["steps"], figures["delivered"], figures["duplicated"], figures["missing"]) == (STEPS, 208, 0, 0)
    assert "13 steps in 2 attempts: every batch is the planned one" in passed.stdout

    storage.delete_file(find_audit_files(run.uri)[-1].uri)  # the last step's
    failed = subprocess.run(command, capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert "16 missing; batches that are not the planned ones in steps 12" in failed.stdout

    storage.write_json(
        storage.join(run.uri, "checkpoints", f"step-{STEPS}", "state.json"), state | {"data_fingerprint": "other"}
    )
    with pytest.raises(ValueError, match="the samples have changed since"):
        audit.audit(run.uri)


def test_the_record_is_kept_as_it_was_made(config: RunConfig, tmp_path: Path) -> None:
    run = replace(config, storage=str(tmp_path))
    attempt(run, 4, 0, range(5, STEPS + 1, 4))
    files = find_audit_files(run.uri)
    chunks = audit_log.read_chunks(files, counted_spans(files, STEPS))
    assert sorted(chunks) == record_of(run)
