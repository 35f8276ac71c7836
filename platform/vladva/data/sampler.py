"""Sampler: which samples each chunk of a whole run holds, over its epochs and over the data sets that it mixes.

One data set: its epochs one after the other, each laid out by its `EpochPlan`.

Several: the n-th run of neighbours of the training comes from the data set that a pattern names, over and over. The
pattern holds each data set as often as its share says, spread so evenly that after any n runs each has had its exact
part of them, rounded up or down. A data set's own runs are those of its own epochs, laid out by an `EpochPlan` whose
unit is one run: each of its samples comes once in each of its epochs, and fewer than one run are left out of an
epoch. So a data set may begin its third epoch in the middle of a global batch while another is in its first.

Chunk g is found without the chunks before it, in memory for one pattern; how many workers there are is not known here.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from vladva.config import RunConfig
from vladva.core.hashing import key_number
from vladva.data.epoch_plan import EpochPlan
from vladva.data.order import OrderedPlan, read_order

if TYPE_CHECKING:
    import numpy as np

    from vladva.data.sidecar import SampleRef


class SampleRange(NamedTuple):
    """`count` neighbours from sample `first` on, of a data set in the given one of its epochs."""

    source: int
    epoch: int
    first: int
    count: int  # type: ignore[assignment]  # a tuple's own method of this name is not used


@dataclass(frozen=True)
class Sampler:
    """Data sets of `sizes` samples, mixed in the proportions of the whole numbers `shares`.

    Raises ValueError when a data set is smaller than its part of one global batch.
    """

    sizes: tuple[int, ...]
    shares: tuple[int, ...]
    seed: int
    chunk_size: int
    run_length: int
    chunks_per_batch: int
    order: np.ndarray | None = field(default=None, compare=False)
    """Of one data set: its samples [N] in the order in which neighbours are taken together; None: as they are."""

    def __post_init__(self) -> None:
        batch, whole = self.chunks_per_batch * self.chunk_size, sum(self.shares)
        for source, (size, share) in enumerate(zip(self.sizes, self.shares, strict=True)):
            if self.mixed and size * whole < max(batch * share, self.run_length * whole):
                raise ValueError(
                    f"data.mix: the data set {source + 1} of {len(self.sizes)} has {size} samples, fewer than its part "
                    f"of one global batch, {batch} * {share}/{whole}: lower its weight, or use a smaller batch"
                )
            self.plan(source, 0)

    @property
    def mixed(self) -> bool:
        """Whether there are several data sets."""
        return len(self.sizes) > 1

    def chunk(self, number: int) -> list[SampleRange]:
        """The runs of chunk `number` of the training, together `chunk_size` samples."""
        runs = []
        for source, unit in self._units(number):
            epoch, within = divmod(unit, self.plan(source, 0).num_chunks)
            runs += [SampleRange(source, epoch, *run) for run in self.plan(source, epoch).chunk(within)]
        return runs

    def plan(self, source: int, epoch: int) -> EpochPlan | OrderedPlan:
        """How an epoch of a data set is laid out. Of a mix, each of its chunks is one run."""
        size = self.sizes[source]
        if not self.mixed:
            plan = _plan(size, self.seed, epoch, self.chunk_size, self.run_length, self.chunks_per_batch)
            return plan if self.order is None else OrderedPlan(plan, self.order)
        seed = key_number(f"{self.seed}/source", source)  # else data sets of one size would keep company for ever
        return _plan(size, seed, epoch, self.run_length, self.run_length, 1)

    def stand_in(self, source: int, epoch: int, sample: int, attempt: int) -> int:
        """The sample that takes the place of one that cannot be used: any other of its data set, the same each time.

        attempt: counts those that could not be used either.
        """
        size = self.sizes[source]
        drawn = key_number(f"{self.seed}/{source}/{epoch}/{attempt}/stand-in", sample)
        return (sample + 1 + drawn % max(1, size - 1)) % size

    def epoch_size(self, source: int) -> int:
        """Samples that an epoch of a data set uses; the few others are not the same in every epoch."""
        plan = self.plan(source, 0)
        return plan.num_chunks * plan.chunk_size

    def used(self, source: int, chunks: int) -> int:
        """Samples of a data set in the first `chunks` chunks, over all of its epochs."""
        if not self.mixed:
            return chunks * self.chunk_size
        periods, rest = divmod(chunks * self.chunk_size // self.run_length, len(self._pattern))
        return (periods * self.shares[source] + self._pattern[:rest].count(source)) * self.run_length

    def _units(self, number: int) -> list[tuple[int, int]]:
        """(data set, which of its plans' chunks, counted over all epochs) of each part of a chunk."""
        if not self.mixed:
            return [(0, number)]
        per_chunk = self.chunk_size // self.run_length
        units = []
        for run in range(number * per_chunk, (number + 1) * per_chunk):
            period, place = divmod(run, len(self._pattern))
            source = self._pattern[place]
            units.append((source, period * self.shares[source] + self._ranks[place]))
        return units

    @cached_property
    def _pattern(self) -> list[int]:
        """The data set of each run of a period.

        A data set's k-th run may not come before the place where its part passes k - 1, and must have come where it
        reaches k. Of those that may, the one that must come first is taken; for jobs of one length that meets every
        term if any order does, and handing each data set its fraction of every place shows that one does.
        """
        period = sum(self.shares)
        taken = [0] * len(self.shares)
        pattern = []
        for place in range(1, period + 1):
            ready = [i for i, share in enumerate(self.shares) if place * share > taken[i] * period]
            source = min(ready, key=lambda i: -(-(taken[i] + 1) * period // self.shares[i]))
            taken[source] += 1
            pattern.append(source)
        return pattern

    @cached_property
    def _ranks(self) -> list[int]:
        """Which of its data set's runs in a period each run of the pattern is."""
        taken = [0] * len(self.shares)
        ranks = []
        for source in self._pattern:
            ranks.append(taken[source])
            taken[source] += 1
        return ranks


@lru_cache(maxsize=256)
def _plan(
    num_samples: int, seed: int, epoch: int, chunk_size: int, run_length: int, chunks_per_batch: int
) -> EpochPlan:
    return EpochPlan(num_samples, seed, epoch, chunk_size, run_length, chunks_per_batch)


class SampleFinder:
    """Chunk number -> the samples in it, by the indexes of the run's data sets. Reads no shard."""

    def __init__(self, config: RunConfig) -> None:
        from vladva.data.shard_index import ShardIndex

        self.indexes = [ShardIndex.open(uri) for uri in config.data.uris]
        data = config.data
        self.order = read_order(data.order, self.indexes[0]) if data.order else None
        self.schedule = Sampler(
            tuple(index.num_samples for index in self.indexes),
            config.data.shares,
            seed=config.seed,
            chunk_size=config.train.chunk_size,
            run_length=data.neighbourhood if data.order else data.run_length,
            chunks_per_batch=config.chunks_per_batch,
            order=self.order,
        )

    @property
    def fingerprint(self) -> str:
        """Changes when a sample of one of the data sets does, or their order."""
        from vladva.core.hashing import digest, short_hash

        if self.order is not None:
            return short_hash([self.indexes[0].fingerprint, digest(self.order.tobytes()).hex()])
        fingerprints = [index.fingerprint for index in self.indexes]
        return short_hash(fingerprints) if self.schedule.mixed else fingerprints[0]

    def __call__(self, number: int) -> list[tuple[SampleRange, SampleRef]]:
        """The samples of a chunk, each with the run that it is from."""
        runs = self.schedule.chunk(number)
        with ThreadPoolExecutor(len(runs)) as pool:
            refs = pool.map(lambda run: self.indexes[run.source].samples(run.first, run.count), runs)
            return [(run, ref) for run, found in zip(runs, refs, strict=True) for ref in found]

    def name(self, source: int, sample_id: str) -> str:
        """The id under which a sample is known in training: of a mix, with the number of its data set before it."""
        return f"{source}:{sample_id}" if self.schedule.mixed else sample_id

    def parse(self, name: str) -> tuple[int, str]:
        """The data set and the id in it of what `name` gave."""
        if not self.schedule.mixed:
            return 0, name
        source, _, sample_id = name.partition(":")
        return int(source), sample_id
