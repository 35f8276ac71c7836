"""Schedule: one data set as its plan has it; several in exact proportions, each exactly once in its own epochs."""

from __future__ import annotations

from collections import Counter
from fractions import Fraction

import pytest

from vladva.config import DataConfig
from vladva.data.epoch_plan import EpochPlan
from vladva.data.sampler import Sampler, SampleRange

# Runs of the first epoch's chunks 0, 1 and of the second and third one's, from before data sets could be mixed.
RECORDED = [[(660, 8), (956, 4), (0, 4)], [(636, 8), (308, 8)], [(788, 8), (852, 8)], [(771, 8), (379, 8)]]
SHARES = [(1, 1), (7, 3), (1, 2, 4), (5, 5, 5, 1), (1, 1, 1, 1, 1, 95), (97, 2, 1), (13, 11, 7, 5, 3, 2, 2)]


def mixed(shares: tuple[int, ...], sizes: tuple[int, ...] | None = None, run_length: int = 4, seed: int = 3) -> Sampler:
    return Sampler(
        sizes or (1_000,) * len(shares), shares, seed, chunk_size=16, run_length=run_length, chunks_per_batch=4
    )


def test_one_data_set_is_laid_out_as_its_plan_says() -> None:
    """Chunk contents written down when there was no mixing: runs must go on over an update."""
    alone = Sampler((1_000,), (1,), seed=3, chunk_size=16, run_length=8, chunks_per_batch=4)
    plans = [EpochPlan(1_000, 3, epoch, 16, 8, 4) for epoch in range(3)]
    for number in range(3 * plans[0].num_chunks):
        epoch, within = divmod(number, plans[0].num_chunks)
        assert alone.chunk(number) == [SampleRange(0, epoch, *run) for run in plans[epoch].chunk(within)]
    assert [[run[2:] for run in alone.chunk(number)] for number in (0, 1, 60, 121)] == RECORDED


def worst_deviation(sources: list[int], shares: tuple[int, ...]) -> Fraction:
    """By how many runs a data set is ahead of its part or behind, at the worst place."""
    counts, worst = [0] * len(shares), Fraction(0)
    for place, source in enumerate(sources, 1):
        counts[source] += 1
        parts = [Fraction(place * share, sum(shares)) for share in shares]
        worst = max(worst, *(abs(count - part) for count, part in zip(counts, parts, strict=True)))
    return worst


@pytest.mark.parametrize("shares", SHARES, ids=str)
def test_proportions_are_exact_on_every_prefix(shares: tuple[int, ...]) -> None:
    schedule = mixed(shares, run_length=16)
    sources = [schedule.chunk(number)[0].source for number in range(3 * sum(shares))]
    assert Counter(sources) == {source: 3 * share for source, share in enumerate(shares)}
    assert worst_deviation(sources, shares) < 1
    if max(shares) > 2:
        assert worst_deviation(sorted(sources), shares) > 1  # one after the other: the proportions of the whole only


def deliveries(schedule: Sampler, chunks: range) -> list[tuple[int, int, int]]:
    """(data set, epoch, sample) in order."""
    return [
        (run.source, run.epoch, run.first + i)
        for number in chunks
        for run in schedule.chunk(number)
        for i in range(run.count)
    ]


def test_each_data_set_comes_exactly_once_in_each_of_its_epochs() -> None:
    """103 samples with 7 of 10 parts are used up many times while 501 with 3 are once; remainders rotate."""
    schedule = mixed((7, 3), sizes=(103, 501))
    chunks = 120
    found = Counter(deliveries(schedule, range(chunks)))
    assert max(found.values()) == 1
    for source, size in enumerate(schedule.sizes):
        used = schedule.used(source, chunks)
        assert used == sum(1 for each in found if each[0] == source)
        assert used == chunks * 16 * schedule.shares[source] // 10
        finished = used // schedule.epoch_size(source)
        assert finished == (13, 1)[source]
        for epoch in range(finished):
            samples = {sample for s, e, sample in found if (s, e) == (source, epoch)}
            left_out = {first + i for first, count in schedule.plan(source, epoch).left_out() for i in range(count)}
            assert samples | left_out == set(range(size))
            assert not samples & left_out
            assert len(left_out) == size % 4 < schedule.run_length


def test_data_sets_of_one_size_are_in_different_orders() -> None:
    found = deliveries(mixed((1, 1)), range(50))
    orders = [[sample for source, _, sample in found if source == which] for which in (0, 1)]
    assert orders[0] != orders[1]


def test_batches_depend_neither_on_workers_nor_on_where_one_starts() -> None:
    whole = [mixed((7, 3)).chunk(number) for number in range(96)]
    for workers in (1, 2, 4):
        for rank in range(workers):
            reader = mixed((7, 3))  # each worker has its own
            for number in range(40 + rank, 96, workers):
                assert reader.chunk(number) == whole[number]
    assert [mixed((7, 3), seed=4).chunk(number) for number in range(96)] != whole


def test_a_data_set_smaller_than_its_part_of_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.mix: the data set 2 of 2 has 31 samples.*64 \* 1/2: lower its weight"):
        mixed((1, 1), sizes=(1_000, 31))
    mixed((1, 1), sizes=(1_000, 32))


@pytest.mark.parametrize(
    ("mix", "shares"),
    [
        (("a=1", "b=1"), (1, 1)),
        (("a=0.7", "s3://bucket/key=0.3"), (7, 3)),
        (("a=1/3", "b=2/3"), (1, 2)),
        (("a=0.1", "b=0.25", "c=5"), (2, 5, 100)),
        (("a=3",), (1,)),
        ((), (1,)),
    ],
)
def test_weights_become_whole_numbers(mix: tuple[str, ...], shares: tuple[int, ...]) -> None:
    assert DataConfig("alone", mix=mix).shares == shares
    assert DataConfig("alone", mix=mix).uris == (tuple(part.rpartition("=")[0] for part in mix) or ("alone",))


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        (("a", "b=1"), r"data\.mix: 'a' is not URI=WEIGHT"),
        (("a=0", "b=1"), r"data\.mix: 'a=0' is not URI=WEIGHT with a positive weight"),
        (("a=-1", "b=1"), r"positive weight"),
        (("a=x", "b=1"), r"'a=x'"),
        (("a=nan", "b=1"), r"'a=nan'"),
        (("=1", "b=1"), r"'=1'"),
        (("a=1", "a=2"), r"names a folder twice"),
        (("a=0.33333", "b=0.66667"), r"33333, 66667 in whole numbers, 100,000 together; round them"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(mix: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig("alone", mix=mix)
