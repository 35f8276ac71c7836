"""Order: a numbering of the samples in which neighbours are alike, so that a global batch can be made of neighbours.

    <uri>    one Parquet file: row p holds the number of the sample at position p; of which data set, in its metadata

Each sample is in it once: positions are laid out by the epoch's plan as numbers are without it, and every epoch is
still made of every sample exactly once, however many workers there are and wherever a run goes on. What it costs is
that neighbours of the order are not neighbours in the shards: a request for each sample, in place of one for a run.
`mine/neighbours.py` makes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.hashing import short_hash
from vladva.data.epoch_plan import EpochPlan
from vladva.data.shard_index import ShardIndex


@dataclass(frozen=True)
class OrderedPlan:
    """An epoch's plan over positions of an order, as samples."""

    positions: EpochPlan
    samples_N: np.ndarray

    @property
    def num_chunks(self) -> int:
        """Chunks of the epoch."""
        return self.positions.num_chunks

    @property
    def chunk_size(self) -> int:
        """Samples of a chunk."""
        return self.positions.chunk_size

    def chunk(self, number: int) -> list[tuple[int, int]]:
        """The samples of chunk `number` as runs (first sample, count)."""
        return list(self._runs(self.positions.chunk(number)))

    def left_out(self) -> list[tuple[int, int]]:
        """The samples that this epoch does not use, as runs."""
        return list(self._runs(self.positions.left_out()))

    def _runs(self, positions: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int]]:
        """The samples at runs of positions, in that order; those that follow one another are one run."""
        for first, count in positions:
            samples = self.samples_N[first : first + count]
            breaks = np.flatnonzero(np.diff(samples) != 1) + 1
            for run in np.split(samples, breaks):
                yield int(run[0]), len(run)


def numbering(index: ShardIndex) -> str:
    """Stands for the shards and how many samples each has: equal where sample numbers mean the same places."""
    return short_hash([list(index.shards), list(index.ends)])


def write_order(uri: str, samples_N: np.ndarray, index: ShardIndex) -> None:
    """Write the order of a data set's samples."""
    facts = json.dumps({"numbering": numbering(index)}).encode()
    body = pa.BufferOutputStream()
    pq.write_table(pa.table({"sample": samples_N.astype(np.int64)}).replace_schema_metadata({b"vladva": facts}), body)
    storage.write_bytes_atomically(uri, body.getvalue().to_pybytes())


def read_order(uri: str, index: ShardIndex) -> np.ndarray:
    """The samples int64 [N] in order. Raises ValueError where it is not of this data set, or has a sample twice."""
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)))
    except FileNotFoundError:
        raise ValueError(f"data.order: there is no {uri}; jobs/mine.py --order makes one") from None
    facts = json.loads((table.schema.metadata or {}).get(b"vladva", b"{}"))
    samples_N = table["sample"].to_numpy()
    if facts.get("numbering") != numbering(index):
        raise ValueError(f"data.order: {uri} is of other shards than those of {index.data_uri}; make it again")
    if not np.array_equal(np.sort(samples_N), np.arange(index.num_samples)):
        raise ValueError(f"data.order: {uri} does not have each of {index.num_samples:,} samples once; make it again")
    return samples_N
