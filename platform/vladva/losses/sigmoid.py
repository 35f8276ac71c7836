"""The sigmoid loss of SigLIP (arXiv 2303.15343) over the global batch, a few rows at a time.

    L = -1/P sum_ij log sigmoid(z_ij (t I_i T_j + b)),   z = 1 at pairs, -1 elsewhere

A share of the pairs is their images' rows. Each block of rows is checkpointed: nothing of size G x G outlives its
block, and backward builds the block again.
Letters: see pairs.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint

from vladva.losses.contrastive import ROWS, ContrastiveLoss, Scalar
from vladva.losses.pairs import Pairs, row_chunks


@dataclass(frozen=True)
class Sigmoid(ContrastiveLoss):
    """The sum over all combinations of image and text of their binary cross-entropy, per pair.

    Duplicates count neither as pairs nor as negatives. The paper starts temperature and bias at 0.1 and -10.
    """

    bias: float = -10.0
    """Where the bias starts; it is learned."""

    def scalars(self) -> dict[str, Scalar]:
        """Logarithm of the scale t, and the bias b."""
        return {"log_scale": Scalar(-math.log(self.temperature), self.learn_temperature), "bias": Scalar(self.bias)}

    def __call__(self, pairs: Pairs, scalars: Mapping[str, Tensor], *, chunk_size: int = ROWS) -> Tensor:
        """The loss; see `ContrastiveLoss`."""
        scaled_PD = pairs.images * scalars["log_scale"].exp()
        loss = (scaled_PD.sum() + pairs.texts.sum()) * 0  # keeps the graph when no pair takes part
        for rows in row_chunks(pairs.anchors, chunk_size):
            arguments = (scaled_PD, pairs.texts, scalars["bias"], pairs, rows)
            loss = loss + checkpoint(_sum_of_rows, *arguments, use_reentrant=False, preserve_rng_state=False)
        return loss / max(len(pairs), 1)


LOSS = Sigmoid


def _sum_of_rows(scaled_PD: Tensor, texts_CD: Tensor, bias: Tensor, pairs: Pairs, rows: range) -> Tensor:
    logits_RC = scaled_PD[rows.start : rows.stop] @ texts_CD.T + bias
    logits_RC.diagonal(offset=rows.start).neg_()  # -log sigmoid(x) = softplus(-x) at pairs, softplus(x) elsewhere
    losses_RC = softplus(logits_RC)
    excluded_RC = pairs.excluded(rows)
    return losses_RC.sum() if excluded_RC is None else losses_RC.masked_fill(excluded_RC, 0).sum()
