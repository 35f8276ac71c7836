"""Rotary positions (Su et al. 2021): every pair of a head's coordinates is rotated by an angle of the token's position.

A coordinate's partner is half a head away, and both have the same angle:

    out[i] = x[i] cos[i] - x[i + d/2] sin[i]        in the first half
    out[i] = x[i] cos[i] + x[i - d/2] sin[i]        in the second

so with the sine negative in the first half, out = x cos + swapped(x) sin.

B prompts, T tokens, H heads of d coordinates. Training has the prompts first [B, T, H, d], inference the tokens
[T, B, H, d]: each so that its products need no copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable


class Rotation(Protocol):
    """Rotates heads by the positions of their tokens."""

    def __call__(self, heads: Tensor, /) -> Tensor:
        """Heads of all tokens, rotated."""
        ...

    def at(self, index_B: Tensor, /) -> Rotation:
        """The rotation of one token of each prompt, for heads [B, 1, H, d]."""
        ...


@dataclass(frozen=True)
class RotaryEmbedding:
    """Positions that may differ between prompts: cosine and signed sine, [B or 1, T, 1, d] or [T, B, 1, d]."""

    cos: Tensor
    sin: Tensor
    tokens_first: bool = False

    @classmethod
    def from_cos_sin(cls, cos_BTd: Tensor, sin_BTd: Tensor, *, tokens_first: bool = False) -> RotaryEmbedding:
        """From the tables that transformers makes, whose second half repeats the first."""
        tables = (cos_BTd, _signed(sin_BTd))
        if tokens_first:
            tables = (tables[0].transpose(0, 1), tables[1].transpose(0, 1))
        return cls(tables[0][:, :, None], tables[1][:, :, None], tokens_first)

    def __call__(self, heads: Tensor) -> Tensor:
        """Heads [B, T, H, d] ([T, B, H, d] with `tokens_first`), rotated; with a gradient where one is needed."""
        if torch.is_grad_enabled():
            return _Rotated.apply(heads, self.cos, self.sin)
        return _rotated(heads, self.cos, self.sin)

    def at(self, index_B: Tensor) -> RotaryEmbedding:
        """The rotation of one token of each prompt, for heads [B, 1, H, d]."""
        rows = torch.arange(len(index_B), device=index_B.device)
        if self.tokens_first:
            return RotaryEmbedding(self.cos[index_B, rows][:, None], self.sin[index_B, rows][:, None])
        cos, sin = (table.expand(len(index_B), -1, -1, -1)[rows, index_B][:, None] for table in (self.cos, self.sin))
        return RotaryEmbedding(cos, sin)


@dataclass(frozen=True)
class SharedRotaryEmbedding:
    """Positions that are the same for all prompts, as matrices [T, d, d]: one product rotates the heads of a token."""

    matrix: Tensor

    @classmethod
    def from_cos_sin(cls, cos_1Td: Tensor, sin_1Td: Tensor) -> SharedRotaryEmbedding:
        """From the tables that transformers makes, whose second half repeats the first."""
        same = torch.eye(cos_1Td.shape[-1], dtype=cos_1Td.dtype, device=cos_1Td.device)
        partner = same.roll(len(same) // 2, dims=0)
        return cls(cos_1Td[0, :, None] * same + _signed(sin_1Td)[0, :, None] * partner)

    def __call__(self, heads_TBHd: Tensor) -> Tensor:
        """Heads [T, B, H, d], rotated."""
        return torch.bmm(heads_TBHd.flatten(1, 2), self.matrix).view(heads_TBHd.shape)

    def at(self, index_B: Tensor) -> SharedRotaryEmbedding:
        """The rotation of one token of each prompt, for heads [B, 1, H, d]."""
        return SharedRotaryEmbedding(self.matrix[index_B])


def _signed(sin: Tensor) -> Tensor:
    """The sine with which a coordinate's partner is added: negative in the first half."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    swapped = torch.cat([heads[..., half:], heads[..., :half]], dim=-1)
    return (heads * cos).addcmul_(swapped, sin)


class _Rotated(Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(heads, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _rotated(grad, cos, -sin), None, None  # by the opposite angle
