"""metrics.py against arithmetic done by hand, against other packages, and against scorers that are wrong on purpose.

The golden values are small enough to check on paper. Every kind of mistake that has been seen in published scorers is
written out once (`broken` below) and must fail the check that the real one passes.
"""

from collections.abc import Callable
from math import comb

import numpy as np
import pytest

from vladva.benchmarks.metrics import (
    Outcomes,
    Ranks,
    all_above,
    class_embeddings,
    cosines,
    hits_at,
    rank,
    rank_scores,
    unit_rows,
    winoground,
)

SCORES = np.array(  # [caption, image]
    [[0.9, 0.1, 0.2], [0.3, 0.4, 0.2], [0.5, 0.5, 0.1], [0.2, 0.6, 0.7], [0.8, 0.1, 0.3]], np.float32
)
OWNERS = np.array([0, 0, 1, 2, 2])
IMAGES = np.arange(3)


def gaussian(rows: int, width: int = 32, seed: int = 0) -> np.ndarray:
    return unit_rows(np.random.default_rng(seed).standard_normal((rows, width)))


# Retrieval ------------------------------------------------------------------------------------------------------------


def test_texts_to_images_by_hand() -> None:
    ranks = rank_scores(SCORES, OWNERS, IMAGES)
    first = hits_at(ranks, 1)
    assert (first.mean("strict"), first.mean("expected"), first.optimistic.mean()) == pytest.approx((0.4, 0.5, 0.6))
    assert first.tie_rate == pytest.approx(0.2)
    second = hits_at(ranks, 2)
    assert (second.mean("strict"), second.mean("expected"), second.optimistic.mean()) == (1.0, 1.0, 1.0)
    assert second.tie_rate == 0.0


def test_images_to_texts_by_hand() -> None:
    ranks = rank_scores(SCORES.T.copy(), IMAGES, OWNERS)
    first = hits_at(ranks, 1)
    assert first.mean("strict") == first.mean("expected") == first.optimistic.mean() == pytest.approx(2 / 3)
    assert hits_at(ranks, 2).mean("strict") == 1.0


def test_true_recall_is_another_number() -> None:
    """Share of the relevant captions found at 1: (1/2 + 0 + 1/2) / 3. Negative control for the hit rate above."""
    best = SCORES.argmax(axis=0)
    recall = np.mean([np.mean([t == best[i] for t in np.flatnonzero(i == OWNERS)]) for i in IMAGES])
    assert recall == pytest.approx(1 / 3)


@pytest.mark.parametrize("k", [1, 2, 3, 5, 10])
def test_expected_hits_are_the_mean_over_random_orders(k: int) -> None:
    """Coarse scores with many ties, broken by brute force 4,000 times."""
    rng = np.random.default_rng(k)
    scores = rng.integers(0, 4, (30, 25)).astype(np.float32)
    labels, owners = np.arange(30) % 6, rng.permutation(np.arange(25) % 6)
    found = np.zeros(30)
    for _ in range(4000):
        order = np.lexsort((rng.random(scores.shape), -scores), axis=1)[:, :k]
        found += (owners[order] == labels[:, None]).any(axis=1)
    outcomes = hits_at(rank_scores(scores, labels, owners), k)
    assert np.abs(outcomes.expected - found / 4000).max() < 0.04
    assert (outcomes.strict <= outcomes.expected).all()
    assert (outcomes.expected <= outcomes.optimistic).all()


@pytest.mark.parametrize("captions", [(5, 6, 7), (10, 10, 10), (1, 2, 9)])
def test_ragged_captions_in_any_order(captions: tuple[int, ...]) -> None:
    owners = np.repeat(np.arange(3 * 20), captions * 20)
    images, texts = gaussian(60), unit_rows(gaussian(60)[owners] + 0.3 * gaussian(len(owners), seed=1))
    shuffled = np.random.default_rng(2).permutation(len(owners))
    for k in (1, 5, 10):
        to_images = hits_at(rank(texts, images, owners, np.arange(60)), k)
        to_texts = hits_at(rank(images, texts, np.arange(60), owners), k)
        # Independent: the rank by sorting, one query at a time.
        similarity = texts.astype(np.float64) @ images.T.astype(np.float64)
        assert to_images.mean("expected") == np.mean(
            [owner in np.argsort(-row)[:k] for row, owner in zip(similarity, owners, strict=True)]
        )
        assert to_texts.mean("expected") == np.mean([i in owners[np.argsort(-similarity[:, i])[:k]] for i in range(60)])
        again = hits_at(rank(texts[shuffled], images, owners[shuffled], np.arange(60)), k)
        assert np.array_equal(again.expected, to_images.expected[shuffled])
        again = hits_at(rank(images, texts[shuffled], np.arange(60), owners[shuffled]), k)
        assert np.array_equal(again.expected, to_texts.expected)


def test_blocks_change_nothing_and_nearest_are_the_best() -> None:
    queries, gallery, labels = gaussian(37), gaussian(11, seed=1), np.arange(37) % 11
    whole = rank(queries, gallery, labels, np.arange(11), keep=5)
    for block in (1, 7, 64):
        for a, b in zip(whole, rank(queries, gallery, labels, np.arange(11), keep=5, block=block), strict=True):
            assert np.allclose(a, b, atol=1e-6)
    similarity = queries @ gallery.T
    assert np.array_equal(whole.nearest, np.argsort(-similarity, axis=1)[:, :5])
    assert np.allclose(whole.similarity, -np.sort(-similarity, axis=1)[:, :5])


def test_an_item_of_several_vectors_is_as_near_as_its_nearest() -> None:
    """Against a loop over pairs; with one vector an item, and with P equal ones, it is the ordinary cosine."""
    texts, images = gaussian(35), gaussian(7 * 4, seed=1).reshape(7, 4, 32)
    largest = np.array([[max(float(text @ vector) for vector in image) for image in images] for text in texts])
    owners, numbers = np.repeat(np.arange(7), 5), np.arange(7)
    for block in (4, 1024):
        to_images = rank(texts, images, owners, numbers, keep=3, block=block)
        to_texts = rank(images, texts, numbers, owners, keep=3, block=block)
        assert np.array_equal(to_images.nearest, np.argsort(-largest, axis=1)[:, :3])
        assert np.array_equal(to_texts.nearest, np.argsort(-largest.T, axis=1)[:, :3])
        assert np.allclose(to_texts.similarity, -np.sort(-largest.T, axis=1)[:, :3], atol=1e-6)
    assert np.allclose(cosines(images[owners], texts), largest[np.arange(35), owners], atol=1e-6)
    assert np.allclose(np.linalg.norm(unit_rows(3 * images), axis=-1), 1)
    first = rank(texts, images[:, 0], owners, numbers)
    assert np.array_equal(first.above, rank(texts, images[:, :1].repeat(4, axis=1), owners, numbers).above)
    assert not np.array_equal(first.above, to_images.above)  # negative control: the first vector alone


def test_query_without_a_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="label 7 has no match"):
        rank_scores(SCORES, np.array([0, 0, 1, 2, 7]), IMAGES)


# One against another: SugarCrepe, SugarCrepe++, Winoground ------------------------------------------------------------


def test_sugar_crepe_tie_is_a_failure() -> None:
    outcomes = all_above(np.array([[0.3], [0.3], [0.2]]), np.array([[0.2], [0.3], [0.3]]))
    assert outcomes.strict.tolist() == [1, 0, 0]
    assert outcomes.expected.tolist() == [1, 0.5, 0]
    assert outcomes.tie_rate == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("caption", "caption2", "negative", "success"),
    [(0.30, 0.28, 0.25, 1), (0.30, 0.25, 0.25, 0), (0.30, 0.20, 0.25, 0), (0.25, 0.30, 0.25, 0)],
)
def test_image_to_text_of_sugar_crepe_pp(caption: float, caption2: float, negative: float, success: int) -> None:
    assert all_above(np.array([[caption, caption2]]), np.array([[negative]])).strict.tolist() == [success]


@pytest.mark.parametrize(
    ("together", "first_negative", "second_negative", "success"),
    [(0.8, 0.7, 0.7, 1), (0.8, 0.8, 0.7, 0), (0.8, 0.7, 0.85, 0), (1.0, 0.2, 1.0, 0)],
)
def test_text_only_of_sugar_crepe_pp(
    together: float, first_negative: float, second_negative: float, success: int
) -> None:
    assert all_above(np.array([[together]]), np.array([[first_negative, second_negative]])).strict.tolist() == [success]


def test_expected_value_of_level_groups() -> None:
    ones = np.ones((1, 2))
    assert all_above(ones, ones).expected[0] == pytest.approx(1 / 6)
    assert all_above(ones, ones[:, :1]).expected[0] == pytest.approx(1 / 3)
    assert all_above(np.array([[1.0, 2.0]]), ones).expected[0] == pytest.approx(1 / 3)
    assert all_above(np.array([[2.0, 2.0]]), ones).expected[0] == 1.0
    assert all_above(np.array([[0.0, 1.0]]), ones).expected[0] == 0.0


WINOGROUND = [  # scores [caption][image] -> text, image, group
    ([[0.9, 0.1], [0.2, 0.8]], (1, 1, 1)),
    ([[0.6, 0.7], [0.5, 0.9]], (1, 0, 0)),
    ([[0.6, 0.2], [0.7, 0.9]], (0, 1, 0)),
    ([[0.5, 0.4], [0.5, 0.9]], (0, 1, 0)),
    ([[0.5, 0.5], [0.5, 0.5]], (0, 0, 0)),
]


@pytest.mark.parametrize(("scores", "expected"), WINOGROUND)
def test_winoground_by_hand(scores: list, expected: tuple[int, int, int]) -> None:
    outcomes = winoground(np.array([scores]))
    assert tuple(int(outcomes[name].strict[0]) for name in ("text", "image", "group")) == expected


# Classification -------------------------------------------------------------------------------------------------------


def test_two_classes_of_the_same_name() -> None:
    """One image of each of three classes, the first two with the same prompts, the model otherwise perfect."""
    prompts = np.array([[0, 1, 2], [0, 1, 2], [3, 4, 5]])
    classes = class_embeddings(gaussian(6), prompts)
    ranks = rank(classes, classes, np.arange(3), np.arange(3))
    assert hits_at(ranks, 1).expected.tolist() == [0.5, 0.5, 1.0]
    assert hits_at(ranks, 1).strict.tolist() == [0, 0, 1]
    assert hits_at(ranks, 2).strict.tolist() == [1, 1, 1]


def test_prompts_are_normalised_before_they_are_averaged() -> None:
    embeddings = np.array([[10.0, 0.0], [0.0, 1.0]])
    assert np.allclose(class_embeddings(embeddings, np.array([[0, 1]])), [[2**-0.5, 2**-0.5]])


# The gate: a model that returns one vector for everything -------------------------------------------------------------


def chance(k: int, gallery: int, positives: int) -> float:
    return 1 - comb(gallery - positives, k) / comb(gallery, k)


@pytest.mark.parametrize(
    ("num_images", "captions", "published"),
    [
        (1000, 5, (0.001, 0.01, 0.00996)),
        (5000, 5, (0.0002, 0.002, 0.001999)),
        (4500, 10, (0.000222, 0.002222, 0.00222)),
    ],
)
def test_constant_model_retrieves_at_chance(num_images: int, captions: int, published: tuple[float, ...]) -> None:
    vector = gaussian(1, 64)
    images = np.repeat(vector, num_images, axis=0)
    owners = np.repeat(np.arange(num_images), captions)
    texts = np.repeat(vector, len(owners), axis=0)
    some = slice(0, 200)  # every query has the same outcome
    to_images = rank(texts[some], images, owners[some], np.arange(num_images))
    to_texts = rank(images[some], texts, np.arange(num_images)[some], owners)
    for k in (1, 5, 10):
        assert hits_at(to_images, k).mean("strict") == hits_at(to_texts, k).mean("strict") == 0
        assert hits_at(to_images, k).mean("expected") == pytest.approx(k / num_images)
        assert hits_at(to_texts, k).mean("expected") == pytest.approx(chance(k, len(owners), captions))
        assert hits_at(to_images, k).tie_rate == hits_at(to_texts, k).tie_rate == 1
    measured = [hits_at(to_images, 1), hits_at(to_images, 10), hits_at(to_texts, 10)]
    assert [outcomes.mean("expected") for outcomes in measured] == pytest.approx(published, rel=2e-3)


def test_constant_model_on_everything_else() -> None:
    vector = np.repeat(gaussian(1, 64), 50, axis=0)
    score = cosines(vector, vector)[:, None]
    assert all_above(score, score).strict.sum() == 0  # SugarCrepe
    assert all_above(np.hstack([score, score]), score).strict.sum() == 0  # ITT
    assert all_above(score, np.hstack([score, score])).strict.sum() == 0  # TOT
    for outcomes in winoground(np.ones((50, 2, 2)) * score[:, :, None]).values():
        assert outcomes.strict.sum() == 0
        assert outcomes.tie_rate == 1
    classes = np.repeat(vector[:1], 1000, axis=0)
    top = rank(vector, classes, np.arange(50), np.arange(1000))
    assert [hits_at(top, k).mean("expected") for k in (1, 5)] == pytest.approx([0.001, 0.005])


def test_almost_constant_model_is_at_chance() -> None:
    rng = np.random.default_rng(0)
    score = 0.5 + 1e-6 * rng.standard_normal((40_000, 4))
    assert all_above(score[:, :1], score[:, 1:2]).mean("strict") == pytest.approx(1 / 2, abs=0.01)
    assert all_above(score[:, :2], score[:, 2:3]).mean("strict") == pytest.approx(1 / 3, abs=0.01)
    pairs = winoground(score.reshape(-1, 2, 2))
    for name, value in {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}.items():
        assert pairs[name].mean("strict") == pytest.approx(value, abs=0.01)
    noisy = unit_rows(np.ones((2400, 64)) + 1e-3 * rng.standard_normal((2400, 64)))
    owners = np.repeat(np.arange(400), 5)
    ranks = rank(noisy[:2000], noisy[2000:], owners, np.arange(400))
    assert hits_at(ranks, 10).mean("expected") == pytest.approx(10 / 400, abs=0.012)


def test_embeddings_that_are_almost_constant_are_at_chance() -> None:
    """Every image the same vector and every text another, up to a millionth: what is measured is that noise."""
    rng = np.random.default_rng(1)
    base = rng.standard_normal((2, 1, 64))
    images = unit_rows(base[0] + 1e-6 * rng.standard_normal((20_000, 64)))
    first, second, third = (unit_rows(base[1] + 1e-6 * rng.standard_normal((20_000, 64))) for _ in range(3))
    scores = np.stack([cosines(images, texts) for texts in (first, second, third)], axis=1)
    assert all_above(scores[:, :1], scores[:, 1:2]).mean("expected") == pytest.approx(1 / 2, abs=0.015)
    assert all_above(scores[:, :2], scores[:, 2:]).mean("expected") == pytest.approx(1 / 3, abs=0.015)
    # Not Winoground: this noise belongs to a text or an image, not to a pair, so its four scores are not independent.
    owners, numbers = np.repeat(np.arange(400), 5), np.arange(400)
    assert hits_at(rank(first[:2000], images[:400], owners, numbers), 10).mean("expected") == pytest.approx(
        10 / 400, abs=0.012
    )


# Precision ------------------------------------------------------------------------------------------------------------


def narrow_pairs(count: int = 20_000) -> tuple[np.ndarray, np.ndarray]:
    """Cosines near 0.28 whose gaps are a few thousandths wide: what a real model gives on SugarCrepe."""
    rng = np.random.default_rng(0)
    positive = (0.28 + 0.02 * rng.standard_normal(count)).astype(np.float32)
    return positive, (positive - (0.005 + 0.01 * rng.standard_normal(count))).astype(np.float32)


def bfloat16(values: np.ndarray) -> np.ndarray:
    return (values.astype(np.float32).view(np.uint32) + np.uint32(0x8000) & np.uint32(0xFFFF0000)).view(np.float32)


def test_similarities_stay_in_float32() -> None:
    """Half-precision embeddings are raised before they are multiplied: pairs 1e-4 apart are still told apart."""
    rng = np.random.default_rng(0)
    image = unit_rows(rng.standard_normal((500, 256)))
    caption = unit_rows(0.3 * image + 0.05 * rng.standard_normal((500, 256)))
    negative = unit_rows(caption + 2e-4 * rng.standard_normal((500, 256)))
    halves = [unit_rows(rows.astype(np.float16)) for rows in (image, caption, negative)]
    assert all(rows.dtype == np.float32 for rows in halves)
    outcomes = all_above(cosines(halves[0], halves[1])[:, None], cosines(halves[0], halves[2])[:, None])
    assert outcomes.tie_rate < 0.02
    rounded = [(halves[0].astype(np.float16) * rows).sum(axis=1, dtype=np.float16) for rows in halves[1:]]
    assert all_above(rounded[0][:, None], rounded[1][:, None]).tie_rate > 0.1  # negative control


def test_low_precision_similarities_show_in_the_tie_rate() -> None:
    positive, negative = narrow_pairs()
    exact = all_above(positive[:, None], negative[:, None])
    low = all_above(bfloat16(positive)[:, None], bfloat16(negative)[:, None])
    assert exact.tie_rate == 0.0
    assert low.tie_rate > 0.05
    assert exact.mean("strict") - low.mean("strict") > 0.015
    assert low.optimistic.mean() - exact.mean("strict") > 0.015


def test_rows_without_direction_are_refused() -> None:
    rows = np.ones((5, 4))
    for value in (0.0, np.nan, np.inf):
        rows[3] = value
        with pytest.raises(ValueError, match="row 3 is zero or not finite"):
            unit_rows(rows)


def test_optimistic_scores_cannot_be_reported() -> None:
    outcomes = Outcomes(np.zeros(3), np.zeros(3), np.ones(3))
    with pytest.raises(ValueError, match="cannot be reported"):
        outcomes.mean("optimistic")  # type: ignore[arg-type]


# Scorers that are wrong on purpose: each must fail a check that ours passes -------------------------------------------


def check_retrieval(
    hits: Callable[[Ranks, int], float], owners_of: Callable[[np.ndarray], np.ndarray] = lambda owners: owners
) -> None:
    """Two images with three captions each, one with one: right for all but the tied last caption."""
    owners = np.array([0, 0, 0, 1, 1, 1, 2])
    scores = np.eye(3, dtype=np.float32)[owners]
    scores[6] = 0.5
    outcome = hits(rank_scores(scores, owners_of(owners), IMAGES), 1)
    assert outcome == pytest.approx(6 / 7)


def check_winoground(scorer: Callable[[np.ndarray], dict[str, Outcomes]]) -> None:
    for scores, (text, image, group) in WINOGROUND:
        outcomes = scorer(np.array([scores]))
        assert [outcomes[name].strict[0] for name in ("text", "image", "group")] == [text, image, group]


def check_pairs(accuracy: Callable[[np.ndarray, np.ndarray], float]) -> None:
    positive, negative = narrow_pairs()
    truth = np.mean(positive.astype(np.float64) > negative.astype(np.float64))
    assert accuracy(positive, negative) == pytest.approx(truth, abs=1e-9)


def test_real_scorers_pass_the_checks() -> None:
    check_retrieval(lambda ranks, k: hits_at(ranks, k).mean("strict"))
    check_winoground(winoground)
    check_pairs(lambda positive, negative: all_above(positive[:, None], negative[:, None]).mean("strict"))


BROKEN = {
    "ties counted as hits": lambda: check_retrieval(lambda ranks, k: float((ranks.above < k).mean())),
    "owner of caption t is t // 5": lambda: check_retrieval(
        lambda ranks, k: hits_at(ranks, k).mean("strict"), lambda owners: np.arange(len(owners)) // 5
    ),
    "text and image swapped in Winoground": lambda: check_winoground(
        lambda scores: winoground(scores.transpose(0, 2, 1))
    ),
    "similarities in bfloat16": lambda: check_pairs(
        lambda positive, negative: all_above(bfloat16(positive)[:, None], bfloat16(negative)[:, None]).mean("strict")
    ),
    "ties counted as hits in pairs": lambda: check_pairs(
        lambda positive, negative: float((bfloat16(positive) >= bfloat16(negative)).mean())
    ),
}


@pytest.mark.parametrize("mistake", BROKEN)
def test_a_broken_scorer_is_caught(mistake: str) -> None:
    with pytest.raises(AssertionError):
        BROKEN[mistake]()
