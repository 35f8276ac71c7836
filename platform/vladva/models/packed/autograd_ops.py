"""Operations: what a decoder layer on packed tokens is made of, each with its gradient written out.

Autograd would keep what can be had again cheaply, in float32 at that, and add up a sum for every factor. Here a norm
keeps its input, a gate its two halves, LoRA its few numbers a token; products with the same input make its gradient in
one go. What is frozen (weights, norms) gets no gradient. Without gradients they are plain functions.

N packed tokens, D inputs, O outputs, r LoRA's rank; [B, T] rows with padding, H heads of d, K key-value heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import FunctionCtx, once_differentiable
from torch.nn.functional import scaled_dot_product_attention, silu

from vladva.models.packed.packing import Packed

# --------------------------------------------------------------------------------------------------------- products


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer, with its LoRA where it has one."""

    weight: Tensor  # [O, D]
    bias: Tensor | None  # [O]
    down: Tensor | None = None  # [r, D]
    up: Tensor | None = None  # [O, r]
    scale: float = 1.0

    @classmethod
    def of(cls, module: nn.Module) -> Linear:
        """What a layer of torch's or of PEFT's computes as it is now: merged or switched off, LoRA is left out."""
        if isinstance(module, nn.Linear):
            return cls(module.weight, module.bias)
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


def lora_linear(x_ND: Tensor, *modules: nn.Module) -> Tensor:
    """The outputs of linear layers with the same input, side by side [N, sum of O]."""
    linears = [Linear.of(module) for module in modules]
    factors = [factor for each in linears if each.down is not None for factor in (each.down, each.up)]
    return _Products.apply(x_ND, linears, *factors)


class _Products(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, x_ND: Tensor, linears: list[Linear], *factors: Tensor) -> Tensor:
        y_NO = x_ND.new_empty(len(x_ND), sum(len(each.weight) for each in linears))
        downs_RD, ups = None, []
        if factors:
            assert len(factors) == 2 * len(linears), "LoRA on some of the layers with the same input only"
            downs_RD = torch.cat(factors[::2]).to(x_ND.dtype)
            ups = [up.to(x_ND.dtype) * each.scale for up, each in zip(factors[1::2], linears, strict=True)]
        low_NR = None if downs_RD is None else x_ND @ downs_RD.T
        parts = y_NO.split([len(each.weight) for each in linears], dim=1)
        for i, (each, part) in enumerate(zip(linears, parts, strict=True)):
            if each.bias is None:
                torch.mm(x_ND, each.weight.T, out=part)
            else:
                torch.addmm(each.bias, x_ND, each.weight.T, out=part)
            if low_NR is not None:
                rank = factors[2 * i].shape[0]
                part.addmm_(low_NR[:, i * rank : (i + 1) * rank], ups[i].T)
        ctx.save_for_backward(x_ND if factors else None, low_NR, downs_RD, *ups)
        ctx.linears = linears
        return y_NO

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_ND, low_NR, downs_RD, *ups = ctx.saved_tensors
        grads = grad_NO.split([len(each.weight) for each in ctx.linears], dim=1)
        grad_x_ND = None
        if ctx.needs_input_grad[0]:
            grad_x_ND = torch.mm(grads[0], ctx.linears[0].weight)
            for grad, each in zip(grads[1:], ctx.linears[1:], strict=True):
                grad_x_ND.addmm_(grad, each.weight)
        if not ups:
            return grad_x_ND, None
        ranks = [up.shape[1] for up in ups]
        grad_low_NR, grad_ups = torch.empty_like(low_NR), []
        of_each = (part.split(ranks, dim=1) for part in (low_NR, grad_low_NR))
        for grad, up, each, low, grad_low in zip(grads, ups, ctx.linears, *of_each, strict=True):
            torch.mm(grad, up, out=grad_low)
            grad_ups.append((grad.T @ low).to(each.up.dtype) * each.scale)
        if grad_x_ND is not None:
            grad_x_ND.addmm_(grad_low_NR, downs_RD)
        grad_downs = (grad_low_NR.T @ x_ND).to(ctx.linears[0].down.dtype).split(ranks)
        return grad_x_ND, None, *(grad for pair in zip(grad_downs, grad_ups, strict=True) for grad in pair)


def swiglu(both_NE: Tensor) -> Tensor:
    """silu(gate) * up of [gate, up] side by side, [N, 2 O] -> [N, O]."""
    return _Gated.apply(both_NE)


class _Gated(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, both_NE: Tensor) -> Tensor:
        ctx.save_for_backward(both_NE)
        gate, up = both_NE.chunk(2, dim=1)
        return silu(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_NO: Tensor) -> Tensor:
        (both_NE,) = ctx.saved_tensors
        gate, up = both_NE.chunk(2, dim=1)
        grad_both_NE = torch.empty_like(both_NE)
        grad_gate, grad_up = grad_both_NE.chunk(2, dim=1)
        torch.mul(grad_NO, silu(gate), out=grad_up)
        grad_gate.copy_(torch.ops.aten.silu_backward(grad_NO * up, gate))
        return grad_both_NE


# ------------------------------------------------------------------------------------------------------------- norm


def norm(module: nn.Module, hidden: Tensor) -> Tensor:
    """Root-mean-square norm, in float32; its weight is frozen."""
    return _Norm.apply(hidden, module.weight.detach(), module.variance_epsilon)


class _Norm(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        wide = hidden.float()
        square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(hidden.shape[-1])
        inverse = square.add_(epsilon).rsqrt_()
        ctx.save_for_backward(hidden, inverse, weight)
        return weight * (wide * inverse).to(hidden.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, inverse, weight = ctx.saved_tensors
        wide, grad_wide = hidden.float(), (grad * weight).float()
        along = torch.linalg.vecdot(grad_wide, wide)[..., None] * inverse.square() / hidden.shape[-1]
        return (grad_wide - wide * along).mul_(inverse).to(hidden.dtype), None, None


# -------------------------------------------------------------------------------------------------------- positions


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotary positions: cosine and sine [B or 1, T, 1, d]; the first half of the sine is negative."""

    cos: Tensor
    sin: Tensor

    @classmethod
    def by(cls, cos_BTd: Tensor, sin_BTd: Tensor) -> RotaryEmbedding:
        """The turn by angles whose second half repeats the first."""
        half = cos_BTd.shape[-1] // 2
        signed = torch.cat([-sin_BTd[..., :half], sin_BTd[..., half:]], dim=-1)
        return cls(cos_BTd[:, :, None], signed[:, :, None])

    def __call__(self, heads_BTHd: Tensor) -> Tensor:
        """Heads turned by their positions."""
        return _Turned.apply(heads_BTHd, self.cos, self.sin)

    def at(self, places_B: Tensor) -> RotaryEmbedding:
        """For one token of each prompt, [B, 1, 1, d]."""
        rows = torch.arange(len(places_B), device=places_B.device)
        tables = (table.expand(len(places_B), -1, -1, -1)[rows, places_B][:, None] for table in (self.cos, self.sin))
        return RotaryEmbedding(*tables)


class _Turned(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, -sin), None, None  # the other way round


def _turned(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    swapped = torch.cat([heads[..., half:], heads[..., :half]], dim=-1)
    return (heads * cos).addcmul_(swapped, sin)


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
    attended = _Attended.apply(query, key, value, mask_TT.repeat(group, 1))
    return attended.view(rows, kv_heads, group, tokens, width).permute(0, 3, 1, 2, 4).reshape(rows, tokens, -1)


class _Attended(Function):
    """Query [B, G * T, d], key and value [B, T, d] -> [B, G * T, d]; keeps the shares [B, G * T, T]."""

    @staticmethod
    def forward(ctx: FunctionCtx, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
        shares = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=key.shape[-1] ** -0.5).softmax(-1)
        ctx.save_for_backward(query, key, value, shares)
        return torch.bmm(shares, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, shares = ctx.saved_tensors
        grad_scores = torch.bmm(grad, value.transpose(1, 2))
        grad_scores = torch._softmax_backward_data(grad_scores, shares, -1, shares.dtype).mul_(key.shape[-1] ** -0.5)
        return (
            torch.bmm(grad_scores, key),
            torch.bmm(grad_scores.transpose(1, 2), query),
            torch.bmm(shares.transpose(1, 2), grad),
            None,
        )


# ------------------------------------------------------------------------------------------------------------- rows


@dataclass(frozen=True)
class SharedPrefix:
    """The S tokens that several of a group's prompts begin with."""

    tokens: Tensor  # [S] their places among the packed ones
    places: Tensor  # where they are among the B * T, all their places
    numbers: Tensor  # which of the S is there

    @classmethod
    def of(cls, packed: Packed) -> SharedPrefix:
        """Those of a group."""
        index, lengths = packed.index.numpy(), packed.lengths.numpy()
        repeated = np.arange(index.shape[1]) < lengths[:, None]
        inside = repeated.copy()
        repeated.ravel()[packed.place.numpy()] = False
        tokens = np.unique(index[repeated])
        places = np.flatnonzero(inside & np.isin(index, tokens))
        return cls(*map(torch.from_numpy, (tokens, places, np.searchsorted(tokens, index.ravel()[places]))))


def padded(tokens_NC: Tensor, packed: Packed, shared: SharedPrefix) -> Tensor:
    """Packed tokens as rows [B, T, C]; a token that several prompts begin with is in each of their rows."""
    return _Padded.apply(tokens_NC, packed, shared)


class _Padded(Function):
    @staticmethod
    def forward(ctx: FunctionCtx, tokens_NC: Tensor, packed: Packed, shared: SharedPrefix) -> Tensor:
        ctx.packed, ctx.shared = packed, shared
        return tokens_NC.index_select(0, packed.index.flatten()).view(*packed.index.shape, -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad_BTC: Tensor) -> tuple[Tensor | None, ...]:
        grad, shared = grad_BTC.flatten(0, 1), ctx.shared
        grad_NC = grad.index_select(0, ctx.packed.place)
        grad_NC[ctx.packed.own :] = 0  # nothing looks at what fills the group up
        if len(shared.tokens):  # their sums, in float32
            sums = grad.new_zeros(len(shared.tokens), grad.shape[1], dtype=torch.float32)
            sums.index_add_(0, shared.numbers, grad.index_select(0, shared.places).float())
            grad_NC.index_copy_(0, shared.tokens, sums.to(grad.dtype))
        return grad_NC, None, None


@dataclass(frozen=True)
class TokenEmbedding:
    """A token embedding or an LM head [V, D], and the rows [S, D] that PEFT trains in the stead of those of `soft` [S].

    PEFT's own forward copies the whole table, and gives it a gradient as large.
    """

    base: nn.Module
    soft: Tensor | None = None
    rows: Tensor | None = None

    @classmethod
    def of(cls, module: nn.Module) -> TokenEmbedding:
        """What a module of torch's or of PEFT's holds as it is now."""
        adapter = getattr(module, "token_adapter", module)
        if not hasattr(adapter, "trainable_tokens_delta"):
            return cls(module)
        base = adapter.get_base_layer()
        if adapter.disable_adapters or adapter.merged:
            return cls(base)
        (name,) = adapter.active_adapters
        return cls(
            base,
            torch.tensor(adapter.token_indices[name], device=base.weight.device),
            adapter.trainable_tokens_delta[name],
        )


def embedded(
    module: nn.Module, ids_N: Tensor, is_image_N: Tensor | None = None, features: Tensor | None = None
) -> Tensor:
    """Token embeddings [N, D], with the features of images in the stead of the image tokens'."""
    table = TokenEmbedding.of(module)
    with torch.no_grad():
        hidden_ND = table.base(ids_N)
        if features is not None:
            hidden_ND[is_image_N] = features.to(hidden_ND.dtype)
    if table.rows is None:
        return hidden_ND
    place, row = (ids_N[:, None] == table.soft).nonzero(as_tuple=True)
    own = table.rows.float()[row].to(hidden_ND.dtype)  # so that their gradients are added up in float32
    return hidden_ND.index_copy(0, place, own)
