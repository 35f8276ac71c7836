"""The global batch: the embeddings of all ranks' chunks, and which of them belong together.

b pairs a chunk, n hard negatives in it, G pairs and H hard negatives in the global batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from vladva.losses.pairs import Pairs, select_pairs
from vladva.train.collectives import gather, gather_ragged, rank_and_world

if TYPE_CHECKING:
    from vladva.models.batch import MicroBatch


@dataclass
class GlobalBatch:
    """What is known of the rows of gathered matrices: of G pairs, and of H hard-negative captions if there are any."""

    images: Tensor  # [G, D]
    texts: Tensor  # [G, D]
    valid: Tensor  # bool [G]
    image_keys: Tensor  # [G]
    caption_keys: Tensor  # [G]
    negatives: Tensor | None = None  # [H, D]
    negative_owners: Tensor | None = None  # [H]
    negative_keys: Tensor | None = None  # [H]
    teacher: Tensor | None = None  # float32 [G, E] of whole numbers, where a teacher has embedded the captions
    own: range | None = None  # the pairs of this rank, where each computes its share of the loss

    def pairs(self, *, mask_duplicates: bool, false_negatives_above: float | None = None) -> Pairs:
        """The pairs that take part; those with the same image or caption are negatives of each other or not.

        Where there is a limit, those are none either whose captions have at least that cosine, by the teacher.
        """
        pairs = select_pairs(
            self.images,
            self.texts,
            valid=self.valid,
            image_keys=self.image_keys if mask_duplicates else None,
            caption_keys=self.caption_keys if mask_duplicates else None,
            negatives=self.negatives,
            negative_owners=self.negative_owners,
            negative_keys=self.negative_keys if mask_duplicates else None,
            teacher=None if false_negatives_above is None else self.teacher,
            false_negatives_above=1.0 if false_negatives_above is None else false_negatives_above,
        )
        if self.own is None:
            return pairs
        before, until = (int(self.valid[:end].sum()) for end in (self.own.start, self.own.stop))
        return replace(pairs, share=range(before, until))


def gather_batch(
    chunks: Sequence[MicroBatch], images: Sequence[Tensor], texts: Sequence[Tensor], *, shared: bool = False
) -> GlobalBatch:
    """The global batch from each local chunk's images [b, D] and texts [b + n, D].

    Rows are ordered by rank, then by chunk, the hard negatives after all captions.
    shared: each rank computes its share of the loss; the gradients of its embeddings are then summed over all ranks.
    """
    device = images[0].device
    counts = [len(chunk.image_keys) for chunk in chunks]
    # Pairs are numbered over all ranks: the first of this rank follows the last of the rank before.
    first = int(gather(torch.tensor([sum(counts)], device=device))[: rank_and_world()[0]].sum())
    own = range(first, first + sum(counts)) if shared else None
    owners = []
    for chunk, count in zip(chunks, counts, strict=True):
        owners.append(chunk.text_owners + first)
        first += count

    def numbers(arrays: Sequence[np.ndarray]) -> Tensor:
        """Of all ranks, by one copy to the device."""
        return gather_ragged(torch.from_numpy(np.concatenate(arrays).astype(np.int64)).to(device, non_blocking=True))

    def captions(columns: Sequence[Tensor], *, summed: bool = False) -> Tensor:
        local = torch.cat([column[:count] for column, count in zip(columns, counts, strict=True)])
        return gather_ragged(local, summed=summed)

    def negatives(columns: Sequence[Tensor], *, summed: bool = False) -> Tensor:
        local = torch.cat([column[count:] for column, count in zip(columns, counts, strict=True)])
        return gather_ragged(local, summed=summed)

    batch = GlobalBatch(
        images=gather_ragged(torch.cat(list(images)), summed=shared),
        texts=captions(texts, summed=shared),
        valid=numbers([chunk.has_short for chunk in chunks]).bool(),
        image_keys=numbers([chunk.image_keys for chunk in chunks]),
        caption_keys=numbers([chunk.caption_keys[:count] for chunk, count in zip(chunks, counts, strict=True)]),
        own=own,
    )
    vectors = [chunk.teacher for chunk in chunks if chunk.teacher is not None]
    if vectors:
        batch.teacher = gather_ragged(torch.from_numpy(np.concatenate(vectors).astype(np.float32)).to(device))
    owners_H = numbers([column[count:] for column, count in zip(owners, counts, strict=True)])
    if len(owners_H):
        batch.negatives, batch.negative_owners = negatives(texts, summed=shared), owners_H
        batch.negative_keys = numbers([chunk.caption_keys[n:] for chunk, n in zip(chunks, counts, strict=True)])
    return batch
