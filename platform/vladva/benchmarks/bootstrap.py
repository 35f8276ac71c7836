"""Per-sample outcomes -> intervals of scores, and whether two models differ, by resampling.

Intervals are percentile intervals of the bootstrap: samples (queries) are drawn anew with replacement, R times. The
draws follow from the seed and the sample set alone, so two models that answered the same samples meet the same draws,
and the differences of their resampled scores give the interval of the difference (paired bootstrap). The p-value is
that of the paired permutation test: if the models were equal, which of the two gave which outcome to a sample would be
a matter of chance, so the signs of the differences are flipped at random; p is the share of flips that differ as much.

Averages over subsets (macro, micro) are weighted means of their subsets' scores, each resampled within its subset. The
queries are taken as independent; captions of one image are not quite, which makes intervals a little narrow. A score
of 0 or 100% has nothing to resample, and an interval of no width.

Letters: N samples, M metrics of the same samples, R resamples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple
from zlib import crc32

import numpy as np

Samples = Mapping[str, Mapping[str, np.ndarray]]  # sample set -> metric -> outcomes in [0, 1], all [N]
Averages = Mapping[str, Mapping[str, float]]  # metric -> the metrics it averages, and their weights
LEVEL = 0.95


class Difference(NamedTuple):
    """How far one score is above another: the difference, its interval, and p that there is none (two-sided)."""

    difference: float
    low: float
    high: float
    p: float


def means(samples: Samples, averages: Averages) -> dict[str, float]:
    """Every metric's score."""
    scores = _repeat(samples, averages, 1, 0, lambda _, count: np.ones(count))
    return {metric: float(score) for metric, [score] in scores.items()}


def resample(samples: Samples, averages: Averages, resamples: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Every metric's score [R] in each of R bootstrap resamples."""
    return _repeat(samples, averages, resamples, seed, _draw)


def interval(scores: np.ndarray) -> tuple[float, float]:
    """The middle 95% of resampled scores [R]."""
    low, high = np.quantile(scores, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def compare_outcomes(
    ours: Samples, theirs: Samples, averages: Averages, resamples: int, seed: int = 0
) -> dict[str, Difference]:
    """Our scores minus theirs on the same samples, by metric."""
    changes = {
        name: {metric: outcomes - theirs[name][metric] for metric, outcomes in of.items()} for name, of in ours.items()
    }
    drawn = _repeat(changes, averages, resamples, seed, _draw)
    flipped = _repeat(changes, averages, resamples, seed, _flip)
    differences = {}
    for metric, difference in means(changes, averages).items():
        as_far = np.count_nonzero(np.abs(flipped[metric]) >= abs(difference) - 1e-12)
        # The outcome as it was is one of the flips: p is never 0.
        differences[metric] = Difference(difference, *interval(drawn[metric]), (as_far + 1) / (resamples + 1))
    return differences


def _repeat(
    samples: Samples,
    averages: Averages,
    repeats: int,
    seed: int,
    weigh: Callable[[np.random.Generator, int], np.ndarray],
) -> dict[str, np.ndarray]:
    """Every metric's weighted mean [R], with new weights [N] each time, the same for all metrics of a sample set."""
    scores: dict[str, np.ndarray] = {}
    for name, metrics in samples.items():
        outcomes_NM = np.stack(list(metrics.values()), axis=1)
        random = np.random.default_rng([seed, crc32(name.encode())])
        scores_RM = np.stack([weigh(random, len(outcomes_NM)) @ outcomes_NM for _ in range(repeats)]) / len(outcomes_NM)
        scores |= dict(zip(metrics, scores_RM.T, strict=True))
    for name, weights in averages.items():
        scores[name] = sum((weight * scores[metric] for metric, weight in weights.items()), start=np.zeros(repeats))
    return scores


def _draw(random: np.random.Generator, count: int) -> np.ndarray:
    """How often each of `count` samples is drawn when `count` are drawn with replacement."""
    return np.bincount(random.integers(0, count, count), minlength=count).astype(np.float64)


def _flip(random: np.random.Generator, count: int) -> np.ndarray:
    return 2.0 * random.integers(0, 2, count) - 1.0
