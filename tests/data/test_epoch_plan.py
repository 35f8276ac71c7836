"""Plan: exactly once, rotation of the remainder, independence of workers, uniform order, constant memory."""

from __future__ import annotations

import time
import tracemalloc
from collections import Counter
from collections.abc import Iterable
from itertools import combinations, permutations

import pytest

from vladva.data.epoch_plan import EpochPlan, Permutation

# (num_samples, chunk_size, run_length, chunks_per_batch): no remainder, some, 1, the largest, one batch, runs of 1
SIZES = [(960, 16, 4, 4), (1000, 16, 8, 4), (961, 16, 16, 4), (1023, 16, 4, 4), (64, 16, 8, 4), (77, 8, 1, 2)]


def plan(size: tuple[int, int, int, int], seed: int = 0, epoch: int = 0) -> EpochPlan:
    num_samples, chunk_size, run_length, chunks_per_batch = size
    return EpochPlan(num_samples, seed, epoch, chunk_size, run_length, chunks_per_batch)


def expand(runs: list[tuple[int, int]]) -> list[int]:
    return [sample for first, count in runs for sample in range(first, first + count)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_every_sample_is_used_exactly_once_but_for_the_remainder(size: tuple[int, int, int, int], epoch: int) -> None:
    made = plan(size, epoch=epoch)
    chunks = [expand(made.chunk(number)) for number in range(made.num_chunks)]
    assert {len(chunk) for chunk in chunks} == {made.chunk_size}
    used = [sample for chunk in chunks for sample in chunk]
    left_out = expand(made.left_out())
    assert sorted(used + left_out) == list(range(made.num_samples))
    assert len(left_out) == made.num_samples % made.batch_size < made.batch_size
    assert made.num_batches == made.num_samples // made.batch_size


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_runs_are_ranges_inside_the_numbering(size: tuple[int, int, int, int]) -> None:
    made = plan(size, epoch=3)
    runs = [run for number in range(made.num_chunks) for run in made.chunk(number)]
    assert all(first >= 0 and count > 0 and first + count <= made.num_samples for first, count in runs)
    assert all(count <= made.run_length for _, count in runs)
    # Only the run over the end of the window and the one over the end of the numbering are in pieces.
    assert len(runs) <= made.num_chunks * made.chunk_size // made.run_length + 2


@pytest.mark.parametrize("size", [size for size in SIZES if size[0] % (size[1] * size[3])], ids=str)
def test_the_remainder_rotates(size: tuple[int, int, int, int]) -> None:
    remainder = size[0] % (size[1] * size[3])
    left_out: Counter[int] = Counter()
    for epoch in range(size[0]):  # so many epochs leave out `remainder * num_samples` samples: each one equally often
        left_out.update(expand(plan(size, epoch=epoch).left_out()))
    assert left_out == dict.fromkeys(range(size[0]), remainder)


def flat(parts: Iterable[list[int]]) -> list[int]:
    return [sample for part in parts for sample in part]


def batches(made: EpochPlan) -> list[list[int]]:
    """The samples of each global batch, in order."""
    per_batch = made.chunks_per_batch
    chunks = [expand(made.chunk(number)) for number in range(made.num_chunks)]
    return [flat(chunks[i : i + per_batch]) for i in range(0, len(chunks), per_batch)]


def test_batches_do_not_depend_on_the_workers_nor_on_where_one_starts() -> None:
    made = plan((1000, 16, 8, 4))
    for workers in (1, 2, 4):
        read = {
            number: expand(plan((1000, 16, 8, 4)).chunk(number))  # each worker makes its own plan
            for rank in range(workers)
            for number in range(made.num_chunks)
            if number % workers == rank
        }
        merged = [flat(read[number] for number in range(i, i + 4)) for i in range(0, made.num_chunks, 4)]
        assert merged == batches(made)
    resumed = [expand(plan((1000, 16, 8, 4)).chunk(number)) for number in range(8, made.num_chunks)]
    assert flat(resumed) == flat(batches(made)[2:])


def test_seeds_and_epochs_change_order_and_company() -> None:
    size = (960, 16, 4, 4)
    orders = [flat(batches(plan(size, seed=seed, epoch=epoch))) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert flat(batches(plan(size))) == orders[0]
    assert all(one != other for one, other in combinations(orders, 2))
    # Pairs of neighbours that share a run are not the same in every epoch, though here nothing is left over to rotate.
    starts = {
        frozenset(first % 4 for first, count in plan(size, epoch=epoch).chunk(0) if count == 4) for epoch in range(20)
    }
    assert len(starts) == 4


def test_runs_come_from_all_over_the_data_set() -> None:
    made = plan((64_000, 64, 16, 16))
    firsts = sorted(first for number in range(16) for first, _ in made.chunk(number))
    # 64 runs of one batch, drawn from 4,000: the chance that a tenth of the data set has none is 0.9 ** 64 = 0.001.
    assert {first * 10 // 64_000 for first in firsts} == set(range(10))


def test_a_hundred_million_samples_cost_no_memory() -> None:
    tracemalloc.start()
    started = time.perf_counter()
    made = EpochPlan(100_000_000, seed=1, epoch=3, chunk_size=64, run_length=16, chunks_per_batch=16)
    samples = expand(made.chunk(0)) + expand(made.chunk(made.num_chunks - 1))
    seconds, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(set(samples)) == 128
    assert seconds < 0.1
    assert peak < 100_000  # bytes


@pytest.mark.parametrize("size", [*range(1, 40), 97, 1000, 4096])
def test_a_permutation_is_one(size: int) -> None:
    assert sorted(map(Permutation(size, "key"), range(size))) == list(range(size))


def test_all_orders_are_equally_likely() -> None:
    trials = 2400
    orders = Counter(tuple(map(Permutation(4, str(key)), range(4))) for key in range(trials))
    assert set(orders) <= set(permutations(range(4)))
    expected = trials / 24
    chi_square = sum((orders[order] - expected) ** 2 / expected for order in permutations(range(4)))
    assert chi_square < 49.7  # the 99.9% point at 23 degrees of freedom


def test_every_place_is_equally_likely_and_neighbours_part() -> None:
    size, trials = 50, 4000
    keys = [Permutation(size, str(key)) for key in range(trials)]
    expected = trials / size
    for number in (0, 1, 49):
        places = Counter(permutation(number) for permutation in keys)
        chi_square = sum((places[place] - expected) ** 2 / expected for place in range(size))
        assert chi_square < 85.4  # the 99.9% point at 49 degrees of freedom
    gaps = Counter((permutation(1) - permutation(0)) % size for permutation in keys)
    chi_square = sum((gaps[gap] - trials / 49) ** 2 / (trials / 49) for gap in range(1, size))
    assert chi_square < 84.0  # 48 degrees of freedom


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 16, 4, 4), "the data set is empty"),
        ((63, 16, 4, 4), "63 samples, fewer than one global batch of 64 .4 chunks of 16.: use a smaller batch"),
        ((640, 16, 5, 4), "run_length = 5 does not divide chunk_size = 16"),
        ((640, 0, 4, 4), "chunk_size = 0"),
        ((640, 16, 0, 4), "run_length = 0"),
        ((640, 16, 4, 0), "chunks_per_batch = 0"),
    ],
)
def test_impossible_plans_say_what_to_change(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(arguments)


def test_a_chunk_past_the_end_is_an_error() -> None:
    with pytest.raises(IndexError, match="chunk 40 of an epoch of 40"):
        plan((640, 16, 4, 4)).chunk(40)
