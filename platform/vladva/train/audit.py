"""Audit: the proof that a run trained on every sample exactly once per epoch, from the record that its workers kept.

Two checks that share nothing but the record. The ids are looked up in the index that the scan made and counted there:
within an epoch none may come twice, and none may be missing but the remainder that the plan leaves to other epochs. And
every chunk is compared with the plan, sample by sample. A sample that could not be used is counted by itself, and what
stood in for it must be what the plan draws in its place.

In memory are some 100,000 ids at a time; on disk, for a while, all of them, and a byte per sample and epoch.
"""

from __future__ import annotations

import pickle
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from vladva.config import RunConfig
from vladva.core import storage
from vladva.models import checkpoint
from vladva.train.audit_log import ChunkRecord, counted_spans, find_audit_files, read_chunks
from vladva.train.data_loader import STAND_INS

if TYPE_CHECKING:
    from rich.table import Table

    from vladva.data.sampler import SampleFinder

ROWS_PER_BUCKET = 250_000  # ids that are looked up together
MAX_BUCKETS = 256  # files open at once
PIECE = 1 << 24  # samples counted at once


@dataclass
class DataSetAudit:
    """What was found of one data set; `epochs` are those that are finished.

    Planned samples are delivered, or replaced by others because they could not be used.
    """

    uri: str
    samples: int
    quarantined: int
    epochs: int
    delivered: int = 0
    replaced: int = 0
    duplicated: int = 0
    missing: int = 0
    left_out: int = 0


@dataclass
class AuditReport:
    """What was found of a run. `unknown`: ids that no index has. `wrong_steps`: whose batch is not the plan's."""

    steps: int
    attempts: int
    data_sets: list[DataSetAudit]
    unknown: int = 0
    wrong_steps: set[int] = field(default_factory=set)

    @property
    def ok(self) -> bool:
        """Whether every sample came exactly once in each epoch, in the order of the plan."""
        return not (self.unknown or self.wrong_steps or any(each.duplicated or each.missing for each in self.data_sets))

    def problems(self) -> str:
        """What is wrong, in words."""
        figures = self.figures()
        counts = [f"{figures[name]:,} {name}" for name in ("duplicated", "missing", "unknown") if figures[name]]
        steps = sorted(self.wrong_steps)
        shown = ", ".join(map(str, steps[:10])) + (", ..." if len(steps) > 10 else "")
        return "; ".join([*counts, *([f"batches that are not the planned ones in steps {shown}"] if steps else [])])

    def figures(self) -> dict[str, int]:
        """Sums over the data sets."""
        names = ("epochs", "delivered", "replaced", "duplicated", "missing", "left_out", "quarantined")
        sums = {name: sum(getattr(each, name) for each in self.data_sets) for name in names}
        return {"steps": self.steps, **sums, "unknown": self.unknown, "wrong_steps": len(self.wrong_steps)}

    def table(self) -> Table:
        """A row a data set."""
        from rich.table import Table

        columns = ("samples", "quarantined", "epochs", "delivered", "replaced", "duplicated", "missing", "left_out")
        table = Table("data set", *(column.replace("_", " ") for column in columns))
        for each in self.data_sets:
            table.add_row(each.uri, *(f"{getattr(each, column):,}" for column in columns))
        return table


def audit(run_uri: str) -> AuditReport:
    """Check the record of a run. Raises ValueError where there is none, or the data is not what was trained on."""
    from vladva.data.sampler import SampleFinder

    newest, files = checkpoint.latest(run_uri), find_audit_files(run_uri)
    if newest is None or not files:
        raise ValueError(f"{run_uri} has no {'record' if newest else 'checkpoint'}: train it with --train.audit")
    config = RunConfig.from_json(storage.read_json(storage.join(run_uri, "config.json")))
    state = storage.read_json(storage.join(newest, checkpoint.STATE))
    find = SampleFinder(config)
    if state["data_fingerprint"] != find.fingerprint:
        raise ValueError(f"{', '.join(config.data.uris)}: the samples have changed since {newest} was written")
    spans = counted_spans(files, state["step"])
    return check_chunks(read_chunks(files, spans), find, state["step"], attempts=len(spans))


def check_chunks(chunks: Iterable[ChunkRecord], find: SampleFinder, steps: int, attempts: int = 1) -> AuditReport:
    """Check the chunks of the first `steps` steps of a run, which may come in any order."""
    schedule, indexes = find.schedule, find.indexes
    num_chunks = steps * schedule.chunks_per_batch
    used = [schedule.used(source, num_chunks) for source in range(len(indexes))]
    per_epoch = [schedule.epoch_size(source) for source in range(len(indexes))]
    data_sets = [
        DataSetAudit(index.data_uri, index.num_samples, index.num_quarantined, total // size)
        for index, total, size in zip(indexes, used, per_epoch, strict=True)
    ]
    report = AuditReport(steps, attempts, data_sets)
    with tempfile.TemporaryDirectory(prefix="vladva-audit-") as name:
        buckets = _Buckets(Path(name), sum(used))
        _check_order(chunks, find, num_chunks, buckets, report)
        counts = [
            np.memmap(Path(name) / f"counts-{source}", np.uint8, "w+", shape=(1 + total // size, index.num_samples))
            for source, (index, total, size) in enumerate(zip(indexes, used, per_epoch, strict=True))
        ]
        for deliveries in buckets:
            _look_up(deliveries, find, counts, report)
        for source, found in enumerate(data_sets):
            found.delivered -= found.replaced
            for epoch, counts_N in enumerate(counts[source]):
                expected = min(per_epoch[source], used[source] - epoch * per_epoch[source])
                left_out = schedule.plan(source, epoch).left_out() if epoch < found.epochs else None
                _count(counts_N, expected, left_out, found)
    return report


class _Delivery(NamedTuple):
    """A sample as the record has it; `planned` is the data set and number of the one that the plan has in its place.

    stand_in: the id of the sample that was used in its stead; "" for its own.
    """

    step: int
    source: int
    epoch: int
    sample_id: str
    planned: tuple[int, int]
    stand_in: str = ""


class _Buckets:
    """Deliveries on disk, those from one shard together."""

    def __init__(self, folder: Path, num_rows: int) -> None:
        count = min(MAX_BUCKETS, 1 + num_rows // ROWS_PER_BUCKET)
        self.files = [(folder / f"bucket-{number}").open("w+b") for number in range(count)]

    def add(self, deliveries: Iterable[_Delivery]) -> None:
        parts = defaultdict(list)
        for delivery in deliveries:
            bucket = zlib.crc32(_shard_of(delivery.sample_id).encode()) % len(self.files)
            parts[bucket].append(tuple(delivery))
        for bucket, part in parts.items():
            pickle.dump(part, self.files[bucket])

    def __iter__(self) -> Iterator[list[_Delivery]]:
        for file in self.files:
            end = file.tell()
            file.seek(0)
            deliveries: list[_Delivery] = []
            while file.tell() < end:
                deliveries += map(_Delivery._make, pickle.load(file))
            file.close()
            yield deliveries


def _shard_of(sample_id: str) -> str:
    """SHARD of SHARD#KEY."""
    shard, ending, _ = sample_id.partition(".tar#")
    return shard + ending.removesuffix("#")


def _check_order(
    chunks: Iterable[ChunkRecord],
    find: SampleFinder,
    num_chunks: int,
    buckets: _Buckets,
    report: AuditReport,
) -> None:
    """Put every sample into its bucket, beside the planned one; note the steps that have not the planned chunks."""
    schedule = find.schedule
    seen = bytearray(num_chunks)
    for step, number, ids, replaced in chunks:
        if not 0 <= number < num_chunks:
            report.wrong_steps.add(step)
            continue
        planned = [(run, run.first + i) for run in schedule.chunk(number) for i in range(run.count)]
        if seen[number] or step != number // schedule.chunks_per_batch or len(ids) != len(planned):
            report.wrong_steps.add(step)
        seen[number] = True
        deliveries = []
        unusable = {each.position: each.id for each in replaced}
        for position, name in enumerate(ids):
            run, sample = planned[min(position, len(planned) - 1)]
            source, sample_id = find.parse(unusable.get(position, name))
            stand_in = name if position in unusable else ""
            if source < len(find.indexes):
                own = source == run.source
                epoch = run.epoch if own else schedule.used(source, number) // schedule.epoch_size(source)
                deliveries.append(_Delivery(step, source, epoch, sample_id, (run.source, sample), stand_in))
            else:
                report.unknown += 1
        buckets.add(deliveries)
    report.wrong_steps |= {number // schedule.chunks_per_batch for number in range(num_chunks) if not seen[number]}


def _look_up(deliveries: list[_Delivery], find: SampleFinder, counts: list[np.memmap], report: AuditReport) -> None:
    """Turn ids into numbers, and count the numbers: `counts` has one array [epochs, samples] for each data set."""
    parts = defaultdict(list)
    for delivery in deliveries:
        parts[delivery.source, _shard_of(delivery.sample_id)].append(delivery)
    for (source, shard), part in parts.items():
        numbers = find.indexes[source].numbers_of(shard)
        for step, _, epoch, sample_id, planned, stand_in in part:
            number = numbers.get(sample_id)
            if stand_in:
                report.data_sets[source].replaced += 1
                if not _is_drawn(stand_in, source, epoch, planned[1], find):
                    report.wrong_steps.add(step)
            if number is None:
                report.unknown += 1
            else:
                counts[source][epoch, number] += 1
            if (source, number) != planned:
                report.wrong_steps.add(step)


def _is_drawn(stand_in: str, source: int, epoch: int, sample: int, find: SampleFinder) -> bool:
    """Whether the sample that stands in for another is one that the plan draws for it."""
    own_source, sample_id = find.parse(stand_in)
    number = find.indexes[source].numbers_of(_shard_of(sample_id)).get(sample_id) if own_source == source else None
    drawn = (find.schedule.stand_in(source, epoch, sample, attempt) for attempt in range(STAND_INS))
    return number is not None and number in drawn


def _count(counts_N: np.ndarray, expected: int, left_out: list[tuple[int, int]] | None, found: DataSetAudit) -> None:
    """Add up one epoch, of which `expected` samples should have come; `left_out` are the others of a finished one."""
    pieces = [counts_N[start : start + PIECE] for start in range(0, len(counts_N), PIECE)]
    delivered = sum(int(piece.sum(dtype=np.int64)) for piece in pieces)
    distinct = sum(int(np.count_nonzero(piece)) for piece in pieces)
    found.delivered += delivered
    found.duplicated += delivered - distinct
    if left_out is None:
        found.missing += max(0, expected - distinct)
        return
    left = sum(count for _, count in left_out)
    strays = sum(int(np.count_nonzero(counts_N[first : first + count])) for first, count in left_out)
    found.left_out += left
    found.missing += len(counts_N) - left - (distinct - strays)
