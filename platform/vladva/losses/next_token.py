"""Next-token cross-entropy on long captions, without ever holding the logits of all positions.

Letters: B samples, T tokens, N positions with a label, R positions of one chunk, D width, V vocabulary.
"""

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import cross_entropy

IGNORED = -100


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
    return total / _at_least_one(num_tokens)


def next_token_from_logits(logits: Tensor, labels: Tensor, num_tokens: int | Tensor) -> Tensor:
    """The same from logits [B, T, V]: the plain definition."""
    logits_NV, targets_N = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    exact = torch.promote_types(logits.dtype, torch.float32)
    total = cross_entropy(logits_NV.to(exact), targets_N, ignore_index=IGNORED, reduction="sum")
    return total / _at_least_one(num_tokens)


def cross_entropy_sum(hidden: Tensor, weight: Tensor, targets: Tensor, *, chunk_size: int = 512) -> Tensor:
    """Cross-entropy of hidden [N, D] times weight [V, D] transposed at targets int64 [N], summed; 0 for N = 0."""
    return _CrossEntropySum.apply(hidden, weight, targets, chunk_size)


def _at_least_one(num_tokens: int | Tensor) -> int | Tensor:
    """A global batch without a long caption has the loss 0 / 1."""
    return num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)


class _CrossEntropySum(torch.autograd.Function):
    """The gradients are computed in forward, while a chunk's logits are there.

    That saves building them a second time, and backward needs no LM head, which ZeRO-3 may have partitioned again.
    """

    @staticmethod
    def forward(ctx: FunctionCtx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_size: int) -> Tensor:
        exact = torch.promote_types(hidden_ND.dtype, torch.float32)  # softmax and sums of bfloat16, too, in float32
        grad_hidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=exact) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=exact, device=hidden_ND.device)
        for start in range(0, len(hidden_ND), chunk_size):
            part = slice(start, start + chunk_size)
            target_R1 = targets_N[part, None]
            logits_RV = (hidden_ND[part] @ weight_VD.T).to(exact)
            lse_R1 = logits_RV.logsumexp(1, keepdim=True)
            total += (lse_R1 - logits_RV.gather(1, target_R1)).sum()
            if any(ctx.needs_input_grad):
                grad_RV = logits_RV.sub_(lse_R1).exp_().scatter_add_(1, target_R1, torch.full_like(lse_R1, -1))
                grad_RV = grad_RV.to(hidden_ND.dtype)
            if grad_hidden_ND is not None:
                grad_hidden_ND[part] = grad_RV @ weight_VD
            if grad_weight_VD is not None:
                grad_weight_VD += grad_RV.T @ hidden_ND[part]
        ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        grad_hidden_ND = None if grad_hidden_ND is None else grad_hidden_ND * grad
        grad_weight_VD = None if grad_weight_VD is None else (grad_weight_VD * grad).to(ctx.weight_dtype)
        return grad_hidden_ND, grad_weight_VD, None, None
