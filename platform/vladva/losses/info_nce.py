"""InfoNCE over the global batch, computed a few rows at a time: memory grows with the batch size, not with its square.

    L = 1/2 [CE(t I T^t, 1..P) + CE(t T I^t, 1..P)]        (CLIP, arXiv 2103.00020; one-way: the first half only)

The similarity matrix is never stored. Forward builds it in blocks of rows, keeping one number per row and one per
column; backward builds each block again, turns it into probabilities and multiplies it into the gradients. Values and
gradients are those of the plain formula. Every entry is used relative to the positive of its row (or column), so that
small losses keep their precision at high temperatures. Letters: see pairs.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vladva.losses.contrastive import ROWS, ContrastiveLoss, Scalar
from vladva.losses.pairs import Pairs, row_chunks

MAX_SCALE = 100.0


@dataclass(frozen=True)
class InfoNCE(ContrastiveLoss):
    """Mean cross-entropy of finding each image's text among all texts and, if symmetric, each text's image as well.

    Duplicates are no negatives of each other; hard negatives are more texts for every image. Similarities are divided
    by the temperature, or multiplied by exp(log_scale), at most 100.
    """

    directions: Literal["symmetric", "one-way"] = "symmetric"
    """Of images to texts and texts to images, or of the former only."""

    @property
    def symmetric(self) -> bool:  # type: ignore[override]  # a constant of other losses, here a setting
        """Whether texts look for their images, too."""
        return self.directions == "symmetric"

    def scalars(self) -> dict[str, Scalar]:
        """Logarithm of the scale by which similarities are multiplied."""
        start = -math.log(self.temperature)
        return {"log_scale": Scalar(start, self.learn_temperature, highest=math.log(MAX_SCALE))}

    def scale(self, scalars: Mapping[str, Tensor]) -> Tensor | float:
        """What similarities are multiplied by, with a graph where it is learned."""
        if self.learn_temperature:
            return scalars["log_scale"].clamp(max=math.log(MAX_SCALE)).exp()
        return 1 / self.temperature

    def __call__(self, pairs: Pairs, scalars: Mapping[str, Tensor], *, chunk_size: int = ROWS) -> Tensor:
        """The loss; see `ContrastiveLoss`."""
        scaled_PD = pairs.images * self.scale(scalars)
        if pairs.share is None:
            losses_P = _CrossEntropies.apply(scaled_PD, pairs.texts, pairs, self.symmetric, chunk_size)
            return losses_P.sum() / max(len(pairs), 1)
        loss = _RowCrossEntropies.apply(scaled_PD, pairs.texts, pairs, chunk_size).sum()
        if self.symmetric:
            texts_PD = pairs.texts[: len(pairs)]
            loss = (loss + _RowCrossEntropies.apply(texts_PD, scaled_PD, pairs, chunk_size).sum()) / 2
        return loss / max(len(pairs), 1)


LOSS = InfoNCE


class _CrossEntropies(torch.autograd.Function):
    """X [P, D], Y [C, D] -> [P]: cross-entropy of row p of X Y^t at column p; if symmetric, its mean with column p's.

    Only the first P columns have a positive, hence a cross-entropy.
    """

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, y_CD: Tensor, pairs: Pairs, symmetric: bool, chunk_size: int) -> Tensor:
        num_pairs = len(x_PD)
        positives_P = (x_PD * y_CD[:num_pairs]).sum(-1)
        row_losses_P = torch.empty_like(positives_P)
        column_losses_P = torch.full_like(positives_P, -torch.inf)
        for rows in row_chunks(range(num_pairs), chunk_size):
            part = slice(rows.start, rows.stop)
            logits_RC = pair_logits(x_PD, y_CD, positives_P, pairs, rows)
            if symmetric:
                of_these_rows_P = (logits_RC[:, :num_pairs] - positives_P).logsumexp(0)
                column_losses_P = torch.logaddexp(column_losses_P, of_these_rows_P)
            row_losses_P[part] = logits_RC.sub_(positives_P[part, None]).logsumexp(1)
        ctx.save_for_backward(x_PD, y_CD, positives_P, row_losses_P, column_losses_P)
        ctx.pairs, ctx.symmetric, ctx.chunk_size = pairs, symmetric, chunk_size
        return (row_losses_P + column_losses_P) / 2 if symmetric else row_losses_P.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, y_CD, positives_P, row_losses_P, column_losses_P = ctx.saved_tensors
        num_pairs = len(x_PD)
        grad_x_PD, grad_y_CD = torch.empty_like(x_PD), torch.zeros_like(y_CD)
        weights_P = grad_P / 2 if ctx.symmetric else grad_P
        for rows in row_chunks(range(num_pairs), ctx.chunk_size):
            part = slice(rows.start, rows.stop)
            logits_RC = pair_logits(x_PD, y_CD, positives_P, ctx.pairs, rows)
            if ctx.symmetric:  # first, because the rows overwrite the logits
                grad_by_columns_RP = (logits_RC[:, :num_pairs] - (positives_P + column_losses_P)).exp_().mul_(weights_P)
            grad_RC = logits_RC.sub_((positives_P + row_losses_P)[part, None]).exp_().mul_(weights_P[part, None])
            if ctx.symmetric:
                grad_RC[:, :num_pairs] += grad_by_columns_RP
            grad_RC.diagonal(offset=rows.start).sub_(grad_P[part])
            grad_x_PD[part] = grad_RC @ y_CD
            grad_y_CD.addmm_(grad_RC.T, x_PD[part])
        return grad_x_PD, grad_y_CD, None, None, None


class _RowCrossEntropies(torch.autograd.Function):
    """X [P, D], Y [K, D] -> [S]: cross-entropy of row p of X Y^t at column p, for the pairs p of a worker's share.

    X are images and Y texts, or X the texts of the pairs and Y their images. The rows of one worker and its columns
    are two blocks that share only a corner: there is nothing to be had from building them together.
    """

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, y_KD: Tensor, pairs: Pairs, chunk_size: int) -> Tensor:
        positives_P = (x_PD * y_KD[: len(x_PD)]).sum(-1)
        losses_S = x_PD.new_empty(len(pairs.anchors))
        for rows in row_chunks(pairs.anchors, chunk_size):
            logits_RK = pair_logits(x_PD, y_KD, positives_P, pairs, rows)
            losses_R = logits_RK.sub_(positives_P[rows.start : rows.stop, None]).logsumexp(1)
            losses_S[rows.start - pairs.anchors.start : rows.stop - pairs.anchors.start] = losses_R
        ctx.save_for_backward(x_PD, y_KD, positives_P, losses_S)
        ctx.pairs, ctx.chunk_size = pairs, chunk_size
        return losses_S.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, y_KD, positives_P, losses_S = ctx.saved_tensors
        grad_x_PD, grad_y_KD = torch.zeros_like(x_PD), torch.zeros_like(y_KD)
        first = ctx.pairs.anchors.start
        for rows in row_chunks(ctx.pairs.anchors, ctx.chunk_size):
            part, of_share = slice(rows.start, rows.stop), slice(rows.start - first, rows.stop - first)
            logits_RK = pair_logits(x_PD, y_KD, positives_P, ctx.pairs, rows)
            grad_RK = logits_RK.sub_((positives_P[part] + losses_S[of_share])[:, None]).exp_()
            grad_RK.mul_(grad_S[of_share, None])
            grad_RK.diagonal(offset=rows.start).sub_(grad_S[of_share])
            grad_x_PD[part] = grad_RK @ y_KD
            grad_y_KD.addmm_(grad_RK.T, x_PD[part])
        return grad_x_PD, grad_y_KD, None, None


def pair_logits(x_PD: Tensor, y_CD: Tensor, positives_P: Tensor, pairs: Pairs, rows: range) -> Tensor:
    """These rows of X Y^t [R, C], -inf at what is no negative, positives equal to `positives_P` to the last bit."""
    logits_RC = x_PD[rows.start : rows.stop] @ y_CD.T
    excluded_RC = pairs.excluded(rows)
    if excluded_RC is not None:
        logits_RC.masked_fill_(excluded_RC[:, : len(y_CD)], -torch.inf)
    logits_RC.diagonal(offset=rows.start).copy_(positives_P[rows.start : rows.stop])
    return logits_RC
