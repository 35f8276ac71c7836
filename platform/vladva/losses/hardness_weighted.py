"""InfoNCE in which a negative counts for more the harder it is (arXiv 2010.04592, 2503.04812), a few rows at a time.

    L = 1/P sum_p log(1 + sum_j w_pj exp(t (s_pj - s_pp))),    w_pj = N_p exp(h s_pj) / sum_k exp(h s_pk)

over the N_p negatives of anchor p. The weights have a mean of 1, so that h moves weight between negatives and adds
none, and no gradient: they say how much a negative counts, and are nothing to be learned. Near h = 0 this is InfoNCE.

Two sums over the negatives of an anchor are all that forward keeps of it, besides its positive:

    A_p = log sum_j exp((h + t) s_pj - t s_pp),   B_p = log sum_j exp(h s_pj),   L_p = log(1 + exp(log N_p + A_p - B_p))

Images that look for texts and texts that look for images are two passes: the weights of a column would be known only
after all rows. Letters: see pairs.py.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from vladva.losses.contrastive import ROWS
from vladva.losses.info_nce import InfoNCE, pair_logits
from vladva.losses.pairs import Pairs, row_chunks


@dataclass(frozen=True)
class HardnessWeighted(InfoNCE):
    """InfoNCE whose negatives are weighted by their similarity to the anchor, exp(hardness * similarity)."""

    hardness: float = 5.0
    """h: a negative with a similarity higher by 0.1 counts exp(h / 10) times as much."""

    def __post_init__(self) -> None:
        if self.hardness <= 0:
            raise ValueError(f"loss.options: hardness is {self.hardness}; it must be positive (at 0 it is info_nce)")

    def __call__(self, pairs: Pairs, scalars: Mapping[str, Tensor], *, chunk_size: int = ROWS) -> Tensor:
        """The loss; see `ContrastiveLoss`."""
        scale = self.scale(scalars)
        scaled_PD = pairs.images * scale
        # Of scaled similarities: the same weights, without a graph to the temperature.
        hardness = self.hardness / (scale.detach() if isinstance(scale, Tensor) else scale)
        loss = _WeightedRows.apply(scaled_PD, pairs.texts, hardness, pairs, chunk_size).sum()
        if self.symmetric:
            texts_PD = pairs.texts[: len(pairs)]
            loss = (loss + _WeightedRows.apply(texts_PD, scaled_PD, hardness, pairs, chunk_size).sum()) / 2
        return loss / max(len(pairs), 1)

    def block_bytes(self, pairs: int, texts: int) -> int:
        """See `ContrastiveLoss`: logits, weighted logits, and what the sum over them makes."""
        return 4 * ROWS * max(pairs, texts) * 4


LOSS = HardnessWeighted


class _WeightedRows(torch.autograd.Function):
    """X [P, D], Y [K, D] -> [S]: L_p for the pairs p of a worker's share (all, where there is none).

    X are images and Y texts, or X the texts of the pairs and Y their images.
    """

    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, y_KD: Tensor, hardness: Tensor | float, pairs: Pairs, chunk_size: int
    ) -> Tensor:
        positives_P = (x_PD * y_KD[: len(x_PD)]).sum(-1)
        excess_S, sums_S = (x_PD.new_empty(len(pairs.anchors)) for _ in range(2))
        for rows in row_chunks(pairs.anchors, chunk_size):
            of_share = slice(rows.start - pairs.anchors.start, rows.stop - pairs.anchors.start)
            logits_RK = _negative_logits(x_PD, y_KD, positives_P, pairs, rows)
            count_R = logits_RK.isfinite().sum(1).to(logits_RK.dtype)
            weights_R = (logits_RK * hardness).logsumexp(1)  # B
            logits_RK.mul_(1 + hardness).sub_(positives_P[rows.start : rows.stop, None])
            sums_R = logits_RK.logsumexp(1)  # A
            # An anchor without negatives has nothing to be told from: its loss is 0, log(1 + exp(-inf)).
            excess_S[of_share] = torch.where(count_R > 0, count_R.log() + sums_R - weights_R, -torch.inf)
            sums_S[of_share] = torch.where(count_R > 0, sums_R, 0.0)
        ctx.save_for_backward(x_PD, y_KD, positives_P, excess_S, sums_S)
        ctx.hardness, ctx.pairs, ctx.chunk_size = hardness, pairs, chunk_size
        return softplus(excess_S)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        x_PD, y_KD, positives_P, excess_S, sums_S = ctx.saved_tensors
        grad_x_PD, grad_y_KD = torch.zeros_like(x_PD), torch.zeros_like(y_KD)
        first = ctx.pairs.anchors.start
        for rows in row_chunks(ctx.pairs.anchors, ctx.chunk_size):
            part, of_share = slice(rows.start, rows.stop), slice(rows.start - first, rows.stop - first)
            logits_RK = _negative_logits(x_PD, y_KD, positives_P, ctx.pairs, rows)
            # dL_p / d(t s_pj): its part of the sum A_p, times what of the loss is not the positive's.
            grad_R = grad_S[of_share] * excess_S[of_share].sigmoid()
            logits_RK.mul_(1 + ctx.hardness).sub_((positives_P[part] + sums_S[of_share])[:, None])
            grad_RK = logits_RK.exp_().mul_(grad_R[:, None])
            grad_RK.diagonal(offset=rows.start).sub_(grad_R)
            grad_x_PD[part] = grad_RK @ y_KD
            grad_y_KD.addmm_(grad_RK.T, x_PD[part])
        return grad_x_PD, grad_y_KD, None, None, None


def _negative_logits(x_PD: Tensor, y_KD: Tensor, positives_P: Tensor, pairs: Pairs, rows: range) -> Tensor:
    """These rows of X Y^t [R, K], -inf at what is no negative, the positive itself included."""
    logits_RK = pair_logits(x_PD, y_KD, positives_P, pairs, rows)
    logits_RK.diagonal(offset=rows.start).fill_(-torch.inf)
    return logits_RK
