"""CLIP tower: a CLIP vision tower as inference wants it, with no layer after those that a model asks for.

R images or tiles, S patches and the class token, D width.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vladva.models.packed.cpu_linear import (
    CPU_TOKENS,
    free_plain,
    in_threads,
    joined_linear,
    linear_residual,
    mlp_residual,
)


def with_packed_clip_tower(model: Any, *, keep_plain: bool = True) -> Any:
    """A view of a LLaVA with a packed vision tower; it shares every weight with the original.

    keep_plain: whether the original still has the weights that are kept in another layout here.
    """
    asked = model.config.vision_feature_layer
    view = copy.copy(model)
    view._modules = dict(model._modules)
    view.vision_tower = PackedTower(model.vision_tower, [asked] if isinstance(asked, int) else asked)
    if not keep_plain:
        for layer in view.vision_tower.layers:
            free_plain(*layer.linears)
    return view


class PackedTower(nn.Module):
    """Pixels [R, 3, h, w] -> hidden states [R, S, D] of the layers that are asked for, by their number."""

    def __init__(self, tower: Any, asked: list[int]) -> None:
        super().__init__()
        self.embeddings, self.norm = tower.embeddings, tower.pre_layrnorm
        every = len(tower.encoder.layers) + 1  # before the first layer and after each
        self.asked = {layer: layer % every for layer in asked}
        self.threads = torch.get_num_threads()
        self.layers = [PackedTowerLayer(layer) for layer in tower.encoder.layers[: max(self.asked.values())]]

    def forward(self, pixel_values: torch.Tensor, **_: object) -> BaseModelOutputWithPooling:
        """As the tower's own, with the hidden states that are asked for."""
        rows = len(pixel_values)
        if not pixel_values.is_cuda:
            rows = max(1, CPU_TOKENS // self.embeddings.num_positions)
        parts = in_threads(self.hidden_states, list(pixel_values.split(rows)), self.threads)
        states = {layer: torch.cat([part[depth] for part in parts]) for layer, depth in self.asked.items()}
        # The model looks its layers up by their numbers, which may be negative: a mapping does.
        return BaseModelOutputWithPooling(hidden_states=cast("Any", states))

    def hidden_states(self, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        """Hidden states by how many layers they have been through."""
        hidden_RSD = self.norm(self.embeddings(pixels))
        states = {0: hidden_RSD}
        for depth, layer in enumerate(self.layers, start=1):
            hidden_RSD = layer(hidden_RSD)
            states[depth] = hidden_RSD
        return {depth: states[depth] for depth in self.asked.values()}


class PackedTowerLayer:
    """A layer of the tower: queries, keys and values by one product; the activation is part of another."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj
        self.linears = (*projections, attention.out_proj, mlp.fc1, mlp.fc2)
        self.before, self.after, self.heads = layer.layer_norm1, layer.layer_norm2, attention.num_heads
        self.project = joined_linear(*projections)
        self.output = linear_residual(attention.out_proj)
        self.mlp = mlp_residual(mlp.fc1, mlp.fc2, mlp.config.hidden_act, mlp.activation_fn)

    def __call__(self, hidden_RSD: torch.Tensor) -> torch.Tensor:
        """Hidden states [R, S, D] after the layer."""
        heads = self.project(self.before(hidden_RSD)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended_RSD = scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        hidden_RSD = self.output(attended_RSD, hidden_RSD)
        return self.mlp(self.after(hidden_RSD), hidden_RSD)
