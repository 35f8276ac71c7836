"""Qwen tower: a Qwen-VL vision tower whose layers attend within all images, or windows, at once.

transformers' tower calls attention once for each image, or window, and waits for the device in each layer to learn
their lengths. Here:

- on a GPU in 16 bits one call computes all, by flash attention over sequences of any lengths;
- elsewhere sequences of one length are the rows of one call: windows, and images of one size, nearly all are;
- where images, their windows and their patches' positions are is reckoned on the host, from grids that it knows, and
  copied to the device at once, without waiting for it;
- patches are embedded by a matrix product: a convolution whose kernel is as large as its step is one.

P patches of all images, H heads of d, S sequences.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from vladva.models.transfer import to_device

ENDS = {"cu_seqlens", "cu_window_seqlens"}  # the tower's names for cumulative lengths


def is_qwen_tower(model: Any) -> bool:
    """Whether a model of transformers has a vision tower of the kind that this file computes."""
    tower: Any = getattr(model, "visual", None)
    attends = hasattr(tower, "blocks") and hasattr(tower.blocks[0].attn, "qkv")
    return attends and isinstance(tower.patch_embed.proj, nn.Conv3d)


def with_packed_qwen_tower(model: Any) -> Any:
    """A view of the model with a packed tower; it shares every weight with the original."""
    view, tower = _view(model), _view(model.visual)
    sequences = Sequences()
    blocks = []
    for block in model.visual.blocks:
        packed = _view(block)
        packed.attn = PackedVisionAttention(block.attn, sequences)
        blocks.append(packed)
    tower.blocks = nn.ModuleList(blocks)
    tower.patch_embed = PatchProduct(model.visual.patch_embed.proj)
    view.visual = PackedQwenTower(tower, sequences)
    return view


def _view(module: Any) -> Any:
    view = copy.copy(module)
    view._modules = dict(module._modules)
    return view


class PackedQwenTower(nn.Module):
    """Patches, grids [N, 3] -> what the tower gives, its layers those of `with_packed_qwen_tower`."""

    def __init__(self, tower: Any, sequences: Sequences) -> None:
        super().__init__()
        self.tower, self.sequences = tower, sequences
        self.spatial_merge_size: int = tower.spatial_merge_size

    @property
    def dtype(self) -> torch.dtype:
        """That of the weights."""
        return self.tower.dtype

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **options: Any) -> Any:
        """As the tower's own; grids that are on the host cost no wait for a device."""
        if grid_thw.device.type == "cpu":
            places = self.places(grid_thw)
            options |= to_device({name: place.numpy() for name, place in places.items()}, hidden_states.device)
            for name in ENDS & places.keys():
                self.sequences.tell(options[name], places[name])
        return self.tower(hidden_states, grid_thw=grid_thw, **options)

    def places(self, grid_thw: Tensor) -> dict[str, Tensor]:
        """What the tower would find out from the grids, under the names by which it takes it."""
        from transformers import vision_utils

        merge = self.spatial_merge_size
        found = {
            "position_ids": vision_utils.get_vision_position_ids(grid_thw, merge),
            "cu_seqlens": vision_utils.get_vision_cu_seqlens(grid_thw),
        }
        if hasattr(self.tower, "window_size"):
            windows = vision_utils.get_vision_window_index(
                grid_thw, merge, self.tower.window_size, self.tower.patch_size
            )
            found |= zip(("window_index", "cu_window_seqlens"), windows, strict=True)
        return found


class Sequences:
    """How long the sequences between cumulative lengths [S + 1] are, on the host; the last ones asked for are kept."""

    def __init__(self) -> None:
        self.kept: list[tuple[Tensor, list[int]]] = []

    def lengths(self, ends: Tensor) -> list[int]:
        """The S lengths. Waits for the device where these ends are new: once a tower has windows, twice a call."""
        for known, lengths in self.kept:
            if known is ends:
                return lengths
        return self.tell(ends, ends)

    def tell(self, ends: Tensor, known: Tensor) -> list[int]:
        """The lengths, of ends that are the same as the known ones."""
        lengths = (known[1:] - known[:-1]).tolist()
        self.kept = [*self.kept[-1:], (ends, lengths)]
        return lengths


class PatchProduct(nn.Module):
    """Patches [P, C * t * p * p] -> [P, D]: the convolution of the tower, as the matrix product that it is."""

    def __init__(self, convolution: nn.Conv3d) -> None:
        super().__init__()
        assert tuple(convolution.kernel_size) == tuple(convolution.stride), "patches overlap"
        self.convolution = convolution

    def forward(self, patches: Tensor) -> Tensor:
        """Embedded patches [P, D]."""
        weight, bias = self.convolution.weight, self.convolution.bias
        return linear(patches.reshape(len(patches), -1).to(weight.dtype), weight.flatten(1), bias)


class PackedVisionAttention(nn.Module):
    """Attention within each of the sequences, with the weights of transformers' module."""

    def __init__(self, attention: Any, sequences: Sequences) -> None:
        super().__init__()
        self.attention, self.sequences = attention, sequences

    def forward(
        self, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: object
    ) -> Tensor:
        """Hidden states [P, D] after attention and its output projection; cu_seqlens: [S + 1]."""
        from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

        heads = self.attention.qkv(hidden_states).unflatten(1, (3, self.attention.num_heads, -1))
        query_PHd, key_PHd, value_PHd = heads.unbind(1)
        query_PHd, key_PHd = apply_rotary_pos_emb_vision(query_PHd, key_PHd, *position_embeddings)
        lengths = self.sequences.lengths(cu_seqlens)
        attended_PHd = attend_within(query_PHd, key_PHd, value_PHd, cu_seqlens, lengths)
        return self.attention.proj(attended_PHd.flatten(1))


def attend_within(query_PHd: Tensor, key_PHd: Tensor, value_PHd: Tensor, ends: Tensor, lengths: list[int]) -> Tensor:
    """Attention [P, H, d] within sequences of the given lengths, whose cumulative lengths are `ends` [S + 1]."""
    if query_PHd.is_cuda and query_PHd.dtype in (torch.float16, torch.bfloat16):
        from torch.nn.attention.varlen import varlen_attn

        longest, ends = max(lengths), ends.int()
        found = varlen_attn(query_PHd, key_PHd.contiguous(), value_PHd.contiguous(), ends, ends, longest, longest)
        assert isinstance(found, Tensor)
        return found
    return attend_by_length(query_PHd, key_PHd, value_PHd, lengths)


def attend_by_length(query_PHd: Tensor, key_PHd: Tensor, value_PHd: Tensor, lengths: list[int]) -> Tensor:
    """The same by one call for each length that there is, whose sequences are its rows."""
    starts: dict[int, list[int]] = {}
    first = 0
    for length in lengths:
        if length:
            starts.setdefault(length, []).append(first)
        first += length
    if len(starts) == 1:  # nothing has to be moved
        return _attend_rows(query_PHd, key_PHd, value_PHd, next(iter(starts)))
    attended_PHd = torch.empty_like(value_PHd)
    for length, firsts in starts.items():
        steps = torch.arange(length, device=query_PHd.device)
        rows = (torch.tensor(firsts, device=query_PHd.device)[:, None] + steps).flatten()
        query, key, value = (each.index_select(0, rows) for each in (query_PHd, key_PHd, value_PHd))
        attended_PHd.index_copy_(0, rows, _attend_rows(query, key, value, length))
    return attended_PHd


def _attend_rows(query_PHd: Tensor, key_PHd: Tensor, value_PHd: Tensor, length: int) -> Tensor:
    """Attention within each `length` patches."""
    rows = (each.unflatten(0, (-1, length)).transpose(1, 2) for each in (query_PHd, key_PHd, value_PHd))
    return scaled_dot_product_attention(*rows).transpose(1, 2).flatten(0, 1)
