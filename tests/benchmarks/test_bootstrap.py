"""Resampling: intervals against the formulas of textbooks, p-values that can be counted by hand, and controls."""

from math import comb, sqrt

import numpy as np
import pytest

from vladva.benchmarks.bootstrap import compare_outcomes, interval, resample

R = 1000


def one(outcomes: np.ndarray, name: str = "m") -> dict[str, dict[str, np.ndarray]]:
    return {"set": {name: np.asarray(outcomes, float)}}


def test_two_samples_by_hand() -> None:
    """Of (0, 1) drawn twice, the mean is 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    means = resample(one([0, 1]), {}, 4000)["m"]
    values, counts = np.unique(means, return_counts=True)
    assert values.tolist() == [0, 0.5, 1]
    assert counts / 4000 == pytest.approx([0.25, 0.5, 0.25], abs=0.03)
    assert interval(means) == (0.0, 1.0)


def test_interval_of_a_share_is_the_binomial_one() -> None:
    outcomes = np.arange(1000) < 300
    low, high = interval(resample(one(outcomes), {}, 4000)["m"])
    half = 1.96 * sqrt(0.3 * 0.7 / 1000)
    assert (low, high) == pytest.approx((0.3 - half, 0.3 + half), abs=0.003)


def test_interval_of_a_mean_is_the_normal_one() -> None:
    outcomes = np.random.default_rng(1).random(2000)
    low, high = interval(resample(one(outcomes), {}, 4000)["m"])
    half = 1.96 * outcomes.std() / sqrt(2000)
    assert (low, high) == pytest.approx((outcomes.mean() - half, outcomes.mean() + half), abs=0.0015)


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    random, covered = np.random.default_rng(2), 0
    for seed in range(300):
        low, high = interval(resample(one(random.random(200) < 0.6), {}, 300, seed)["m"])
        covered += low <= 0.6 <= high
    assert 0.91 <= covered / 300 <= 0.98  # 0.95 within three standard errors of 0.0126


def test_averages_are_resampled_within_their_subsets() -> None:
    """A macro mean of two subsets: the variances of the subsets add, whatever their sizes."""
    a, b = np.arange(400) < 100, np.arange(100) < 50
    samples = {"a": {"a": a.astype(float)}, "b": {"b": b.astype(float)}}
    means = resample(samples, {"macro": {"a": 0.5, "b": 0.5}, "micro": {"a": 0.8, "b": 0.2}}, 4000)
    variance = {"a": 0.25 * 0.75 / 400, "b": 0.5 * 0.5 / 100}
    assert means["macro"].mean() == pytest.approx((0.25 + 0.5) / 2, abs=0.002)
    assert means["macro"].std() == pytest.approx(sqrt(sum(variance.values())) / 2, rel=0.05)
    assert means["micro"].std() == pytest.approx(sqrt(0.64 * variance["a"] + 0.04 * variance["b"]), rel=0.05)
    # Negative control: pooled, the larger subset rules, and the spread is another.
    pooled = resample(one(np.concatenate([a, b])), {}, 4000)["m"].std()
    assert pooled < 0.85 * means["macro"].std()


def test_equal_models_do_not_differ() -> None:
    outcomes = one(np.arange(50) % 3 == 0)
    assert compare_outcomes(outcomes, outcomes, {}, R)["m"] == (0, 0, 0, 1)


def test_p_is_the_share_of_sign_flips_counted_by_hand() -> None:
    """Five samples that all got better: of 32 flips, the two that agree in sign are as far. Three of five: 2 / 8."""
    better = one([1, 1, 1, 1, 1])
    assert compare_outcomes(better, one([0] * 5), {}, 20_000)["m"].p == pytest.approx(2 / 32, abs=0.006)
    three = compare_outcomes(one([1, 1, 1, 1, 0]), one([0, 0, 0, 1, 0]), {}, 20_000)["m"]
    assert three.difference == pytest.approx(3 / 5)
    assert three.p == pytest.approx(2 / 8, abs=0.01)


def test_p_agrees_with_the_sign_test() -> None:
    """Outcomes of 0 and 1: the permutation test on the mean is the exact sign test on the samples that changed."""
    gained, lost, n = 40, 22, 500
    ours, theirs = np.zeros(n), np.zeros(n)
    ours[:gained], theirs[gained : gained + lost] = 1, 1
    changed = gained + lost
    exact = 2 * sum(comb(changed, k) for k in range(gained, changed + 1)) / 2**changed
    assert compare_outcomes(one(ours), one(theirs), {}, 10_000)["m"].p == pytest.approx(exact, abs=0.008)


def test_p_is_uniform_where_models_are_equal_in_truth() -> None:
    random = np.random.default_rng(3)
    draws = [(one(random.random(200) < 0.5), one(random.random(200) < 0.5)) for _ in range(300)]
    small = np.mean(
        [compare_outcomes(ours, theirs, {}, 200, seed)["m"].p <= 0.05 for seed, (ours, theirs) in enumerate(draws)]
    )
    assert 0.01 <= small <= 0.09


def test_a_real_difference_is_found_though_intervals_overlap() -> None:
    """Paired models: 3% of the samples changed, all for the better. Unpaired intervals of the two scores overlap."""
    theirs = np.random.default_rng(4).random(1000) < 0.5
    ours = theirs.copy()
    ours[np.flatnonzero(~theirs)[:30]] = True
    [found] = compare_outcomes(one(ours), one(theirs), {}, R).values()
    assert found.p == pytest.approx(1 / (R + 1))
    assert found.low > 0.015
    assert found.high < 0.05
    low, high = (interval(resample(one(outcomes), {}, R)["m"]) for outcomes in (theirs, ours))
    assert low[1] > high[0]
    # Negative control: shuffled, the pairing is lost, and the same two scores are no longer told apart.
    shuffled = np.random.default_rng(5).permutation(ours)
    assert compare_outcomes(one(shuffled), one(theirs), {}, R)["m"].p > 0.05


def test_the_difference_is_that_of_the_shared_resamples() -> None:
    random = np.random.default_rng(6)
    ours, theirs = one(random.random(300) < 0.6), one(random.random(300) < 0.5)
    shared = resample(ours, {}, R)["m"] - resample(theirs, {}, R)["m"]
    found = compare_outcomes(ours, theirs, {}, R)["m"]
    assert (found.low, found.high) == pytest.approx(interval(shared), abs=1e-12)
    assert resample(ours, {}, R, seed=1)["m"].tolist() != resample(ours, {}, R)["m"].tolist()
