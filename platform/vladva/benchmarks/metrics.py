"""Embeddings -> outcomes: retrieval, pairwise choice, Winoground and k-way classification, in numpy alone.

Everything here is a question about order: is the right item above the wrong ones? A tie has no order, and a scorer that
counts it as a hit gives a model that returns the same vector for everything 100%. So every outcome is kept under three
policies (`Outcomes`), and the share of outcomes that depend on the policy, the tie rate, goes beside every score.

Embeddings are raised to float32 before they are normalised and multiplied. Similarities are never rounded below that:
in bfloat16 the cosines near 0.3 lie 0.002 apart, which ties 3 to 6% of realistic pairs.

An image may have several vectors (BLIP-2: one for each query token); its cosine with a text is then the largest of
theirs.

Letters: N samples, Q queries, G gallery items, P vectors of one item, D width, k cut-off.
"""

from collections.abc import Iterator
from hashlib import sha1
from typing import Literal, NamedTuple

import numpy as np

Ties = Literal["strict", "expected"]


class Outcomes(NamedTuple):
    """The outcome of N samples, each in [0, 1], float64 [N], under three ways to treat a tie.

    `strict`: a tie is a failure. `expected`: the chance of success if ties were broken at random. `optimistic`: a tie
    is a success; an upper bound for audits, which `under` and `mean` refuse to report.
    """

    strict: np.ndarray
    expected: np.ndarray
    optimistic: np.ndarray

    def under(self, ties: Ties) -> np.ndarray:
        """Outcomes [N] under the policy `ties`."""
        if ties == "strict":
            return self.strict
        if ties == "expected":
            return self.expected
        raise ValueError(
            f"ties: {ties!r} cannot be reported; use 'strict' or 'expected' (counting ties as hits gives a constant "
            "model a perfect score)"
        )

    def mean(self, ties: Ties) -> float:
        """Score in [0, 1]: the mean over all samples under the policy `ties`."""
        return float(self.under(ties).mean())

    @property
    def tie_rate(self) -> float:
        """Fraction of the samples whose outcome depends on how ties are treated."""
        return float((self.strict != self.optimistic).mean())


class Ranks(NamedTuple):
    """Where the best positive of each query stands. Counts are int64 [Q]."""

    above: np.ndarray  # gallery items scored higher than the best positive (no positive can be among them)
    tied: np.ndarray  # negatives scored equal to it
    tied_positives: np.ndarray  # positives scored equal to it, itself included
    nearest: np.ndarray  # int64 [Q, keep], gallery items from the most similar down
    similarity: np.ndarray  # float32 [Q, keep], their cosines


def unit_rows(embeddings: np.ndarray, *, block: int = 4096) -> np.ndarray:
    """Rows [N, D], or [N, P, D], of any float type -> float32 rows of length 1.

    Norms are taken in float64 and in blocks, so that equal rows stay equal bit for bit and memory stays bounded.
    Raises ValueError for a row with no direction (zero, NaN or infinite).
    """
    if embeddings.ndim == 3:
        return unit_rows(embeddings.reshape(-1, embeddings.shape[2]), block=block).reshape(embeddings.shape)
    rows = np.empty(embeddings.shape, np.float32)
    for start in range(0, len(rows), block):
        raw = np.asarray(embeddings[start : start + block], np.float64)
        length = np.sqrt(np.einsum("nd,nd->n", raw, raw))
        bad = ~(np.isfinite(length) & (length > 0))
        if bad.any():
            raise ValueError(f"embeddings: row {start + int(bad.argmax())} is zero or not finite, it has no direction")
        rows[start : start + block] = raw / length[:, None]
    return rows


def cosines(left: np.ndarray, right: np.ndarray, *, block: int = 4096) -> np.ndarray:
    """Unit rows [N, D] (or [N, P, D]) and [N, D] -> their cosines row by row (the largest of P), float32 [N].

    Summed in float64 and rounded once: equal pairs give equal cosines wherever in the array they lie.
    """
    values = np.empty(len(left), np.float32)
    for start in range(0, len(left), block):
        part = slice(start, start + block)
        products = np.einsum("n...d,nd->n...", left[part].astype(np.float64), right[part].astype(np.float64))
        values[part] = products.reshape(len(products), -1).max(axis=1)
    return values


def rank(
    queries: np.ndarray,
    gallery: np.ndarray,
    query_labels: np.ndarray,
    gallery_labels: np.ndarray,
    *,
    keep: int = 0,
    block: int = 1024,
) -> Ranks:
    """Rank a gallery for every query; a gallery item is a positive of a query when their labels are equal.

    queries [Q, D] and gallery [G, D] are unit rows; one of them may have P vectors an item, [.., P, D]. Texts against
    images: labels are each caption's image and the images' own numbers; images against texts: the same two the other
    way round; classification: each image's class and the class numbers. Any number of positives per query, at least
    one. At most `block` x G similarities are held (with several vectors, of vectors).
    """
    parts = [
        rank_scores(scores, query_labels[rows], gallery_labels, keep=keep)
        for rows, scores in _similarity_blocks(queries, gallery, block)
    ]
    return Ranks(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def rank_scores(scores: np.ndarray, query_labels: np.ndarray, gallery_labels: np.ndarray, *, keep: int = 0) -> Ranks:
    """`rank` on a similarity matrix [Q, G]. Raises ValueError for a query that has no positive in the gallery."""
    # The gallery sorted by label: a query's positives are neighbours in `order`, from `first` on, `count` of them.
    order = np.argsort(gallery_labels, kind="stable")
    first = np.searchsorted(gallery_labels, query_labels, "left", sorter=order)
    count = np.searchsorted(gallery_labels, query_labels, "right", sorter=order) - first
    if not count.all():
        raise ValueError(f"query_labels: label {query_labels[int(count.argmin())]} has no match in the gallery")

    # The positives of all queries in one flat list: query 0's, then query 1's, ...
    starts = np.cumsum(count) - count
    rows = np.repeat(np.arange(len(scores)), count)
    columns = order[np.arange(len(rows)) + np.repeat(first - starts, count)]
    positives = scores[rows, columns]
    # The largest of each query's part of the list.
    best = np.maximum.reduceat(positives, starts)

    # Above it there are only negatives; level with it there may be positives too, which are taken off.
    above = np.count_nonzero(scores > best[:, None], axis=1)
    level = np.count_nonzero(scores == best[:, None], axis=1)
    tied_positives = np.add.reduceat((positives == best[rows]).astype(np.int64), starts)
    nearest = _nearest(scores, keep)
    similarity = np.take_along_axis(scores, nearest, axis=1)
    return Ranks(above, level - tied_positives, tied_positives, nearest, similarity)


def hits_at(ranks: Ranks, k: int) -> Outcomes:
    """Is at least one positive among the k best? A hit rate, not the share of positives found (true recall)."""
    # Slots of the k that are left for the items level with the best positive; none, where k items are above it.
    slots = k - ranks.above
    # All ties lost: the e negatives that are level with it take slots before it.
    strict = ranks.above + ranks.tied < k
    # All ties won: one slot left is enough.
    optimistic = ranks.above < k
    # Ties broken at random: the chance that none of the m level positives, of e + m level items, gets one of the
    # slots is C(e, slots) / C(e + m, slots), a product with one factor a slot.
    miss = np.ones(len(slots))
    level = ranks.tied + ranks.tied_positives
    for drawn in range(k):
        # The next slot goes to a negative: of those and of all level items, `drawn` have theirs already.
        factor = np.maximum(ranks.tied - drawn, 0) / np.maximum(level - drawn, 1)
        miss = np.where(drawn < slots, miss * factor, miss)
    return Outcomes(strict.astype(np.float64), 1.0 - miss, optimistic.astype(np.float64))


def all_above(wanted: np.ndarray, unwanted: np.ndarray) -> Outcomes:
    """Are all `wanted` scores [N, A] above all `unwanted` scores [N, B] of their row?

    One against one is SugarCrepe; two captions against one negative is SugarCrepe++ (ITT), one pair against two is TOT;
    two matches against two mismatches is Winoground's group score.
    """
    lowest, highest = wanted.min(axis=1), unwanted.max(axis=1)
    strict = lowest > highest
    level = lowest == highest
    num_wanted = np.count_nonzero(wanted == lowest[:, None], axis=1)
    num_unwanted = np.count_nonzero(unwanted == lowest[:, None], axis=1)
    # The p wanted ones level with q unwanted ones come first in 1 of C(p + q, p) random orders.
    orders = np.ones(len(lowest))
    for drawn in range(wanted.shape[1]):
        step = (num_unwanted + num_wanted - drawn) / np.maximum(num_wanted - drawn, 1)
        orders = np.where(drawn < num_wanted, orders * step, orders)
    expected = np.where(level, 1.0 / orders, strict)
    return Outcomes(strict.astype(np.float64), expected, (strict | level).astype(np.float64))


def winoground(scores: np.ndarray) -> dict[str, Outcomes]:
    """Scores [N, caption, image] of N pairs of captions and images -> outcomes of `text`, `image` and `group`.

    Caption 0 belongs to image 0, caption 1 to image 1. text: for each image the right caption wins; image: for each
    caption the right image wins; group: both (Thrush et al. 2022).
    """
    s00, s01, s10, s11 = (scores[:, caption, image, None] for caption in (0, 1) for image in (0, 1))
    text = _both(all_above(s00, s10), all_above(s11, s01))
    image = _both(all_above(s00, s01), all_above(s11, s10))
    group = all_above(np.hstack([s00, s11]), np.hstack([s01, s10]))
    return {"text": text, "image": image, "group": group}


def class_embeddings(embeddings: np.ndarray, prompts: np.ndarray) -> np.ndarray:
    """Prompt embeddings [T, D] and the rows int [C, P] of each class's P prompts -> one unit row per class [C, D].

    Each prompt is normalised, then they are averaged, then the mean is normalised (CLIP's ensemble of templates).
    """
    means = [unit_rows(embeddings[rows]).mean(axis=0, dtype=np.float64) for rows in prompts]
    return unit_rows(np.stack(means))


def _both(first: Outcomes, second: Outcomes) -> Outcomes:
    """Success in two comparisons that share no score, so that their ties are independent."""
    return Outcomes(*(a * b for a, b in zip(first, second, strict=True)))


def _similarity_blocks(queries: np.ndarray, gallery: np.ndarray, block: int) -> Iterator[tuple[slice, np.ndarray]]:
    """Cosines of `block` queries at a time against the whole gallery, float32 [<= block, G], with the rows they are."""
    block = max(1, block // (queries[0].size // queries.shape[-1]) // (gallery[0].size // gallery.shape[-1]))
    # A matrix product may round a column differently by its position, which would break the ties between equal items.
    first: dict[bytes, int] = {}
    original = np.array([first.setdefault(sha1(row).digest(), number) for number, row in enumerate(gallery)])
    copies = np.flatnonzero(original != np.arange(len(gallery)))
    for start in range(0, len(queries), block):
        part = slice(start, start + block)
        scores = _similarities(queries[part], gallery)
        scores[:, copies] = scores[:, original[copies]]
        yield part, scores


def _similarities(queries: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """Cosines of every query with every gallery item, the largest where one of them has P vectors; float32 [Q, G]."""
    products = queries.reshape(-1, queries.shape[-1]) @ gallery.reshape(-1, gallery.shape[-1]).T
    if queries.ndim == gallery.ndim == 2:
        return products
    return products.reshape(len(queries), -1, len(gallery), products.shape[1] // len(gallery)).max(axis=(1, 3))


def _nearest(scores: np.ndarray, keep: int) -> np.ndarray:
    """Columns of the `keep` highest scores of each row, best first, int64 [Q, keep]."""
    keep = min(keep, scores.shape[1])
    if keep == 0:
        return np.empty((len(scores), 0), np.int64)
    columns = np.sort(np.argpartition(-scores, keep - 1, axis=1)[:, :keep], axis=1)
    order = np.argsort(-np.take_along_axis(scores, columns, axis=1), axis=1, kind="stable")
    return np.take_along_axis(columns, order, axis=1)
