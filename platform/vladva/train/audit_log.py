"""Audit log: what a run trained on, written down by its workers.

    RUN/audit/attempt-0002/steps-00000004-00000008.rank-1-of-2.parquet      rows of (step, chunk, ids, replaced)

A worker keeps the ids of the samples it trains on and writes them before a checkpoint that rests on them is published,
so a checkpoint without its record does not exist, whenever a process is killed. An attempt begins at a checkpoint; what
earlier attempts did from there on is not in the weights and does not count, nor what comes after the newest checkpoint.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.models.batch import Replacement

if TYPE_CHECKING:
    from vladva.models.batch import MicroBatch

FOLDER = "audit"
AUDIT_SCHEMA = pa.schema(
    {"step": pa.int64(), "chunk": pa.int64(), "ids": pa.list_(pa.string()), "replaced": pa.string()}
)
FILE_NAME = re.compile(r"attempt-(\d+)/steps-(\d+)-(\d+)\.rank-(\d+)-of-(\d+)\.parquet")


# --- writing ---------------------------------------------------------------------------------------------------------


class AuditLog:
    """One worker's record of what it trains on."""

    def __init__(self, run_uri: str, rank: int, world: int, start: int) -> None:
        # All workers look before any of them has taken a step, and none writes before: they find the same number.
        self.attempt = 1 + max((file.attempt for file in find_audit_files(run_uri)), default=0)
        self.run_uri, self.rank, self.world, self.start = run_uri, rank, world, start
        self.rows: list[dict[str, Any]] = []

    def step(self, step: int, batch: list[MicroBatch]) -> None:
        """Keep the ids of this worker's chunks of a step."""
        self.rows += [
            {
                "step": step,
                "chunk": int(chunk.number),
                "ids": [str(name) for name in chunk.ids],
                "replaced": chunk.replaced,
            }
            for chunk in batch
        ]

    def write(self, steps: int) -> None:
        """Write what was kept, `steps` steps being done."""
        span = f"steps-{self.start:08d}-{steps:08d}.rank-{self.rank}-of-{self.world}.parquet"
        body = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(self.rows, AUDIT_SCHEMA), body, compression="zstd")
        uri = storage.join(self.run_uri, FOLDER, f"attempt-{self.attempt:04d}", span)
        storage.write_bytes_atomically(uri, body.getvalue().to_pybytes())
        self.start, self.rows = steps, []


# --- reading ---------------------------------------------------------------------------------------------------------


class AuditFile(NamedTuple):
    """A file of the record: one worker's chunks of steps first .. end - 1."""

    attempt: int
    first: int
    end: int
    rank: int
    world: int
    uri: str


def find_audit_files(run_uri: str) -> list[AuditFile]:
    """The files of a run's record, in the order of attempts and steps."""
    folder = storage.join(run_uri, FOLDER)
    found = []
    for info in storage.list_infos(folder):
        if match := FILE_NAME.fullmatch(info.uri, len(folder) + 1):
            attempt, first, end, rank, world = map(int, match.groups())
            found.append(AuditFile(attempt, first, end, rank, world, info.uri))
    return sorted(found)


def counted_spans(files: list[AuditFile], finished: int) -> dict[int, tuple[int, int]]:
    """Attempt -> its steps (first, end) that are in the weights of the checkpoint after `finished` steps."""
    first: dict[int, int] = {}
    for file in files:
        first[file.attempt] = min(file.first, first.get(file.attempt, file.first))
    spans, end = {}, finished
    for attempt in sorted(first, reverse=True):
        spans[attempt] = (first[attempt], end)
        end = min(end, first[attempt])
    return spans


class ChunkRecord(NamedTuple):
    """A chunk as it was trained on: the ids of its samples, and which planned ones they stand in for."""

    step: int
    chunk: int
    ids: Sequence[str]
    replaced: tuple[Replacement, ...] = ()


def read_chunks(files: list[AuditFile], spans: dict[int, tuple[int, int]]) -> Iterator[ChunkRecord]:
    """Every chunk that counts."""
    for file in files:
        first, end = spans[file.attempt]
        if file.first >= end:
            continue
        table = pq.read_table(pa.BufferReader(storage.read_bytes(file.uri)), schema=AUDIT_SCHEMA)
        for step, chunk, ids, replaced in zip(*(column.to_pylist() for column in table.columns), strict=True):
            if first <= step < end:  # records of older versions have no `replaced`
                yield ChunkRecord(step, chunk, ids, tuple(Replacement(*each) for each in json.loads(replaced or "[]")))
