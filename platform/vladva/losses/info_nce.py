"""InfoNCE over the global batch, computed a few rows at a time: memory grows with the batch size, not with its square.

    L = 1/2 [CE(t I T^t, 1..P) + CE(t T I^t, 1..P)]        (CLIP, arXiv 2103.00020; one-way: the first half only)

The similarity matrix is never stored. Forward builds it in blocks of rows, keeping one number per row and one per
column; backward builds each block again, turns it into probabilities and multiplies it into the gradients. Values and
gradients are those of the plain formula. Every entry is used relative to the positive of its row (or column), so that
small losses keep their precision at high temperatures. Letters: see pairs.py.
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from vladva.losses.pairs import PairLoss, Pairs, pair_statistics, row_chunks, select_pairs

MAX_SCALE = 100.0


def info_nce(
    images: Tensor,
    texts: Tensor,
    log_scale: Tensor | None = None,
    *,
    temperature: float | None = None,
    symmetric: bool = True,
    valid: Tensor | None = None,
    image_keys: Tensor | None = None,
    caption_keys: Tensor | None = None,
    negatives: Tensor | None = None,
    negative_owners: Tensor | None = None,
    negative_keys: Tensor | None = None,
    dims: tuple[int, ...] = (),
    chunk_size: int = 256,
) -> PairLoss:
    """Mean cross-entropy of finding each image's text among all texts and, if `symmetric`, each text's image as well.

    images, texts: [G, D], L2-normalised, of the whole global batch, the same on every rank; rows of other ranks simply
        carry no gradient.
    log_scale: 0-d; similarities are multiplied by exp(log_scale), at most 100. Above that its gradient is 0, so that
        the trainer should clamp the parameter, too.
    temperature: a fixed temperature instead; similarities are divided by it.
    valid, image_keys, caption_keys, negatives, negative_owners, negative_keys: see select_pairs. A pair that is not
        valid takes no part at all; duplicates are no negatives of each other; hard negatives are more texts for
        every image.
    dims: Matryoshka; the loss is also computed on the first d coordinates for each d, and the mean over these and the
        full width is returned.
    chunk_size: rows of the similarity matrix held at once.
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
    scale = _scale(log_scale, temperature)
    losses = []
    for part in (pairs, *map(pairs.first_dimensions, dims)):
        losses_P = _CrossEntropies.apply(part.images * scale, part.texts, part, symmetric, chunk_size)
        losses.append(losses_P.sum() / max(len(pairs), 1))
    statistics = pair_statistics(pairs, symmetric=symmetric, chunk_size=chunk_size)
    return PairLoss(torch.stack(losses).mean(), *statistics)


def _scale(log_scale: Tensor | None, temperature: float | None) -> Tensor | float:
    if (log_scale is None) == (temperature is None):
        raise ValueError("give either log_scale (learnable) or temperature (fixed), and not both")
    return 1 / temperature if log_scale is None else log_scale.clamp(max=math.log(MAX_SCALE)).exp()


class _CrossEntropies(torch.autograd.Function):
    """X [P, D], Y [C, D] -> [P]: cross-entropy of row p of X Y^t at column p; if symmetric, its mean with column p's.

    Only the first P columns have a positive, hence a cross-entropy.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, x_PD: Tensor, y_CD: Tensor, pairs: Pairs, symmetric: bool, chunk_size: int) -> Tensor:
        num_pairs = len(x_PD)
        positives_P = (x_PD * y_CD[:num_pairs]).sum(-1)
        row_losses_P = torch.empty_like(positives_P)
        column_losses_P = torch.full_like(positives_P, -torch.inf)
        for rows in row_chunks(num_pairs, chunk_size):
            part = slice(rows.start, rows.stop)
            logits_RC = _logits(x_PD, y_CD, positives_P, pairs, rows)
            if symmetric:
                of_these_rows_P = (logits_RC[:, :num_pairs] - positives_P).logsumexp(0)
                column_losses_P = torch.logaddexp(column_losses_P, of_these_rows_P)
            row_losses_P[part] = logits_RC.sub_(positives_P[part, None]).logsumexp(1)
        ctx.save_for_backward(x_PD, y_CD, positives_P, row_losses_P, column_losses_P)
        ctx.pairs, ctx.symmetric, ctx.chunk_size = pairs, symmetric, chunk_size
        return (row_losses_P + column_losses_P) / 2 if symmetric else row_losses_P.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, y_CD, positives_P, row_losses_P, column_losses_P = ctx.saved_tensors
        num_pairs = len(x_PD)
        grad_x_PD, grad_y_CD = torch.empty_like(x_PD), torch.zeros_like(y_CD)
        weights_P = grad_P / 2 if ctx.symmetric else grad_P
        for rows in row_chunks(num_pairs, ctx.chunk_size):
            part = slice(rows.start, rows.stop)
            logits_RC = _logits(x_PD, y_CD, positives_P, ctx.pairs, rows)
            if ctx.symmetric:  # first, because the rows overwrite the logits
                grad_by_columns_RP = (logits_RC[:, :num_pairs] - (positives_P + column_losses_P)).exp_().mul_(weights_P)
            grad_RC = logits_RC.sub_((positives_P + row_losses_P)[part, None]).exp_().mul_(weights_P[part, None])
            if ctx.symmetric:
                grad_RC[:, :num_pairs] += grad_by_columns_RP
            grad_RC.diagonal(offset=rows.start).sub_(grad_P[part])
            grad_x_PD[part] = grad_RC @ y_CD
            grad_y_CD.addmm_(grad_RC.T, x_PD[part])
        return grad_x_PD, grad_y_CD, None, None, None


def _logits(x_PD: Tensor, y_CD: Tensor, positives_P: Tensor, pairs: Pairs, rows: range) -> Tensor:
    """These rows of X Y^t [R, C], -inf at duplicates, positives equal to `positives_P` to the last bit."""
    logits_RC = x_PD[rows.start : rows.stop] @ y_CD.T
    duplicates_RC = pairs.duplicates(rows)
    if duplicates_RC is not None:
        logits_RC.masked_fill_(duplicates_RC, -torch.inf)
    logits_RC.diagonal(offset=rows.start).copy_(positives_P[rows.start : rows.stop])
    return logits_RC
