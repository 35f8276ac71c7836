"""Next-token cross-entropy on long captions, without ever holding the logits of all positions.

Letters: B samples, T tokens, N positions with a label, R positions of one chunk, D width, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, pad

IGNORED = -100
MULTIPLE = 32  # of rows: a CPU compiles its products for every number of them


def next_token(
    hidden: Tensor, weight: Tensor, labels: Tensor, num_tokens: int | Tensor, *, chunk_size: int = 512
) -> Tensor:
    """This part's share of the mean loss over all caption tokens of the global batch; the shares add up to that mean.

    hidden: [B, T, D], after the model's final norm.
    weight: [V, D], of the LM head.
    labels: [B, T] in Hugging Face's convention: the token ids at their own positions (hidden state t is scored against
        label t + 1), -100 where nothing is to be predicted.
    num_tokens: positions with a label in the whole global batch.
    chunk_size: positions whose logits are held at once.
    """
    targets_BT = labels[:, 1:]
    index_N = (targets_BT != IGNORED).flatten().nonzero().squeeze(1)
    hidden_ND = hidden[:, :-1].reshape(-1, hidden.shape[-1])[index_N]
    total = cross_entropy_sum(hidden_ND, weight, targets_BT.flatten()[index_N], chunk_size=chunk_size)
    return mean_share(total, num_tokens)


def next_token_from_logits(logits: Tensor, labels: Tensor, num_tokens: int | Tensor) -> Tensor:
    """The same from logits [B, T, V]: the plain definition."""
    logits_NV, targets_N = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    exact = torch.promote_types(logits.dtype, torch.float32)
    total = cross_entropy(logits_NV.to(exact), targets_N, ignore_index=IGNORED, reduction="sum")
    return total / _at_least_one(num_tokens)


def cross_entropy_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    replaced: tuple[Tensor, Tensor] | None = None,
    chunk_size: int = 512,
) -> Tensor:
    """Cross-entropy of hidden [N, D] times weight [V, D] transposed at targets int64 [N], summed; 0 for N = 0.

    replaced: int64 [S] and [S, D]; rows of the weight, and what stands in their stead. Where those are all that is
        trained of a large weight, it needs no gradient as large as itself.
    """
    rows_S, rows_SD = replaced or (None, None)
    return _CrossEntropySum.apply(hidden, weight, targets, rows_S, rows_SD, chunk_size)


def mean_share(total: Tensor, num_tokens: int | Tensor) -> Tensor:
    """A part's sum as its share of the mean over the global batch."""
    return total / _at_least_one(num_tokens)


def _at_least_one(num_tokens: int | Tensor) -> int | Tensor:
    """A global batch without a long caption has the loss 0 / 1."""
    return num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)


class _CrossEntropySum(torch.autograd.Function):
    """The gradients are computed in forward, while a chunk's logits are there.

    That saves building them a second time, and backward needs no LM head, which ZeRO-3 may have partitioned again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        rows_S: Tensor | None,
        rows_SD: Tensor | None,
        chunk_size: int,
    ) -> Tensor:
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)  # softmax and sums of bfloat16, too, in float32
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if ctx.needs_input_grad[1] else None
        own_SD = grad_rows_SD = None
        if rows_SD is not None:
            own_SD = rows_SD.to(hidden_ND.dtype)
            grad_rows_SD = torch.zeros_like(rows_SD, dtype=exact) if ctx.needs_input_grad[4] else None
        total = torch.zeros((), dtype=exact, device=hidden_ND.device)
        count, filling = len(hidden_ND), -len(hidden_ND) % MULTIPLE  # rows of zeros add nothing to a gradient
        hidden_ND, targets_N = pad(hidden_ND, (0, 0, 0, filling)), pad(targets_N, (0, filling))
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden_ND), chunk_size):
            part = slice(start, start + chunk_size)
            target_R1 = targets_N[part, None]
            logits_RV = (hidden_ND[part] @ weight_VD.T).to(exact)
            if own_SD is not None:
                logits_RV[:, rows_S] = (hidden_ND[part] @ own_SD.T).to(exact)
            log_shares_RV = logits_RV.log_softmax(1)
            total -= log_shares_RV.gather(1, target_R1)[: max(0, count - start)].sum()
            if not any(ctx.needs_input_grad):
                continue
            grad_RV = log_shares_RV.exp_().scatter_add_(1, target_R1, torch.full_like(target_R1, -1, dtype=exact))
            grad_RV = grad_RV.to(hidden_ND.dtype)
            if own_SD is not None:
                grad_RS = grad_RV[:, rows_S]
                grad_RV[:, rows_S] = 0
            if grad_hidden_ND is not None:
                torch.mm(grad_RV, weight_VD, out=grad_hidden_ND[part])
                if own_SD is not None:
                    grad_hidden_ND[part].addmm_(grad_RS, own_SD)
            if grad_weight_VD is not None:
                grad_weight_VD += grad_RV.T @ hidden_ND[part]
            if grad_rows_SD is not None:
                grad_rows_SD += grad_RS.T @ hidden_ND[part]
        ctx.save_for_backward(None if grad_hidden_ND is None else grad_hidden_ND[:count], grad_weight_VD, grad_rows_SD)
        ctx.dtypes = weight_VD.dtype, None if rows_SD is None else rows_SD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD, grad_rows_SD = ctx.saved_tensors
        grad_hidden_ND = None if grad_hidden_ND is None else grad_hidden_ND * grad
        grad_weight_VD = None if grad_weight_VD is None else (grad_weight_VD * grad).to(ctx.dtypes[0])
        grad_rows_SD = None if grad_rows_SD is None else (grad_rows_SD * grad).to(ctx.dtypes[1])
        return grad_hidden_ND, grad_weight_VD, None, None, grad_rows_SD, None
