"""Fast forward: prompts -> embeddings as the plain forward gives them, without what an embedding does not need.

1. No LM head and no layer after the one that is asked for. In that layer only the last token of a prompt goes on: its
   query, output projection and MLP; of the others, keys and values.
2. Nothing is padded in the linear layers: they run on the tokens of all prompts, one after the other (packing.py).
   Attention runs on padded rows of like length. It is causal and the padding is on the right, so that no token sees
   any, and no mask is needed.
3. Tokens that follow the same tokens are computed once: all prompts share what comes before the text or image, and
   many texts begin with the same words.
4. On a CPU with bfloat16 products the weights are packed for them (products.py), and what is cheap beside float32
   products is made as cheap as these: a norm's weight is in the product after it, and positions turn heads by one.
5. On a CPU every thread has groups of its own, small enough for its cache: threads need not wait for each other after
   every operation.

The vision tower sees all images of a call at once, whatever the groups are (a CLIP: fast_tower.py).

B prompts, T tokens of the longest, N packed tokens, D width, H heads, K key-value heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import normalize, scaled_dot_product_attention

from vladva.models.packed.clip_tower import with_packed_tower
from vladva.models.packed.cpu_linear import (
    CPU_TOKENS,
    Product,
    in_threads,
    keep_freed_memory,
    linear_residual,
    rms_norm_linear,
    swiglu,
)
from vladva.models.packed.packing import Packed, groups, pack

if TYPE_CHECKING:
    import numpy as np

    from vladva.models.embedding_model import EmbeddingModel

GPU_TOKENS = 32_768  # in a group
SHORT = 128  # tokens up to which a CPU computes attention as products and softmax, not by a fused kernel

Forward = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor] | None], torch.Tensor]


def embedding_forward(model: EmbeddingModel) -> Forward:
    """Tokens, pixels -> embeddings [B, D]: fast where the backbone says that its decoder is of a kind known here."""
    text = model.base.config.get_text_config()
    if text.model_type in model.backbone.PACKED_DECODERS and text.to_dict().get("sliding_window") is None:
        return PackedInference(model)
    return lambda tokens, pixels: model(tokens, pixels)[0]


class PackedInference:
    """Tokens, pixels -> embeddings [B, D], of a model with a Llama's decoder (Qwen2's has biases besides).

    Takes the memory of the decoder's weights once more where it packs them.
    """

    def __init__(self, model: EmbeddingModel) -> None:
        self.model = model
        self.language = model.base.model.language_model
        self.vision = with_packed_tower(model.base.model)
        self.threads = torch.get_num_threads()  # now: it is each thread's own, and that of a new one may be any
        if model.pixel_mean.device.type == "cpu":
            keep_freed_memory()
        self.num_key_value_groups = self.language.config.num_attention_heads // self.language.config.num_key_value_heads
        *layers, last = self.language.layers[: model.layer]
        self.layers = [Layer(layer) for layer in layers]
        self.last = LastLayer(last)

    def __call__(self, tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Embeddings [B, D] (float32, unit norm) of the prompts; captions after them are left out."""
        inputs = self.model.inputs(tokens, pixels)
        features_KD = None if pixels is None else self.image_features(inputs)
        ids_BT, lengths_B = (tokens[name].cpu().numpy() for name in ("ids", "prompt_lengths"))
        embeddings_BD = torch.empty(len(ids_BT), self.language.config.hidden_size, device=tokens["ids"].device)

        def embed(rows: np.ndarray) -> None:
            packed = pack(ids_BT, lengths_B, rows, self.model.base.config.image_token_id).to(embeddings_BD.device)
            embeddings_BD[packed.prompts] = self.embed(packed, inputs, features_KD)

        if embeddings_BD.is_cuda:
            for rows in groups(lengths_B, GPU_TOKENS):
                embed(rows)
        else:
            in_threads(embed, list(groups(lengths_B, CPU_TOKENS, self.threads)), self.threads)
        return embeddings_BD

    def image_features(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features [K, D] of the K image tokens of all images."""
        of_text = ("input_ids", "attention_mask", "position_ids")
        of_images = {name: value for name, value in inputs.items() if name not in of_text}
        return torch.cat(list(self.vision.get_image_features(**of_images).pooler_output))

    def embed(self, packed: Packed, inputs: dict[str, torch.Tensor], features_KD: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, D] of a group."""
        tokens = packed.index.shape[1]
        hidden_ND = self.language.embed_tokens(packed.ids)
        if features_KD is not None:
            hidden_ND[packed.is_image] = features_KD[packed.feature].to(hidden_ND.dtype)
        if "position_ids" in inputs:  # [3, B, T]: where the images are, they differ
            turn = RotaryEmbedding.by(*self.language.rotary_emb(hidden_ND, packed.positions(inputs["position_ids"])))
        else:
            turn = SharedRotaryEmbedding.by(
                *self.language.rotary_emb(hidden_ND, torch.arange(tokens, device=hidden_ND.device)[None])
            )
        mask = None
        if not hidden_ND.is_cuda and tokens <= SHORT:
            mask = (
                torch.full((tokens, tokens), -torch.inf, dtype=hidden_ND.dtype)
                .triu_(1)
                .repeat(self.num_key_value_groups, 1)
            )
        for layer in self.layers:
            hidden_ND = layer(hidden_ND, packed, turn, mask)
        hidden_BD = self.last(hidden_ND, packed, turn)
        return normalize(self.language.norm(hidden_BD).float(), dim=-1)


# ----------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotary positions: cosine and sine [T, B, 1, d]; the first half of the sine is negative."""

    cos: torch.Tensor
    sin: torch.Tensor

    @classmethod
    def by(cls, cos_BTd: torch.Tensor, sin_BTd: torch.Tensor) -> RotaryEmbedding:
        """The turn by angles whose second half repeats the first."""
        return cls(cos_BTd.transpose(0, 1)[:, :, None], signed(sin_BTd).transpose(0, 1)[:, :, None])

    def __call__(self, heads_TBHd: torch.Tensor) -> torch.Tensor:
        """Heads turned by their positions."""
        half = heads_TBHd.shape[-1] // 2
        swapped = torch.cat([heads_TBHd[..., half:], heads_TBHd[..., :half]], dim=-1)
        return (heads_TBHd * self.cos).addcmul_(swapped, self.sin)

    def at(self, places_B: torch.Tensor) -> RotaryEmbedding:
        """For one token of each prompt, [B, 1, 1, d]."""
        rows = torch.arange(len(places_B), device=places_B.device)
        return RotaryEmbedding(self.cos[places_B, rows][:, None], self.sin[places_B, rows][:, None])


@dataclass(frozen=True)
class SharedRotaryEmbedding:
    """Rotary positions that are the same for all prompts, as matrices [T, d, d]: one product turns all heads."""

    matrix: torch.Tensor

    @classmethod
    def by(cls, cos_1Td: torch.Tensor, sin_1Td: torch.Tensor) -> SharedRotaryEmbedding:
        """The turn by angles whose second half repeats the first."""
        same = torch.eye(cos_1Td.shape[-1], dtype=cos_1Td.dtype, device=cos_1Td.device)
        other = same.roll(len(same) // 2, dims=0)
        return cls(cos_1Td[0, :, None] * same + signed(sin_1Td)[0, :, None] * other)

    def __call__(self, heads_TBHd: torch.Tensor) -> torch.Tensor:
        """Heads turned by their positions."""
        return torch.bmm(heads_TBHd.flatten(1, 2), self.matrix).view(heads_TBHd.shape)

    def at(self, places_B: torch.Tensor) -> SharedRotaryEmbedding:
        """For one token of each prompt, [B, d, d]."""
        return SharedRotaryEmbedding(self.matrix[places_B])


def signed(sin: torch.Tensor) -> torch.Tensor:
    """The sine with which the other half of a head is added: negative in the first half."""
    half = sin.shape[-1] // 2
    return torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)


class Layer:
    """A decoder layer on packed tokens."""

    def __init__(self, layer: nn.Module) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.width = attention.head_dim
        self.kv_heads = attention.k_proj.out_features // self.width
        self.project = self.projections(layer.input_layernorm, attention)
        self.output, self.down = linear_residual(attention.o_proj), linear_residual(mlp.down_proj)
        self.swiglu = swiglu(layer.post_attention_layernorm, mlp)

    def projections(self, norm: nn.Module, attention: nn.Module) -> Product:
        """Queries, keys and values side by side."""
        return rms_norm_linear(norm, attention.q_proj, attention.k_proj, attention.v_proj)

    def __call__(
        self,
        hidden_ND: torch.Tensor,
        packed: Packed,
        turn: RotaryEmbedding | SharedRotaryEmbedding,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states [N, D] after the layer."""
        turned_TBHd, value_BTKd = self.heads(hidden_ND, packed, turn)
        query_TBHd, key_TBKd = turned_TBHd.tensor_split([-self.kv_heads], dim=2)
        attended_BTD = causal_attention(query_TBHd, key_TBKd, value_BTKd, mask)
        return self.mlp(self.output(attended_BTD.flatten(0, 1).index_select(0, packed.place), hidden_ND))

    def heads(
        self, hidden_ND: torch.Tensor, packed: Packed, turn: RotaryEmbedding | SharedRotaryEmbedding
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (in a layer that has all) and keys [T, B, heads, d], turned, and values [B, T, K, d]; padded."""
        turned_NE, value_NE = self.project(hidden_ND).tensor_split([-self.kv_heads * self.width], dim=1)
        prompts, tokens = packed.index.shape
        heads_TBHd = turned_NE.index_select(0, packed.index.t().flatten()).view(tokens, prompts, -1, self.width)
        value_BTKd = value_NE.index_select(0, packed.index.flatten()).view(prompts, tokens, -1, self.width)
        return turn(heads_TBHd), value_BTKd

    def mlp(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states after the MLP."""
        return self.down(self.swiglu(hidden), hidden)


class LastLayer(Layer):
    """The layer that is embedded from: packed tokens -> the last token of each prompt."""

    def projections(self, norm: nn.Module, attention: nn.Module) -> Product:
        """Keys and values side by side; few queries are needed."""
        self.query = rms_norm_linear(norm, attention.q_proj)
        return rms_norm_linear(norm, attention.k_proj, attention.v_proj)

    def __call__(
        self, hidden_ND: torch.Tensor, packed: Packed, turn: RotaryEmbedding | SharedRotaryEmbedding
    ) -> torch.Tensor:
        """Hidden states [B, D] of the last tokens after the layer."""
        ends = packed.lengths - 1
        hidden_BD = hidden_ND[packed.index.gather(1, ends[:, None])[:, 0]]
        key_TBKd, value_BTKd = self.heads(hidden_ND, packed, turn)
        query_B1Hd = turn.at(ends)(self.query(hidden_BD).view(len(ends), 1, -1, self.width))
        inside_BT = torch.arange(packed.index.shape[1], device=ends.device) < packed.lengths[:, None]
        attended_BH1d = scaled_dot_product_attention(
            query_B1Hd.transpose(1, 2),
            key_TBKd.permute(1, 2, 0, 3),
            value_BTKd.transpose(1, 2),
            attn_mask=inside_BT[:, None, None],
            enable_gqa=True,
        )
        return self.mlp(self.output(attended_BH1d.flatten(1), hidden_BD))


def causal_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
) -> torch.Tensor:
    """Causal attention [B, T, H * d] of query [T, B, H, d], key [T, B, K, d] and value [B, T, K, d].

    By a fused kernel, or, with a mask [H / K * T, T] (0, -inf after the diagonal), as products and softmax.
    """
    (tokens, rows, heads, width), kv_heads = query.shape, key.shape[2]
    if mask is None:
        query, key = query.permute(1, 2, 0, 3), key.permute(1, 2, 0, 3)
        attended = scaled_dot_product_attention(
            query, key, value.transpose(1, 2), is_causal=True, enable_gqa=heads > kv_heads
        )
        return attended.transpose(1, 2).flatten(2)
    # The query heads of a key-value head are more rows of the same product.
    group = heads // kv_heads
    query = query.view(tokens, rows, kv_heads, group, width).permute(1, 2, 3, 0, 4).reshape(-1, group * tokens, width)
    key, value = key.permute(1, 2, 0, 3).reshape(-1, tokens, width), value.transpose(1, 2).reshape(-1, tokens, width)
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=width**-0.5)
    attended = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value)
    return attended.view(rows, kv_heads, group, tokens, width).permute(0, 3, 1, 2, 4).reshape(rows, tokens, -1)
