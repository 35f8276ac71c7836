"""Quarantine: the samples that a run planned to train on and could not use, over all workers, named and limited.

    RUN/quarantine.jsonl    a line each: step, id, reason, and the id of the sample that stood in for it

Each worker knows of its own chunks; where any worker has one, all exchange theirs, so that all stop at the same step.
The file is brought up to date before every checkpoint: what comes after the newest one is found again on resumption.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import distributed

from vladva.core import storage
from vladva.train.collectives import all_reduce_sum, rank_and_world

if TYPE_CHECKING:
    from vladva.config import RunConfig
    from vladva.models.batch import MicroBatch

logger = logging.getLogger(__name__)

FILE = "quarantine.jsonl"


class TrainingQuarantine:
    """What the workers of a run could not use so far; on every rank."""

    def __init__(self, config: RunConfig, num_samples: int, start: int) -> None:
        """num_samples: of all data sets. start: the step that comes next."""
        self.config, self.num_samples = config, num_samples
        self.uri = storage.join(config.uri, FILE)
        self.rows = [row for row in read_quarantine(config.uri) if row["step"] < start]
        self.is_written = not storage.exists(self.uri)

    def step(self, step: int, batch: list[MicroBatch], device: torch.device) -> None:
        """Note what is replaced in a step's chunks; every rank must call it.

        Raises ValueError on all of them when it is more than `data.max_bad_fraction` of the samples: of the data sets'
        in the first epoch, later of those that were planned so far.
        """
        local = [
            {"step": step, "id": each.id, "reason": each.reason, "stand_in": str(chunk.ids[each.position])}
            for chunk in batch
            for each in chunk.replacements()
        ]
        if not int(all_reduce_sum(torch.tensor(len(local), device=device))):
            return
        found = sorted(_gather_rows(local), key=lambda row: row["id"])
        self.rows += found
        self.is_written = False
        if rank_and_world()[0] == 0:
            for row in found:
                logger.warning("step %(step)d: %(id)s cannot be used (%(reason)s), %(stand_in)s stands in for it", row)
        planned = max(self.num_samples, (step + 1) * self.config.train.global_batch)
        limit = self.config.data.max_bad_fraction
        if len(self.rows) > limit * planned:
            self.write()
            raise ValueError(
                f"{len(self.rows):,} samples could not be used, more than data.max_bad_fraction {limit} of {planned:,}"
                f"; the last is {found[-1]['id']} ({found[-1]['reason']}). All are in {self.uri}"
            )

    def write(self) -> None:
        """Bring the file up to date, on rank 0."""
        if not self.is_written and rank_and_world()[0] == 0:
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self.rows)
            storage.write_bytes_atomically(self.uri, lines.encode())
        self.is_written = True


def read_quarantine(run_uri: str) -> list[dict[str, Any]]:
    """What a run could not use: step, id, reason, stand_in."""
    uri = storage.join(run_uri, FILE)
    return [json.loads(line) for line in storage.read_bytes(uri).splitlines()] if storage.exists(uri) else []


def _gather_rows(local: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of all ranks."""
    world = rank_and_world()[1]
    if world == 1:
        return local
    parts: list[list[dict[str, Any]]] = [[] for _ in range(world)]
    distributed.all_gather_object(parts, local)
    return [row for part in parts for row in part]
