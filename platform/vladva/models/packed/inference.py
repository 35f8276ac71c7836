"""Packed inference: prompts -> embeddings as the padded forward gives them, without what an embedding does not need.

1. No LM head and no layer after the one that is asked for. In that layer only the last token of a prompt goes on: its
   query, output projection and MLP; of the others, keys and values.
2. Nothing is padded in the linear layers: they run on the tokens of all prompts, one after the other (packing.py).
   Attention runs on padded rows of like length. It is causal and the padding is on the right, so that no token sees
   any, and no mask is needed.
3. Tokens that follow the same tokens are computed once: all prompts share what comes before the text or image, and
   many texts begin with the same words.
4. On a CPU with bfloat16 products the weights are packed for them (cpu_linear.py): a norm's weight is in the product
   after it, and shared positions rotate heads by one product.
5. On a CPU every thread has groups of its own, small enough for its cache: threads need not wait for each other after
   every operation.

The vision tower sees all images of a call at once, whatever the groups are (towers.py).

B prompts, T tokens of the longest, N packed tokens, D width, H heads, K key-value heads, d width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import normalize, scaled_dot_product_attention

from vladva.models.batch import host_array
from vladva.models.packed.cpu_linear import (
    CPU_TOKENS,
    in_threads,
    keep_freed_memory,
)
from vladva.models.packed.decoder import Decoder, decoder_unsupported
from vladva.models.packed.packing import Packed, groups, pack
from vladva.models.packed.rope import RotaryEmbedding, Rotation, SharedRotaryEmbedding
from vladva.models.packed.row_linear import SharedDecoder, SharedLayer, rows_unsupported
from vladva.models.packed.towers import image_features, with_packed_tower

if TYPE_CHECKING:
    import numpy as np

    from vladva.models.embedding_model import EmbeddingModel

GPU_TOKENS = 32_768  # in a group
UNFUSED_TOKENS = 128  # up to which a CPU computes attention as products and softmax, not by a fused kernel

Forward = Callable[[dict[str, torch.Tensor], dict[str, torch.Tensor] | None], torch.Tensor]


def embedding_forward(model: EmbeddingModel) -> Forward:
    """Tokens, pixels -> embeddings [B, D]: on packed tokens where the decoder is of a kind known here."""
    if packed_unsupported(model) is None:
        return PackedInference(model)
    return lambda tokens, pixels: model(tokens, pixels)[0]


def packed_unsupported(model: EmbeddingModel) -> str | None:
    """Why a model cannot be run on packed tokens; None where it can."""
    return decoder_unsupported(model.backbone, model.base.config.get_text_config()) or rows_unsupported(model.base)


class PackedInference:
    """Tokens, pixels -> embeddings [B, D], of a model with a Llama's decoder (Qwen2's has biases besides).

    Takes the memory of the decoder's weights once more where it packs them.
    """

    def __init__(self, model: EmbeddingModel, decoder: SharedDecoder | None = None) -> None:
        """`decoder`: the weights of the same model, where others use them too."""
        self.model = model
        self.language: Decoder = model.base.model.language_model
        self.vision = with_packed_tower(model.base.model, keep_plain=decoder is None or decoder.keep_plain)
        self.threads = torch.get_num_threads()  # now: it is each thread's own, and that of a new one may be any
        if model.pixel_mean.device.type == "cpu":
            keep_freed_memory()
        self.num_key_value_groups = self.language.config.num_attention_heads // self.language.config.num_key_value_heads
        self.decoder = decoder or SharedDecoder(model)
        last = model.layer or self.decoder.depth
        self.layers = [InferenceLayer(self.decoder.layer(number)) for number in range(1, last)]
        self.last = LastInferenceLayer(self.decoder.layer(last))

    def __call__(self, tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
        """Embeddings [B, D] (float32, unit norm) of the prompts; captions after them are not read."""
        inputs = self.model.inputs(tokens, pixels)
        features_KD = None if pixels is None else image_features(self.vision, inputs, pixels)
        ids_BT, lengths_B = host_array(tokens, "ids"), host_array(tokens, "prompt_lengths")
        image_token = self.model.base.config.image_token_id
        embeddings_BD = torch.empty(len(ids_BT), self.language.config.hidden_size, device=tokens["ids"].device)

        def embed(rows: np.ndarray) -> None:
            packed = pack(ids_BT, lengths_B, rows, image_token, few_sizes=not embeddings_BD.is_cuda)
            packed = packed.to(embeddings_BD.device)
            embeddings_BD[packed.prompts] = self.embed(packed, inputs, features_KD)

        if embeddings_BD.is_cuda:
            for rows in groups(lengths_B, GPU_TOKENS, padding=GPU_TOKENS // 2):
                embed(rows)
        else:
            cut = groups(lengths_B, CPU_TOKENS, self.threads, padding=CPU_TOKENS // 2)
            in_threads(embed, list(cut), self.threads)
        return embeddings_BD

    def embed(self, packed: Packed, inputs: dict[str, torch.Tensor], features_KD: torch.Tensor | None) -> torch.Tensor:
        """Embeddings [B, D] of a group."""
        tokens = packed.gather_index.shape[1]
        adapter = self.decoder.adapter_on
        hidden_ND = self.decoder.embed(packed.ids, adapter)
        if features_KD is not None:
            hidden_ND.index_copy_(0, packed.image_index, features_KD[packed.feature].to(hidden_ND.dtype))
        rotation: Rotation
        if "position_ids" in inputs:  # [3, B, T]: where the images are, they differ
            cos, sin = self.language.rotary_emb(hidden_ND, packed.positions(inputs["position_ids"]))
            rotation = RotaryEmbedding.from_cos_sin(cos, sin, tokens_first=True)
        else:
            cos, sin = self.language.rotary_emb(hidden_ND, torch.arange(tokens, device=hidden_ND.device)[None])
            rotation = SharedRotaryEmbedding.from_cos_sin(cos, sin)
        mask = None
        if not hidden_ND.is_cuda and tokens <= UNFUSED_TOKENS:
            after_diagonal = torch.full((tokens, tokens), -torch.inf, dtype=hidden_ND.dtype).triu_(1)
            mask = after_diagonal.repeat(self.num_key_value_groups, 1)
        for layer in self.layers:
            hidden_ND = layer(hidden_ND, packed, rotation, mask, adapter)
        hidden_BD = self.last(hidden_ND, packed, rotation, adapter)
        return normalize(self.language.norm(hidden_BD).float(), dim=-1)


# ----------------------------------------------------------------------------------------------------------- layers


class _Parts:
    """What both kinds of layer do: padded rows of heads, on the weights of a layer that others may share."""

    def __init__(self, shared: SharedLayer) -> None:
        self.shared = shared

    def heads(
        self, projected_NE: torch.Tensor, packed: Packed, rotation: Rotation
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries (in a layer that has all) and keys [T, B, heads, d], rotated, and values [B, T, K, d]; padded."""
        width = self.shared.width
        rotated_NE, value_NE = projected_NE.tensor_split([-self.shared.kv_heads * width], dim=1)
        prompts, tokens = packed.gather_index.shape
        # What is rotated has the tokens first: then one product rotates the heads of a token in all prompts.
        by_token, by_prompt = packed.gather_index.t().flatten(), packed.gather_index.flatten()
        heads_TBHd = rotated_NE.index_select(0, by_token).view(tokens, prompts, -1, width)
        value_BTKd = value_NE.index_select(0, by_prompt).view(prompts, tokens, -1, width)
        return rotation(heads_TBHd), value_BTKd

    def rest(self, attended_ND: torch.Tensor, hidden_ND: torch.Tensor, adapter: bool) -> torch.Tensor:
        """Hidden states after what comes after attention."""
        return self.shared.mlp(self.shared.output.residual(attended_ND, hidden_ND, adapter), adapter)


class InferenceLayer(_Parts):
    """A decoder layer on packed tokens."""

    def __call__(
        self, hidden_ND: torch.Tensor, packed: Packed, rotation: Rotation, mask: torch.Tensor | None, adapter: bool
    ) -> torch.Tensor:
        """Hidden states [N, D] after the layer."""
        projected_NE = self.shared.query_key_value(hidden_ND, adapter)
        rotated_TBHd, value_BTKd = self.heads(projected_NE, packed, rotation)
        query_TBHd, key_TBKd = rotated_TBHd.tensor_split([-self.shared.kv_heads], dim=2)
        attended_BTD = tokens_first_attention(query_TBHd, key_TBKd, value_BTKd, mask)
        # Back to packed tokens.
        attended_ND = attended_BTD.flatten(0, 1).index_select(0, packed.source_index)
        return self.rest(attended_ND, hidden_ND, adapter)


class LastInferenceLayer(_Parts):
    """The layer that is embedded from: packed tokens -> the last token of each prompt, whose query alone is needed."""

    def __call__(self, hidden_ND: torch.Tensor, packed: Packed, rotation: Rotation, adapter: bool) -> torch.Tensor:
        """Hidden states [B, D] of the last tokens after the layer."""
        ends = packed.lengths - 1
        hidden_BD = hidden_ND[packed.gather_index.gather(1, ends[:, None])[:, 0]]
        key_TBKd, value_BTKd = self.heads(self.shared.key_value(hidden_ND, adapter), packed, rotation)
        query_BE = self.shared.last_query(hidden_BD, adapter)
        query_B1Hd = rotation.at(ends)(query_BE.view(len(ends), 1, -1, self.shared.width))
        inside_BT = torch.arange(packed.gather_index.shape[1], device=ends.device) < packed.lengths[:, None]
        attended_BH1d = scaled_dot_product_attention(
            query_B1Hd.transpose(1, 2),
            key_TBKd.permute(1, 2, 0, 3),
            value_BTKd.transpose(1, 2),
            attn_mask=inside_BT[:, None, None],
            enable_gqa=True,
        )
        return self.rest(attended_BH1d.flatten(1), hidden_BD, adapter)


def tokens_first_attention(
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
    # The query heads of a key-value head are more rows of the same product: [B * K, H / K * T, d] x [B * K, d, T].
    group = heads // kv_heads
    query = query.view(tokens, rows, kv_heads, group, width).permute(1, 2, 3, 0, 4).reshape(-1, group * tokens, width)
    key, value = key.permute(1, 2, 0, 3).reshape(-1, tokens, width), value.transpose(1, 2).reshape(-1, tokens, width)
    scores = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=width**-0.5)
    attended = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(value.dtype), value)
    return attended.view(rows, kv_heads, group, tokens, width).permute(0, 3, 1, 2, 4).reshape(rows, tokens, -1)
