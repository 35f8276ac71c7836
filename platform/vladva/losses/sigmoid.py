"""The sigmoid loss of SigLIP (arXiv 2303.15343) over the global batch, a few rows at a time.

    L = -1/P sum_ij log sigmoid(z_ij (t I_i T_j + b)),   z = 1 at pairs, -1 elsewhere

Each block of rows is checkpointed: nothing of size G x G outlives its block, and backward builds the block again.
Letters: see pairs.py.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from vladva.losses.pairs import PairLoss, Pairs, pair_statistics, row_chunks, select_pairs


def sigmoid(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    *,
    valid: Tensor | None = None,
    image_keys: Tensor | None = None,
    caption_keys: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_owners: Tensor | None = None,
    negative_keys: Tensor | None = None,
    dims: tuple[int, ...] = (),
    chunk_size: int = 256,
) -> PairLoss:
    """The sum over all combinations of image and text of their binary cross-entropy, per pair.

    images, texts: [G, D], L2-normalised, of the whole global batch.
    log_scale, bias: 0-d; the paper starts them at log 10 and -10.
    The other arguments are those of info_nce; duplicates count neither as pairs nor as negatives.
    """
    pairs = select_pairs(
        images,
        texts,
        valid=valid,
        image_keys=image_keys,
        caption_keys=caption_keys,
        negatives=negatives,
        negative_owners=negative_owners,
        negative_keys=negative_keys,
    )
    losses = []
    for part in (pairs, *map(pairs.first_dimensions, dims)):
        scaled_PD = part.images * log_scale.exp()
        loss = scaled_PD.sum() * 0  # keeps the graph when no pair takes part
        for rows in row_chunks(len(pairs), chunk_size):
            arguments = (scaled_PD, part.texts, bias, part, rows)
            loss = loss + checkpoint(_sum_of_rows, *arguments, use_reentrant=False, preserve_rng_state=False)
        losses.append(loss / max(len(pairs), 1))
    statistics = pair_statistics(pairs, symmetric=True, chunk_size=chunk_size)
    return PairLoss(torch.stack(losses).mean(), *statistics)


def _sum_of_rows(scaled_PD: Tensor, texts_CD: Tensor, bias: Tensor, pairs: Pairs, rows: range) -> Tensor:
    logits_RC = scaled_PD[rows.start : rows.stop] @ texts_CD.T + bias
    logits_RC.diagonal(offset=rows.start).neg_()  # -log sigmoid(x) = softplus(-x) at pairs, softplus(x) elsewhere
    losses_RC = softplus(logits_RC)
    duplicates_RC = pairs.duplicates(rows)
    return losses_RC.sum() if duplicates_RC is None else losses_RC.masked_fill(duplicates_RC, 0).sum()
