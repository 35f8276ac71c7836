"""Autograd operations: what a decoder layer on packed tokens is made of, each with its gradient written out.

Autograd would keep what can be had again cheaply, in float32 at that, and add up a sum for every factor. Here a norm
keeps its input, a gate its two halves, LoRA its few numbers a token; products with the same input make its gradient in
one go. What is frozen (weights, norms) gets no gradient. Without gradients they are plain functions.

N packed tokens, D inputs, O outputs, r LoRA's rank, R = r times the number of layers side by side; [B, T] rows with
padding, H heads of d, K key-value heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention, silu

from vladva.models.packed.decoder import LinearLayer, RMSNorm
from vladva.models.packed.packing import Packed

# --------------------------------------------------------------------------------------------------- linear layers


@dataclass(frozen=True)
class LoraWeights:
    """A frozen linear layer, with its LoRA where it has one."""

    weight: Tensor  # [O, D]
    bias: Tensor | None  # [O]
    down: Tensor | None = None  # [r, D]
    up: Tensor | None = None  # [O, r]
    scale: float = 1.0

    @classmethod
    def of(cls, module: Any) -> LoraWeights:
        """What a layer of torch's or of PEFT's computes as it is now: merged or switched off, LoRA is left out."""
        if isinstance(module, nn.Linear):
            return cls(module.weight, module.bias)
        # One of PEFT's, which has no common type: LoRA around a linear layer.
        base = module.get_base_layer()
        if module.disable_adapters or module.merged:
            assert not (module.disable_adapters and module.merged), "an adapter that is merged cannot be switched off"
            return cls(base.weight, base.bias)
        (name,) = module.active_adapters
        return cls(
            base.weight,
            base.bias,
            module.lora_A[name].weight,
            module.lora_B[name].weight,
            module.scaling[name],
        )


def lora_linear(x_ND: Tensor, *modules: LinearLayer) -> Tensor:
    """The outputs of linear layers with the same input, side by side [N, sum of O].

    LoRA (Hu et al. 2021) is on all of them or on none: y = x W^T + b + scale (x A^T) B^T.
    """
    linears = [LoraWeights.of(module) for module in modules]
    factors = [factor for each in linears if each.down is not None for factor in (each.down, each.up)]
    return _LoraLinear.apply(x_ND, linears, *factors)


class _LoraLinear(Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, linears: list[LoraWeights], *factors: Tensor) -> Tensor:
        y_NO = x_ND.new_empty(len(x_ND), sum(len(each.weight) for each in linears))
        low_NR, downs_RD, ups = None, None, []
        if factors:
            assert len(factors) == 2 * len(linears), "LoRA on some of the layers with the same input only"
            # All first factors make one product; the scale is in the second ones.
            downs_RD = torch.cat(factors[::2]).to(x_ND.dtype)
            ups = [up.to(x_ND.dtype) * each.scale for up, each in zip(factors[1::2], linears, strict=True)]
            low_NR = x_ND @ downs_RD.T
        parts = y_NO.split([len(each.weight) for each in linears], dim=1)
        for i, (each, part) in enumerate(zip(linears, parts, strict=True)):
            # y = x W^T + b, into its columns
            if each.bias is None:
                torch.mm(x_ND, each.weight.T, out=part)
            else:
                torch.addmm(each.bias, x_ND, each.weight.T, out=part)
            # y += low B^T, with this layer's own r of the R columns
            if low_NR is not None:
                rank = factors[2 * i].shape[0]
                part.addmm_(low_NR[:, i * rank : (i + 1) * rank], ups[i].T)
        ctx.save_for_backward(x_ND if factors else None, low_NR, downs_RD, *ups)
        ctx.linears, ctx.factor_dtype = linears, factors[0].dtype if factors else None
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, low_NR, downs_RD, *ups = ctx.saved_tensors
        linears: list[LoraWeights] = ctx.linears
        grads = grad_NO.split([len(each.weight) for each in linears], dim=1)
        # dx = dy W, summed over the layers
        grad_x_ND = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = torch.mm(grads[0], linears[0].weight)
            for grad, each in zip(grads[1:], linears[1:], strict=True):
                grad_x_ND.addmm_(grad, each.weight)
        if not ups:
            return grad_x_ND, None
        # d low = dy B, layer by layer into its columns; dB = dy^T low
        ranks = [up.shape[1] for up in ups]
        grad_low_NR, grad_ups = torch.empty_like(low_NR), []
        lows, grad_lows = low_NR.split(ranks, dim=1), grad_low_NR.split(ranks, dim=1)
        for grad, up, each, low, grad_low in zip(grads, ups, linears, lows, grad_lows, strict=True):
            torch.mm(grad, up, out=grad_low)
            grad_ups.append((grad.T @ low).to(ctx.factor_dtype) * each.scale)
        # dx += d low A; dA = d low^T x, of all layers at once
        if grad_x_ND is not None:
            grad_x_ND.addmm_(grad_low_NR, downs_RD)
        grad_downs = (grad_low_NR.T @ x_ND).to(ctx.factor_dtype).split(ranks)
        return grad_x_ND, None, *(grad for pair in zip(grad_downs, grad_ups, strict=True) for grad in pair)


def swiglu(both_NE: Tensor) -> Tensor:
    """silu(gate) * up of [gate, up] side by side, [N, 2 O] -> [N, O]."""
    return _SwiGLU.apply(both_NE)


class _SwiGLU(Function):
    @staticmethod
    def forward(ctx: Any, both_NE: Tensor) -> Tensor:
        ctx.save_for_backward(both_NE)
        gate, up = both_NE.chunk(2, dim=1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NO: Tensor) -> Tensor:
        (both_NE,) = ctx.saved_tensors
        gate, up = both_NE.chunk(2, dim=1)
        grad_both_NE = torch.empty_like(both_NE)
        grad_gate, grad_up = grad_both_NE.chunk(2, dim=1)
        torch.mul(grad_NO, silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_NO * up, gate))
        return grad_both_NE


# ------------------------------------------------------------------------------------------------------------- norm


def rms_norm(module: RMSNorm, hidden: Tensor) -> Tensor:
    """Root-mean-square norm, in float32; its weight is frozen."""
    return _RMSNorm.apply(hidden, module.weight.detach(), module.variance_epsilon)


class _RMSNorm(Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        # y = w x / rms(x), where rms(x)^2 = mean(x^2) + epsilon; 1 / rms is kept, one number a row
        wide = hidden.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(hidden.shape[-1])
        inverse = square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, inverse, weight)
        return weight * (wide * inverse).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, inverse, weight = ctx.saved_tensors
        # dx = (g - x <g, x> / (D rms^2)) / rms, with g = w dy
        wide, grad_wide = hidden.float(), (grad * weight).float()
        along = torch.linalg.vecdot(grad_wide, wide)[..., None] * inverse.square() / hidden.shape[-1]
        return (grad_wide - wide * along).mul_(inverse).to(hidden.dtype), None, None


# -------------------------------------------------------------------------------------------------------- attention


def causal_attention(query: Tensor, key: Tensor, value: Tensor, mask_TT: Tensor | None) -> Tensor:
    """Causal attention [B, T, H * d] of query [B, T, H, d], key and value [B, T, K, d].

    By a fused kernel, or, with a mask (0, -inf after the diagonal), as products and softmax.
    """
    (rows, tokens, heads, width), kv_heads = query.shape, key.shape[2]
    if mask_TT is None:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads > kv_heads)
        return attended.transpose(1, 2).flatten(2)
    # The query heads of a key-value head are more rows of the same product.
    group = heads // kv_heads
    query = query.view(rows, tokens, kv_heads, group, width).permute(0, 2, 3, 1, 4).reshape(-1, group * tokens, width)
    key, value = (part.transpose(1, 2).reshape(-1, tokens, width) for part in (key, value))
    attended = _CausalAttention.apply(query, key, value, mask_TT.repeat(group, 1))
    return attended.view(rows, kv_heads, group, tokens, width).permute(0, 3, 1, 2, 4).reshape(rows, tokens, -1)


class _CausalAttention(Function):
    """Query [B, G * T, d], key and value [B, T, d] -> [B, G * T, d]; keeps the probabilities [B, G * T, T]."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        probabilities = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=key.shape[-1] ** -0.5).softmax(-1)
        ctx.save_for_backward(query, key, value, probabilities)
        return torch.bmm(probabilities, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, probabilities = ctx.saved_tensors
        # dP = dO V^T; dS = P (dP - <dP, P>), the softmax's own; then dQ = dS K, dK = dS^T Q, dV = P^T dO
        grad_scores = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, probabilities, -1, probabilities.dtype).mul_(
            key.shape[-1] ** -0.5
        )
        return (
            torch.bmm(grad_scores, key),
            torch.bmm(grad_scores.transpose(1, 2), query),
            torch.bmm(probabilities.transpose(1, 2), grad),
            None,
        )


# ---------------------------------------------------------------------------------------------------- rows of prompts


@dataclass(frozen=True)
class SharedPrefix:
    """The S tokens that several of a group's prompts begin with."""

    tokens: Tensor  # [S] which of the N they are
    positions: Tensor  # [P] all positions among the B * T where one of them is
    numbers: Tensor  # [P] which of the S is there

    @classmethod
    def of(cls, packed: Packed) -> SharedPrefix:
        """Those of a group."""
        index, lengths = packed.gather_index.numpy(), packed.lengths.numpy()
        inside = np.arange(index.shape[1]) < lengths[:, None]
        # A position that is not the one that a packed token comes from repeats it.
        repeated = inside.copy()
        repeated.ravel()[packed.source_index.numpy()] = False
        tokens = np.unique(index[repeated])
        positions = np.flatnonzero(inside & np.isin(index, tokens))
        return cls(*map(torch.from_numpy, (tokens, positions, np.searchsorted(tokens, index.ravel()[positions]))))


def padded(tokens_NC: Tensor, packed: Packed, shared: SharedPrefix) -> Tensor:
    """Packed tokens as rows [B, T, C]; a token that several prompts begin with is in each of their rows."""
    return _Padded.apply(tokens_NC, packed, shared)


class _Padded(Function):
    @staticmethod
    def forward(ctx: Any, tokens_NC: Tensor, packed: Packed, shared: SharedPrefix) -> Tensor:
        ctx.packed, ctx.shared = packed, shared
        return tokens_NC.index_select(0, packed.gather_index.flatten()).view(*packed.gather_index.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        grad, shared = grad_BTC.flatten(0, 1), ctx.shared
        grad_NC = grad.index_select(0, ctx.packed.source_index)
        grad_NC[ctx.packed.num_unique :] = 0  # nothing reads what fills the group up
        # A token's gradient is that at its source, or, where several prompts have it, their sum, in float32.
        if len(shared.tokens):
            sums = grad.new_zeros(len(shared.tokens), grad.shape[1], dtype=torch.float32)
            sums.index_add_(0, shared.numbers, grad.index_select(0, shared.positions).float())
            grad_NC.index_copy_(0, shared.tokens, sums.to(grad.dtype))
        return grad_NC, None, None


@dataclass(frozen=True)
class TokenEmbedding:
    """A token embedding or an LM head [V, D], and the rows [S, D] that PEFT trains instead of those of `soft_ids` [S].

    PEFT's own forward copies the whole table, and gives it a gradient as large.
    """

    base: Any  # nn.Embedding or nn.Linear: callable, with a weight [V, D]
    soft_ids: tuple[int, ...] = ()
    rows: Tensor | None = None

    @classmethod
    def of(cls, module: Any) -> TokenEmbedding:
        """What a module of torch's or of PEFT's holds as it is now."""
        adapter = getattr(module, "token_adapter", module)
        if not hasattr(adapter, "trainable_tokens_delta"):
            return cls(module)
        base = adapter.get_base_layer()
        if adapter.disable_adapters or adapter.merged:
            return cls(base)
        (name,) = adapter.active_adapters
        return cls(base, tuple(adapter.token_indices[name]), adapter.trainable_tokens_delta[name])


@dataclass(frozen=True)
class SoftPlaces:
    """Where a group has soft prompts: found on the host, so that nobody waits for a device to count them."""

    index: Tensor  # [P] which of the N they are
    row: Tensor  # [P] which of the S soft prompts is there

    @classmethod
    def of(cls, packed: Packed, soft_ids: Sequence[int]) -> SoftPlaces:
        """Those of a group that is on the host."""
        found = np.nonzero(packed.ids.numpy()[:, None] == np.array(soft_ids, np.int64))
        return cls(*map(torch.from_numpy, found))


def embedded(
    table: TokenEmbedding, packed: Packed, soft: SoftPlaces | None = None, features_KD: Tensor | None = None
) -> Tensor:
    """Token embeddings [N, D], with the features of images instead of the image tokens', and trained soft prompts."""
    with torch.no_grad():
        hidden_ND = table.base(packed.ids)
        if features_KD is not None:
            hidden_ND.index_copy_(0, packed.image_index, features_KD.to(hidden_ND.dtype))
    if table.rows is None or soft is None:
        return hidden_ND
    trained = table.rows.float()[soft.row].to(hidden_ND.dtype)  # so that their gradients are added up in float32
    return hidden_ND.index_copy(0, soft.index, trained)
