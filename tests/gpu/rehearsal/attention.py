"""The kernel that `scaled_dot_product_attention` would get on a GPU of the A100's kind, or newer.

PyTorch chooses by what each kernel can do: flash attention takes no mask and half precision only; the memory-efficient
one takes a mask, but not fewer heads of keys than of queries; what is left is computed as products and a softmax
("math"), with the scores of all pairs of tokens in memory.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from tests.gpu.rehearsal.fake_cuda import place

if TYPE_CHECKING:
    from torch import Tensor

    from tests.gpu.rehearsal.fake_cuda import FakeCuda

WIDEST_HEAD = 256  # of flash attention


def choose_kernels(mode: FakeCuda) -> None:
    """From now on the call goes to the kernel that it would get, and is counted; wherever it was imported already."""
    original = functional.scaled_dot_product_attention

    def scaled_dot_product_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if query.device.type != "cuda":
            return original(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
        kernel = kernel_of(query, key, attn_mask)
        shapes = "" if kernel == "flash" else f" {tuple(query.shape)} x {tuple(key.shape)} {str(query.dtype)[6:]}"
        mode.counts.attention[f"{kernel}{shapes}: {place()}"] += 1
        if kernel == "flash":
            return torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, dropout_p, is_causal, scale=scale
            )[0]
        if kernel == "efficient":
            bias = additive(attn_mask, query, key)
            return torch.ops.aten._scaled_dot_product_efficient_attention(
                query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
            )[0]
        return products(query, key, value, attn_mask, is_causal, scale)

    functional.scaled_dot_product_attention = scaled_dot_product_attention
    torch._C._nn.scaled_dot_product_attention = scaled_dot_product_attention
    for module in list(sys.modules.values()):
        if getattr(module, "__dict__", {}).get("scaled_dot_product_attention") is original:
            module.scaled_dot_product_attention = scaled_dot_product_attention  # type: ignore[attr-defined]


def kernel_of(query: Tensor, key: Tensor, mask: Tensor | None) -> str:
    """`flash`, `efficient` or `math`."""
    half, width = query.dtype in (torch.bfloat16, torch.float16), query.shape[-1]
    if mask is None and half and width <= WIDEST_HEAD and width % 8 == 0 and query.stride(-1) == key.stride(-1) == 1:
        return "flash"
    return "efficient" if query.shape[-3] == key.shape[-3] and width % 8 == 0 else "math"


def additive(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """A mask as the memory-efficient kernel takes it: numbers to add, each row padded to a multiple of 16."""
    if mask is None:
        return None
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(mask.logical_not(), -torch.inf)
    columns = mask.shape[-1]
    if columns % 16:
        mask = functional.pad(mask, (0, -columns % 16))[..., :columns]
    return mask.expand(*query.shape[:3], key.shape[2])


def products(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None
) -> Tensor:
    """Attention as two products and a softmax."""
    group = query.shape[-3] // key.shape[-3]
    if group > 1:
        heads = query.shape[-3]
        key, value = (part.repeat_interleave(group, dim=-3, output_size=heads) for part in (key, value))
    scores = (query @ key.transpose(-1, -2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf) if mask.dtype == torch.bool else scores + mask
    elif is_causal:
        scores = scores + torch.full(scores.shape[-2:], -torch.inf, device=scores.device, dtype=scores.dtype).triu(1)
    return scores.softmax(-1) @ value
