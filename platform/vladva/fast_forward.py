"""Fast forward: prompts -> embeddings as the plain forward gives them, without what an embedding does not need.

1. No LM head and no layer after the one that is asked for. In that layer only the last token of a prompt goes on: its
   query, output projection and MLP; of the others, keys and values.
2. Nothing is padded in the linear layers: they run on the tokens of all prompts, one after the other (packing.py).
   Attention runs on padded rows of like length. It is causal and the padding is on the right, so that no token sees
   any, and no mask is needed.
3. Tokens that follow the same tokens are computed once: all prompts share what comes before the text or picture, and
   many texts begin with the same words.
4. On a CPU with bfloat16 products the weights are packed for them, side by side where the input is the same, with the
   activation in the product; groups of prompts are small enough for the caches.

The vision tower sees all pictures of a call at once, whatever the groups are.

B prompts, T tokens of the longest, N packed tokens, D width, H heads, K key-value heads, d width of a head.
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from vladva.packing import Packed, groups, pack

if TYPE_CHECKING:
    from vladva.embedder import EmbeddingModel

CPU_TOKENS = 512  # in a group, for each thread: few, so that activations stay in caches
GPU_TOKENS = 32_768
SHORT = 128  # tokens up to which a CPU computes attention as products and softmax, not by a fused kernel
FREED_BYTES = 1 << 30  # that a process on a CPU keeps: it asks for the same again at once
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD = -1, -3, 32 << 20  # of glibc's malloc.h

Forward = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor] | None], torch.Tensor]


def embedding_forward(model: EmbeddingModel) -> Forward:
    """Tokens, pixels -> embeddings [B, D]: fast where the backbone says that its decoder is of a kind known here."""
    text = model.base.config.get_text_config()
    if text.model_type in model.backbone.FAST_DECODERS and text.to_dict().get("sliding_window") is None:
        return FastForward(model)
    return lambda tokens, pixels: model(tokens, pixels)[0]


class FastForward:
    """Tokens, pixels -> embeddings [B, D], of a model with a Llama's decoder (Qwen2's has biases besides).

    Takes the memory of the decoder's weights once more where it packs them.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self.model = model
        self.language = model.base.model.language_model
        if model.log_scale.device.type == "cpu":
            keep_freed_memory()
        *layers, last = self.language.layers[: model.layer]
        self.layers = [Layer(layer) for layer in layers]
        self.last = LastLayer(last)

    def __call__(self, tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Embeddings [B, D] (float32, unit norm) of the prompts; captions after them are left out."""
        inputs = self.model.inputs(tokens, pixels)
        features_KD = None if pixels is None else self.image_features(inputs)
        ids_BT, lengths_B = (tokens[name].cpu().numpy() for name in ("ids", "prompt_lengths"))
        embeddings_BD = torch.empty(len(ids_BT), self.language.config.hidden_size, device=tokens["ids"].device)
        limit = GPU_TOKENS if embeddings_BD.is_cuda else CPU_TOKENS * torch.get_num_threads()
        for rows in groups(lengths_B, limit):
            packed = pack(ids_BT, lengths_B, rows, self.model.base.config.image_token_id).to(embeddings_BD.device)
            embeddings_BD[packed.prompts] = self.embed(packed, inputs, features_KD)
        return embeddings_BD

    def image_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features [K, D] of the K image tokens of all pictures."""
        of_text = ("input_ids", "attention_mask", "position_ids")
        of_pictures = {name: value for name, value in inputs.items() if name not in of_text}
        return torch.cat(list(self.model.base.model.get_image_features(**of_pictures).pooler_output))

    def embed(self, packed: Packed, inputs: dict[str, torch.Tensor], features_KD: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, D] of a group."""
        tokens = packed.index.shape[1]
        hidden_ND = self.language.embed_tokens(packed.ids)
        if features_KD is not None:
            hidden_ND[packed.is_image] = features_KD[packed.feature].to(hidden_ND.dtype)
        positions = torch.arange(tokens, device=hidden_ND.device)[None]
        if "position_ids" in inputs:  # [3, B, T]
            positions = inputs["position_ids"][:, packed.prompts, :tokens]
        turn = Turn.by(*self.language.rotary_emb(hidden_ND, positions))
        mask_TT = None
        if not hidden_ND.is_cuda and tokens <= SHORT:
            mask_TT = torch.full((tokens, tokens), -torch.inf, dtype=hidden_ND.dtype).triu_(1)
        for layer in self.layers:
            hidden_ND = layer(hidden_ND, packed, turn, mask_TT)
        hidden_BD = self.last(hidden_ND, packed, turn)
        return normalize(self.language.norm(hidden_BD).float(), dim=-1)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: an activation that is given back to the system costs page faults to have again."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        libc.mallopt(M_TRIM_THRESHOLD, FREED_BYTES)


# ----------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Turn:
    """Rotary positions: cosine and sine [B or 1, T, 1, d]; the first half of the sine is negative."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def by(cls, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor) -> Turn:
        """The turn by angles whose second half repeats the first."""
        half = cos_BTd.shape[-1] // 2
        signed = torch.cat([-sin_BTd[..., :half], sin_BTd[..., half:]], dim=-1)
        return cls(cos_BTd[:, :, None], signed[:, :, None])

    def __call__(self, heads_BTHd: torch.Tensor) -> torch.Tensor:
        """Heads turned by their positions."""
        half = heads_BTHd.shape[-1] // 2
        swapped = torch.cat([heads_BTHd[..., half:], heads_BTHd[..., :half]], dim=-1)
        return (heads_BTHd * self.cos).addcmul_(swapped, self.sin)

    def at(self, places_B: torch.Tensor) -> Turn:
        """For one token of each prompt, [B, 1, 1, d]."""
        rows = torch.arange(len(places_B), device=places_B.device)
        tables = (table.expand(len(places_B), -1, -1, -1)[rows, places_B][:, None] for table in (self.cos, self.sin))
        return Turn(*tables)


class Layer:
    """A decoder layer on packed tokens."""

    def __init__(self, layer: nn.Module) -> None:
        attention = layer.self_attn
        self.layer, self.width = layer, attention.head_dim
        self.kv_heads = attention.k_proj.out_features // self.width
        self.project = self.projections(attention)
        self.output, self.down, self.gated = product(attention.o_proj), product(layer.mlp.down_proj), gated(layer.mlp)

    def projections(self, attention: nn.Module) -> Product:
        """Queries, keys and values side by side."""
        return product(attention.q_proj, attention.k_proj, attention.v_proj)

    def __call__(self, hidden_ND: torch.Tensor, packed: Packed, turn: Turn, mask: torch.Tensor | None) -> torch.Tensor:
        """Hidden states [N, D] after the layer."""
        heads_BTHd = self.heads(norm(self.layer.input_layernorm, hidden_ND), packed)
        turned_BTHd, value_BTKd = turn(heads_BTHd[:, :, : -self.kv_heads]), heads_BTHd[:, :, -self.kv_heads :]
        attended_BTD = attend(
            turned_BTHd[:, :, : -self.kv_heads], turned_BTHd[:, :, -self.kv_heads :], value_BTKd, mask
        )
        return self.mlp(hidden_ND + self.output(attended_BTD.flatten(0, 1).index_select(0, packed.place)))

    def heads(self, normed_ND: torch.Tensor, packed: Packed) -> torch.Tensor:
        """The projections as padded rows of heads [B, T, heads, d]."""
        projected = self.project(normed_ND).index_select(0, packed.index.flatten())
        return projected.view(*packed.index.shape, -1, self.width)

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the MLP."""
        return hidden + self.down(self.gated(norm(self.layer.post_attention_layernorm, hidden)))


class LastLayer(Layer):
    """The layer that is embedded from: packed tokens -> the last token of each prompt."""

    def projections(self, attention: nn.Module) -> Product:
        """Keys and values side by side; few queries are needed."""
        self.query = product(attention.q_proj)
        return product(attention.k_proj, attention.v_proj)

    def __call__(self, hidden_ND: torch.Tensor, packed: Packed, turn: Turn) -> torch.Tensor:
        """Hidden states [B, D] of the last tokens after the layer."""
        ends = packed.lengths - 1
        last_B = packed.index.gather(1, ends[:, None])[:, 0]
        normed_ND = norm(self.layer.input_layernorm, hidden_ND)
        key_BTKd, value_BTKd = self.heads(normed_ND, packed).chunk(2, dim=2)
        query_B1Hd = self.query(normed_ND[last_B]).view(len(last_B), 1, -1, self.width)
        inside_BT = torch.arange(packed.index.shape[1], device=ends.device) < packed.lengths[:, None]
        attended_BH1d = scaled_dot_product_attention(
            turn.at(ends)(query_B1Hd).transpose(1, 2),
            turn(key_BTKd).transpose(1, 2),
            value_BTKd.transpose(1, 2),
            attn_mask=inside_BT[:, None, None],
            enable_gqa=True,
        )
        return self.mlp(hidden_ND[last_B] + self.output(attended_BH1d.flatten(1)))


def norm(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Root-mean-square norm, in float32."""
    wide = hidden.float()
    square = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(hidden.shape[-1])
    return module.weight * (wide * square.add_(module.variance_epsilon).rsqrt_()).to(hidden.dtype)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Causal attention [B, T, H * d] of query [B, T, H, d], key and value [B, T, K, d]."""
    (rows, tokens, heads, width), kv_heads = query.shape, key.shape[2]
    if mask is None:
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=heads > kv_heads)
        return attended.transpose(1, 2).flatten(2)
    # The query heads of a key-value head are more rows of the same product.
    group = heads // kv_heads
    query = query.view(rows, tokens, kv_heads, group, width).permute(0, 2, 3, 1, 4).reshape(-1, group * tokens, width)
    key, value = (part.transpose(1, 2).reshape(-1, tokens, width) for part in (key, value))
    scores = torch.baddbmm(mask.repeat(group, 1), query, key.transpose(1, 2), alpha=width**-0.5)
    attended = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value)
    return attended.view(rows, kv_heads, group, tokens, width).permute(0, 3, 1, 2, 4).reshape(rows, tokens, -1)


# --------------------------------------------------------------------------------------------------------- products


Product = Callable[[torch.Tensor], torch.Tensor]


def product(*linears: nn.Module) -> Product:
    """x [N, D] -> the outputs of linear layers side by side. Layers with LoRA are called as they are."""
    if packable(*linears):
        weight = packed_weight(torch.cat([linear.weight for linear in linears]))
        biases = [linear.bias for linear in linears]
        bias = None if biases[0] is None else torch.cat(biases)
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if len(linears) == 1:
        return linears[0]
    return lambda x: torch.cat([linear(x) for linear in linears], dim=-1)


def gated(mlp: nn.Module) -> Product:
    """x [N, D] -> act(gate(x)) * up(x)."""
    if packable(mlp.gate_proj, mlp.up_proj) and mlp.config.hidden_act == "silu" and mlp.gate_proj.bias is None:
        gate, up = packed_weight(mlp.gate_proj.weight), packed_weight(mlp.up_proj.weight)
        pointwise = torch.ops.mkldnn._linear_pointwise
        return lambda x: pointwise.binary(x, pointwise(x, gate, None, "swish", [], ""), up, None, "mul")
    return lambda x: mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)


def packable(*linears: nn.Module) -> bool:
    """Whether oneDNN has a layout of its own for these weights: plain linear layers in bfloat16 on a CPU."""
    return all(
        type(linear) is nn.Linear and linear.weight.dtype == torch.bfloat16 and linear.weight.device.type == "cpu"
        for linear in linears
    ) and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed_weight(weight: torch.Tensor) -> torch.Tensor:
    """A copy of the weight in oneDNN's layout."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), CPU_TOKENS)
