"""The global batch: the embeddings of all ranks' chunks, and which of them belong together.

b pairs a chunk, n hard negatives in it, G pairs and H hard negatives in the global batch, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

    def pairs(self, *, mask_duplicates: bool) -> Pairs:
        """The pairs that take part; those with the same image or caption are negatives of each other or not."""
        return select_pairs(
            self.images,
            self.texts,
            valid=self.valid,
            image_keys=self.image_keys if mask_duplicates else None,
            caption_keys=self.caption_keys if mask_duplicates else None,
            negatives=self.negatives,
            negative_owners=self.negative_owners,
            negative_keys=self.negative_keys if mask_duplicates else None,
        )


def gather_batch(chunks: Sequence[MicroBatch], images: Sequence[Tensor], texts: Sequence[Tensor]) -> GlobalBatch:
    """The global batch from each local chunk's images [b, D] and texts [b + n, D].

    Rows are ordered by rank, then by chunk, the hard negatives after all captions.
    """
    device = images[0].device
    counts = [len(chunk.image_keys) for chunk in chunks]
    # Pairs are numbered over all ranks: the first of this rank follows the last of the rank before.
    first = int(gather(torch.tensor([sum(counts)], device=device))[: rank_and_world()[0]].sum())
    keys, owners = [], []
    for chunk, count in zip(chunks, counts, strict=True):
        keys.append(torch.tensor(chunk.caption_keys, device=device))
        owners.append(torch.tensor(chunk.text_owners, device=device) + first)
        first += count

    def captions(columns: Sequence[Tensor]) -> Tensor:
        return gather_ragged(torch.cat([column[:count] for column, count in zip(columns, counts, strict=True)]))

    def negatives(columns: Sequence[Tensor]) -> Tensor:
        return gather_ragged(torch.cat([column[count:] for column, count in zip(columns, counts, strict=True)]))

    batch = GlobalBatch(
        images=gather_ragged(torch.cat(list(images))),
        texts=captions(texts),
        valid=gather_ragged(torch.cat([torch.tensor(c.has_short, device=device) for c in chunks]).long()).bool(),
        image_keys=gather_ragged(torch.cat([torch.tensor(c.image_keys, device=device) for c in chunks])),
        caption_keys=captions(keys),
    )
    owners_H = negatives(owners)
    if len(owners_H):
        batch.negatives, batch.negative_owners, batch.negative_keys = negatives(texts), owners_H, negatives(keys)
    return batch
