"""Which pairs take part in a contrastive loss, and which texts are negatives of which images.

Shared by the losses over a global batch of image-text pairs. Letters used here and in those losses:
G pairs of the global batch, P pairs among them that take part, H hard-negative captions, C = P + H text columns,
R rows of one chunk, D embedding width. Matrices over P x C are only ever built R rows at a time.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

# Rounding makes a vector of 8,192 numbers longer by 46 at most: (4,000 + 46)^2 < 2^24. Cosines are off by 0.0003.
TEACHER_NORM = 4_000


class PairLoss(NamedTuple):
    """What a contrastive loss returns; each a 0-d tensor, all but `loss` without gradient.

    accuracy: share of anchors more similar to their positive than to each of their negatives (a tie is a miss), among
        the anchors that have negatives; NaN where none has.
    effective_negatives: mean number of negatives an anchor is compared with. Both are averaged over the directions.
    image_recall, text_recall: the accuracy of images finding their texts, and of texts finding their images.
    duplicates: number of combinations of image and text left out because they belong to duplicates of one pair.
    false_negatives: number of further combinations left out because a teacher finds their captions too similar.
    """

    loss: Tensor
    accuracy: Tensor
    effective_negatives: Tensor
    duplicates: Tensor
    image_recall: Tensor
    text_recall: Tensor
    false_negatives: Tensor


@dataclass(frozen=True)
class Pairs:
    """The pairs that take part.

    images: [P, D]. texts: [C, D]; text p < P is the caption of image p, those after P are hard negatives.
    image_keys, caption_keys: int64 [P]. negative_keys: int64 [H].
    share: the pairs whose rows, and columns, a loss is taken of; None for all. The shares of several workers add up.
    teacher: float32 [P, E], a teacher's vectors of the captions, in whole numbers (`to_teacher_numbers`), so that their
        products are exact, in whatever order a device adds them up.
    too_similar: the product from which on two captions say the same, and are no negatives of each other's images.
    """

    images: Tensor
    texts: Tensor
    image_keys: Tensor | None
    caption_keys: Tensor | None
    negative_keys: Tensor | None
    share: range | None = None
    teacher: Tensor | None = None
    too_similar: float = math.inf

    def __len__(self) -> int:
        return len(self.images)

    @property
    def anchors(self) -> range:
        """The pairs whose images, and texts, look for each other here."""
        return range(len(self)) if self.share is None else self.share

    def excluded(self, rows: range) -> Tensor | None:
        """Bool [R, C]: the texts that are no negatives of these images though of other pairs; None where all are.

        Duplicates, and pairs whose captions the teacher finds too similar. Hard negatives are wrong on purpose, however
        similar they are: of them only those with the very caption are left out.
        """
        excluded_RC, similar_RP = self.duplicates(rows), self.similar(rows)
        if similar_RP is None:
            return excluded_RC
        if excluded_RC is None:
            excluded_RC = self.images.new_zeros(len(rows), len(self.texts), dtype=torch.bool)
        excluded_RC[:, : len(self)] |= similar_RP
        return excluded_RC

    def similar(self, rows: range) -> Tensor | None:
        """Bool [R, P]: the other pairs whose captions the teacher finds too similar to these; None without one."""
        if self.teacher is None:
            return None
        similar_RP = self.teacher[rows.start : rows.stop] @ self.teacher.T >= self.too_similar
        similar_RP.diagonal(offset=rows.start).fill_(False)  # the positive itself
        return similar_RP

    def duplicates(self, rows: range) -> Tensor | None:
        """Bool [R, C]: the texts of other pairs that have the image, or the caption, of these; None without keys."""
        if self.image_keys is None and self.caption_keys is None:
            return None
        num_pairs, part = len(self), slice(rows.start, rows.stop)
        duplicates_RC = self.images.new_zeros(len(rows), len(self.texts), dtype=torch.bool)
        for keys_P in (self.image_keys, self.caption_keys):
            if keys_P is not None:
                duplicates_RC[:, :num_pairs] |= keys_P[part, None] == keys_P
        if self.caption_keys is not None and self.negative_keys is not None:
            duplicates_RC[:, num_pairs:] = self.caption_keys[part, None] == self.negative_keys
        duplicates_RC.diagonal(offset=rows.start).fill_(False)  # the positive itself
        return duplicates_RC

    def first_dimensions(self, width: int) -> "Pairs":
        """The same pairs by the first `width` coordinates, normalised again (Matryoshka, arXiv 2205.13147)."""
        full = self.images.shape[1]
        if not 0 < width < full:
            raise ValueError(f"dims: {width} is not between 0 and the embedding width {full}; leave it out")
        images_PD, texts_CD = (normalize(x[:, :width], dim=-1) for x in (self.images, self.texts))
        return replace(self, images=images_PD, texts=texts_CD)


def select_pairs(
    images: Tensor,
    texts: Tensor,
    *,
    valid: Tensor | None = None,
    image_keys: Tensor | None = None,
    caption_keys: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_owners: Tensor | None = None,
    negative_keys: Tensor | None = None,
    teacher: Tensor | None = None,
    false_negatives_above: float = 1.0,
) -> Pairs:
    """Leaves out pairs that are not `valid`, with their hard negatives; appends the other hard negatives to the texts.

    images, texts: [G, D], L2-normalised, float32 or float64.
    valid: bool [G], False where a pair has no short caption.
    image_keys, caption_keys: int64 [G]; pairs that share a key are duplicates.
    negatives: [G, N, D], N for each pair, or [H, D] with negative_owners int64 [H], the pair each one was made for.
    negative_keys: int64 [G, N] or [H], their caption keys: such a text is no negative of a pair with that very caption.
    teacher: [G, E], a teacher's vectors of the captions in whole numbers; 0 where it has none.
    false_negatives_above: cosine of these from which on pairs are no negatives of each other.
    """
    assert images.shape == texts.shape, (images.shape, texts.shape)
    assert images.dtype in (torch.float32, torch.float64), images.dtype
    if negatives is not None and negatives.ndim == 3:
        negative_owners = torch.arange(len(negatives), device=images.device).repeat_interleave(negatives.shape[1])
        negatives = negatives.flatten(0, 1)
        negative_keys = None if negative_keys is None else negative_keys.flatten()
    if valid is not None:
        index_P = valid.nonzero().squeeze(1)
        images, texts = images[index_P], texts[index_P]
        image_keys, caption_keys = (keys if keys is None else keys[index_P] for keys in (image_keys, caption_keys))
        teacher = None if teacher is None else teacher[index_P]
        if negatives is not None:
            assert negative_owners is not None, "hard negatives [H, D] need negative_owners [H]"
            index_H = valid[negative_owners].nonzero().squeeze(1)
            negatives = negatives[index_H]
            negative_keys = None if negative_keys is None else negative_keys[index_H]
    texts_CD = texts if negatives is None else torch.cat([texts, negatives])
    too_similar = false_negatives_above * TEACHER_NORM**2
    return Pairs(images, texts_CD, image_keys, caption_keys, negative_keys, teacher=teacher, too_similar=too_similar)


def to_teacher_numbers(vectors: Tensor) -> Tensor:
    """Vectors [N, E] as int16, TEACHER_NORM long: sums of their products are below 2^24, exact in float32."""
    return (normalize(vectors.float(), dim=-1) * TEACHER_NORM).round().to(torch.int16)


def row_chunks(rows: range, chunk_size: int) -> Iterator[range]:
    """Consecutive ranges of at most `chunk_size` rows; the last may be shorter."""
    for start in range(rows.start, rows.stop, chunk_size):
        yield range(start, min(start + chunk_size, rows.stop))


def add_nothing(values: Tensor) -> Tensor:
    """The sum over the shares where there is one: `values` itself."""
    return values


@torch.no_grad()
def pair_statistics(
    pairs: Pairs, *, symmetric: bool, chunk_size: int, add_up: Callable[[Tensor], Tensor] = add_nothing
) -> tuple[Tensor, ...]:
    """All of PairLoss but the loss, in its order; without pairs, or without negatives, the shares are NaN.

    add_up: adds up numbers, int64 [8], over the workers whose shares of the pairs these are.
    """
    num_pairs, num_texts = len(pairs), len(pairs.texts)
    of_images = _counts(pairs.images, pairs.texts, pairs, chunk_size)
    of_texts = _counts(pairs.texts[:num_pairs], pairs.images, pairs, chunk_size)
    image_counts, text_counts = add_up(torch.cat([of_images, of_texts])).view(2, 4)
    image_hits, images_asked, duplicates, similar = image_counts
    text_hits, texts_asked, duplicate_captions, _ = text_counts
    hits, asked = image_hits, images_asked
    negatives = (num_pairs * (num_texts - 1) - duplicates - similar) / max(num_pairs, 1)
    if symmetric:
        hits, asked = hits + text_hits, asked + texts_asked
        candidates = num_pairs * (num_pairs - 1) - duplicate_captions - similar
        negatives = (negatives + candidates / max(num_pairs, 1)) / 2
    return hits / asked, negatives, duplicates, image_hits / images_asked, text_hits / texts_asked, similar


def _counts(x_PD: Tensor, y_KD: Tensor, pairs: Pairs, chunk_size: int) -> Tensor:
    """Of the share's rows of X, int64 [4]: those nearer to their own row of Y than to every negative, those that have a
    negative at all, the combinations left out because they are duplicates, and those left out by the teacher alone.
    """
    counts_4 = torch.zeros(4, dtype=torch.int64, device=x_PD.device)
    for rows in row_chunks(pairs.anchors, chunk_size):
        similarity_RK = x_PD[rows.start : rows.stop] @ y_KD.T
        positives_R = similarity_RK.diagonal(offset=rows.start).clone()
        # What is no negative can win nothing: duplicates, false negatives, and the positive itself.
        duplicates_RC, similar_RP = pairs.duplicates(rows), pairs.similar(rows)
        if duplicates_RC is not None:
            duplicates_RK = duplicates_RC[:, : len(y_KD)]
            similarity_RK.masked_fill_(duplicates_RK, -torch.inf)
            counts_4[2] += duplicates_RK.sum()
        if similar_RP is not None:
            if duplicates_RC is not None:
                similar_RP &= ~duplicates_RC[:, : len(pairs)]
            similarity_RK[:, : len(pairs)].masked_fill_(similar_RP, -torch.inf)
            counts_4[3] += similar_RP.sum()
        similarity_RK.diagonal(offset=rows.start).fill_(-torch.inf)
        best_R = similarity_RK.amax(1)
        has_negatives_R = best_R > -torch.inf
        counts_4[0] += ((positives_R > best_R) & has_negatives_R).sum()
        counts_4[1] += has_negatives_R.sum()
    return counts_4
