"""What is expected of batches that were never seen, and what is forgotten."""

from __future__ import annotations

import pytest

from serve.deployments.batch_times import BATCHES_COUNT_S, BatchTimes


def test_nothing_is_known_at_first() -> None:
    assert BatchTimes().seconds_for(1000, 512) == 0


def test_many_small_ones_are_one_batch() -> None:
    times = BatchTimes()
    for _ in range(20):
        times.record(16, 0.1)  # of one item
    assert times.seconds_for(640, 4096) == pytest.approx(4.0)  # no better is known: as much in small ones
    times.record(512, 0.2)
    assert times.seconds_for(512, 4096) == pytest.approx(0.2)
    assert times.seconds_for(640, 4096) == pytest.approx(0.25)
    assert times.seconds_for(16, 4096) == pytest.approx(0.1)
    assert times.seconds_for(64, 4096) == pytest.approx(0.2)  # no longer than a larger one
    assert times.seconds_for(1280, 512) == pytest.approx(0.2 + 0.2 + 0.2)


def test_what_was_measured_long_ago_does_not_count() -> None:
    times = BatchTimes()
    times.record(16, 0.01)
    for _ in range(4):
        times.record(4096, BATCHES_COUNT_S / 3)  # all of a sudden the machine is slow
    assert times.seconds_for(4096, 4096) == pytest.approx(BATCHES_COUNT_S / 3)
    for _ in range(20):
        times.record(4096, 1.0)
    assert times.seconds_for(4096, 4096) == pytest.approx(1.0, rel=0.01)
