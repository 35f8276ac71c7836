"""Which pairs take part in a contrastive loss, and which texts are negatives of which images.

Shared by the losses over a global batch of image-text pairs. Letters used here and in those losses:
G pairs of the global batch, P pairs among them that take part, H hard-negative captions, C = P + H text columns,
R rows of one chunk, D embedding width. Matrices over P x C are only ever built R rows at a time.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize


class PairLoss(NamedTuple):
    """What a contrastive loss returns; each a 0-d tensor, all but `loss` without gradient.

    accuracy: share of anchors more similar to their positive than to each of their negatives (a tie is a miss), among
        the anchors that have negatives; NaN where none has.
    effective_negatives: mean number of negatives an anchor is compared with. Both are averaged over the directions.
    image_recall, text_recall: the accuracy of images finding their texts, and of texts finding their images.
    duplicates: number of combinations of image and text left out because they belong to duplicates of one pair.
    """

    loss: Tensor
    accuracy: Tensor
    effective_negatives: Tensor
    duplicates: Tensor
    image_recall: Tensor
    text_recall: Tensor


@dataclass(frozen=True)
class Pairs:
    """The pairs that take part.

    images: [P, D]. texts: [C, D]; text p < P is the caption of image p, those after P are hard negatives.
    image_keys, caption_keys: int64 [P]. negative_keys: int64 [H].
    """

    images: Tensor
    texts: Tensor
    image_keys: Tensor | None
    caption_keys: Tensor | None
    negative_keys: Tensor | None

    def __len__(self) -> int:
        return len(self.images)

    def duplicates(self, rows: range) -> Tensor | None:
        """Bool [R, C]: the texts that are no negatives of these images though of other pairs; None without keys."""
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
) -> Pairs:
    """Leaves out pairs that are not `valid`, with their hard negatives; appends the other hard negatives to the texts.

    images, texts: [G, D], L2-normalised, float32 or float64.
    valid: bool [G], False where a pair has no short caption.
    image_keys, caption_keys: int64 [G]; pairs that share a key are duplicates.
    negatives: [G, N, D], N for each pair, or [H, D] with negative_owners int64 [H], the pair each one was made for.
    negative_keys: int64 [G, N] or [H], their caption keys: such a text is no negative of a pair with that very caption.
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
        if negatives is not None:
            assert negative_owners is not None, "hard negatives [H, D] need negative_owners [H]"
            index_H = valid[negative_owners].nonzero().squeeze(1)
            negatives = negatives[index_H]
            negative_keys = None if negative_keys is None else negative_keys[index_H]
    texts_CD = texts if negatives is None else torch.cat([texts, negatives])
    return Pairs(images, texts_CD, image_keys, caption_keys, negative_keys)


def row_chunks(num_rows: int, chunk_size: int) -> Iterator[range]:
    """Consecutive ranges of at most `chunk_size` rows; the last may be shorter."""
    for start in range(0, num_rows, chunk_size):
        yield range(start, min(start + chunk_size, num_rows))


@torch.no_grad()
def pair_statistics(pairs: Pairs, *, symmetric: bool, chunk_size: int) -> tuple[Tensor, ...]:
    """All of PairLoss but the loss, in its order; without pairs, or without negatives, the shares are NaN."""
    num_pairs, num_texts = len(pairs), len(pairs.texts)
    positives_P, best_in_row_P, best_in_column_P = pairs.images.new_full((3, num_pairs), -torch.inf)
    num_duplicates, num_duplicate_captions = torch.zeros(2, dtype=torch.int64, device=positives_P.device)
    for rows in row_chunks(num_pairs, chunk_size):
        part = slice(rows.start, rows.stop)
        similarity_RC = pairs.images[part] @ pairs.texts.T
        positives_P[part] = similarity_RC.diagonal(offset=rows.start)
        # What is no negative can win nothing: duplicates, and the positive itself.
        duplicates_RC = pairs.duplicates(rows)
        if duplicates_RC is not None:
            similarity_RC.masked_fill_(duplicates_RC, -torch.inf)
            num_duplicates += duplicates_RC.sum()
            num_duplicate_captions += duplicates_RC[:, :num_pairs].sum()
        similarity_RC.diagonal(offset=rows.start).fill_(-torch.inf)
        # The best negative of each image is known with its row, that of each text with the last row.
        best_in_row_P[part] = similarity_RC.amax(1)
        best_in_column_P = torch.maximum(best_in_column_P, similarity_RC[:, :num_pairs].amax(0))
    hits_of_images, images_asked = _hits(positives_P, best_in_row_P)
    hits_of_texts, texts_asked = _hits(positives_P, best_in_column_P)
    hits, asked = hits_of_images, images_asked
    negatives = (num_pairs * (num_texts - 1) - num_duplicates) / max(num_pairs, 1)
    if symmetric:
        hits, asked = hits + hits_of_texts, asked + texts_asked
        of_texts = (num_pairs * (num_pairs - 1) - num_duplicate_captions) / max(num_pairs, 1)
        negatives = (negatives + of_texts) / 2
    return hits / asked, negatives, num_duplicates, hits_of_images / images_asked, hits_of_texts / texts_asked


def _hits(positives_P: Tensor, best_P: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors nearer to their positive than to their best negative, and anchors that have a negative at all."""
    has_negatives_P = best_P > -torch.inf
    return ((positives_P > best_P) & has_negatives_P).sum(), has_negatives_P.sum()
