"""Plan: which samples each chunk of an epoch holds. Arithmetic on numbers only, in constant memory for any data set.

An epoch of N samples is laid out in four steps:

1. As many samples as fill whole global batches are used: U = floor(N / G) * G. The N - U left over are others each
   epoch: the used window starts (N - U) samples later every time, and runs around the end of the numbering.
2. The window is cut into runs of `run_length` neighbours, each of them one ranged read. Where the cuts lie differs from
   epoch to epoch, so that neighbours do not stay together for ever.
3. The runs are put in a random order by a permutation that is computed for one number at a time.
4. Consecutive runs make a chunk, consecutive chunks a global batch. How many workers share a batch is not known here.
   Or a run is longer than a chunk, and makes several, all of them of one global batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from math import isqrt

from vladva.core.hashing import key_number


@dataclass(frozen=True)
class EpochPlan:
    """The chunks of one epoch over samples 0 .. num_samples - 1.

    A run is (first sample, count); one that crosses the end of the numbering is given as two. Every sample is in one
    chunk at most, and fewer than a global batch are in none. Raises ValueError when there is not one global batch.
    """

    num_samples: int
    seed: int
    epoch: int
    chunk_size: int
    run_length: int
    chunks_per_batch: int

    def __post_init__(self) -> None:
        if min(self.chunk_size, self.run_length, self.chunks_per_batch) < 1:
            raise ValueError(
                f"chunk_size = {self.chunk_size}, run_length = {self.run_length}, "
                f"chunks_per_batch = {self.chunks_per_batch}: each must be at least 1"
            )
        if self.chunk_size % self.run_length and (
            self.run_length % self.chunk_size or self.batch_size % self.run_length
        ):
            raise ValueError(
                f"run_length = {self.run_length} does not divide chunk_size = {self.chunk_size}, nor is it so many "
                f"chunks that it divides the {self.batch_size} samples of a global batch: change one of them"
            )
        if self.num_samples == 0:
            raise ValueError("the data set is empty: check the path to the shards, and the scan's quarantine table")
        if self.num_batches == 0:
            raise ValueError(
                f"the data set has {self.num_samples} samples, fewer than one global batch of {self.batch_size} "
                f"({self.chunks_per_batch} chunks of {self.chunk_size}): use a smaller batch or more data"
            )

    @property
    def batch_size(self) -> int:
        """Samples in a global batch."""
        return self.chunks_per_batch * self.chunk_size

    @property
    def num_batches(self) -> int:
        """Global batches of the epoch."""
        return self.num_samples // self.batch_size

    @property
    def num_chunks(self) -> int:
        """Chunks of the epoch; the same for every epoch."""
        return self.num_batches * self.chunks_per_batch

    def chunk(self, number: int) -> list[tuple[int, int]]:
        """The runs of chunk `number`: (first sample, count), together `chunk_size` samples."""
        if not 0 <= number < self.num_chunks:
            raise IndexError(f"chunk {number} of an epoch of {self.num_chunks}")
        pieces: list[tuple[int, int]] = []
        position, end = number * self.chunk_size, (number + 1) * self.chunk_size
        while position < end:
            run, within = divmod(position, self.run_length)
            count = min(self.run_length - within, end - position)
            pieces += self._samples(self._order(run) * self.run_length + self._shift + within, count)
            position += count
        return pieces

    def left_out(self) -> list[tuple[int, int]]:
        """The samples that this epoch does not use, as runs; fewer than a global batch."""
        count = self.num_samples - self._used
        return list(_around(self._start + self._used, count, self.num_samples))

    def _samples(self, position: int, count: int) -> Iterator[tuple[int, int]]:
        """`count` samples from a position of the used window on."""
        for first, fitting in _around(position, count, self._used):
            yield from _around(self._start + first, fitting, self.num_samples)

    @property
    def _used(self) -> int:
        return self.num_batches * self.batch_size

    @property
    def _start(self) -> int:
        return self.epoch * (self.num_samples - self._used) % self.num_samples

    @cached_property
    def _shift(self) -> int:
        return key_number(f"{self.seed}/{self.epoch}/shift", 0) % self.run_length

    @cached_property
    def _order(self) -> Permutation:
        return Permutation(self._used // self.run_length, f"{self.seed}/{self.epoch}/order")


class Permutation:
    """A random order of 0 .. size - 1, chosen by `key`: `permutation(i)` is the i-th number of it, in constant memory.

    A Feistel network on a rectangle of a x b >= size cells (Black and Rogaway, "Ciphers with Arbitrary Finite Domains",
    2002, the generalised Feistel construction with cycle walking): a cell outside is sent through the network
    again until it falls inside, which is a rare event because less than one row lies outside.
    """

    ROUNDS = 8

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        self.key = key
        self.width = isqrt(size - 1) + 1
        self.height = -(-size // self.width)

    def __call__(self, number: int) -> int:
        cell = self._shuffle(number)
        while cell >= self.size:
            cell = self._shuffle(cell)
        return cell

    def _shuffle(self, cell: int) -> int:
        row, column = divmod(cell, self.width)
        for step in range(0, self.ROUNDS, 2):
            row = (row + key_number(f"{self.key}/{step}", column)) % self.height
            column = (column + key_number(f"{self.key}/{step + 1}", row)) % self.width
        return row * self.width + column


def _around(first: int, count: int, size: int) -> Iterator[tuple[int, int]]:
    """`count` neighbours from `first` on, on a ring of `size`: one run, or two where they pass the end."""
    first %= size
    fitting = min(count, size - first)
    if fitting:
        yield first, fitting
    if count > fitting:
        yield 0, count - fitting
