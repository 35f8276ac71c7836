"""Packed training: a micro-batch -> embeddings and what predicts its captions, with gradients, no more than they need.

As packed inference (inference.py): tokens are packed, those that follow the same tokens are computed once, the last
layer's output projection and MLP run only on the ends of prompts, and on captions where there is a caption loss. But
weights are used as they are, with LoRA, and every operation has a gradient (autograd_ops.py). The frozen vision tower
runs without; the features that it gave for an image can be handed in again.

B prompts, T tokens of the longest, N packed tokens, K tokens of captions, D width, H heads, K key-value heads of d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from vladva.losses.next_token import cross_entropy_sum, mean_share
from vladva.models.batch import host_array
from vladva.models.packed.autograd_ops import (
    SharedPrefix,
    SoftPlaces,
    TokenEmbedding,
    causal_attention,
    embedded,
    lora_linear,
    padded,
    rms_norm,
    swiglu,
)
from vladva.models.packed.decoder import Decoder, DecoderLayer, LinearLayer, packing_unsupported
from vladva.models.packed.packing import Packed, groups, pack, round_up
from vladva.models.packed.rope import RotaryEmbedding
from vladva.models.packed.towers import image_features, with_packed_tower
from vladva.models.transfer import to_device

if TYPE_CHECKING:
    from vladva.config import RunConfig
    from vladva.models.embedding_model import EmbeddingModel

GROUP_TOKENS = {"cpu": 1024, "cuda": 32_768}
UNFUSED_TRAINING_TOKENS = 256  # up to which a CPU computes attention as products and softmax, not by a fused kernel


@dataclass(frozen=True)
class Group:
    """A group of prompts with their captions, packed."""

    packed: Packed
    shared: SharedPrefix
    soft: SoftPlaces
    ends: Tensor  # [B] the column of each prompt's last token
    wanted: Tensor  # [U] the tokens whose last hidden state is needed: ends, and what predicts captions
    summary: Tensor  # [B] the end of each prompt among the U
    before: Tensor  # [K] what predicts each token of a caption among the U
    targets: Tensor  # [K] that token

    @classmethod
    def of(
        cls,
        ids_BT: np.ndarray,
        prompts_B: np.ndarray,
        packed: Packed,
        soft_ids: Sequence[int] = (),
        *,
        few_sizes: bool = True,
    ) -> Group:
        """The group of packed prompts, on the host. soft_ids: the trained soft prompts. few_sizes: as in `pack`."""
        rows, longest = packed.prompts.numpy(), int(packed.lengths.max())
        index, ends, steps = packed.gather_index.numpy()[:, :longest], prompts_B[rows] - 1, np.arange(longest)
        # A caption's tokens are predicted from its prompt's last token to its own last but one.
        predicts = (steps >= ends[:, None]) & (steps < packed.lengths.numpy()[:, None] - 1)
        needed = np.concatenate([index[np.arange(len(rows)), ends], index[predicts]])
        wanted, order = np.unique(needed, return_inverse=True)
        if few_sizes:
            wanted = np.pad(wanted, (0, round_up(len(wanted)) - len(wanted)))
        targets = ids_BT[rows, 1:longest][predicts[:, :-1]]
        arrays = ends, wanted, order[: len(rows)], order[len(rows) :], targets
        return cls(packed, SharedPrefix.of(packed), SoftPlaces.of(packed, soft_ids), *map(torch.from_numpy, arrays))

    def to(self, device: torch.device) -> Group:
        """The same, of a group that is on the host, on a device: one copy."""
        if device.type == "cpu":
            return self
        parts: dict[str, Any] = {"packed": self.packed, "shared": self.shared, "soft": self.soft}
        own = {name: value.numpy() for name, value in vars(self).items() if name not in parts}
        theirs = {
            f"{part}.{name}": value.numpy()
            for part, record in parts.items()
            for name, value in vars(record).items()
            if isinstance(value, Tensor)
        }
        there = to_device(own | theirs, device)

        def of_part(part: str) -> dict[str, Tensor]:
            return {name.removeprefix(f"{part}."): there[name] for name in theirs if name.startswith(f"{part}.")}

        return Group(
            packed=Packed(**of_part("packed"), num_unique=self.packed.num_unique),
            shared=SharedPrefix(**of_part("shared")),
            soft=SoftPlaces(**of_part("soft")),
            **{name: there[name] for name in own},
        )


class PackedTraining:
    """Tokens, pixels -> embeddings, hidden states, of a model with a Llama's decoder (Qwen2's has biases besides)."""

    def __init__(self, model: EmbeddingModel) -> None:
        self.model = model
        self.language: Decoder = model.base.model.language_model
        self.vision = with_packed_tower(model.base.model)
        self.depth = model.layer or len(self.language.layers)
        self.layers = [TrainingLayer(layer) for layer in self.language.layers]
        self.last = LastTrainingLayer(self.language.layers[self.depth - 1])
        self._soft: Tensor | None = None

    def __call__(
        self, tokens: dict[str, Tensor], pixels: dict[str, Tensor] | None = None, caption_tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, D] (float32, unit norm) of the prompts, and the next-token loss of the captions after them.

        `caption_tokens` is the number of caption tokens in the global batch, over which the loss is a mean; with None
        the captions are left out, and the loss is 0.
        """
        if caption_tokens is None:
            prompts = tokens | {"lengths": tokens["prompt_lengths"]}
            if "host_lengths" in tokens:
                prompts |= {"host_lengths": tokens["host_prompt_lengths"]}
            embeddings_BD = self.run(prompts, pixels, captions=False)[0]
            return embeddings_BD, embeddings_BD.new_zeros(())
        embeddings_BD, before_KD, targets_K = self.with_captions(tokens, pixels)
        # With trained rows of a tied head, the loss is told them: no copy of the whole head is made.
        head = TokenEmbedding.of(self.model.base.lm_head)
        replaced = None if head.rows is None else (self.soft(head), head.rows)
        total = cross_entropy_sum(before_KD, head.base.weight, targets_K, replaced=replaced)
        return embeddings_BD, mean_share(total, caption_tokens)

    def soft(self, head: TokenEmbedding) -> Tensor:
        """The tokens [S] whose rows are trained, on the device: copied once, as they stay the same."""
        if self._soft is None:
            self._soft = torch.tensor(head.soft_ids, device=head.base.weight.device)
        return self._soft

    def with_captions(
        self, tokens: dict[str, Tensor], pixels: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, D]; final-normed hidden states [K, D] before all tokens of captions, and those tokens [K]."""
        return self.run(tokens, pixels, captions=True)

    def run(
        self, tokens: dict[str, Tensor], pixels: dict[str, Tensor] | None, *, captions: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What `with_captions` gives; without captions, the last two are empty.

        ZeRO adds up gradients in the order in which they come, which must be that of all ranks: so the way through the
        layers depends on `captions`, not on whether this micro-batch has one.
        """
        inputs = self.model.inputs(tokens, pixels)
        features_KD = None
        if pixels is not None:
            features_KD = pixels["features"] if "features" in pixels else self.image_features(inputs, pixels)
        ids_BT, prompts_B, lengths_B = (host_array(tokens, name) for name in ("ids", "prompt_lengths", "lengths"))
        device, image_token = tokens["ids"].device, self.model.base.config.image_token_id
        table = TokenEmbedding.of(self.language.embed_tokens)
        few_sizes = device.type == "cpu"
        order, parts = [], []
        for rows in groups(lengths_B, GROUP_TOKENS[device.type]):
            packed = pack(ids_BT, lengths_B, rows, image_token, few_sizes=few_sizes)
            group = Group.of(ids_BT, prompts_B, packed, table.soft_ids, few_sizes=few_sizes).to(device)
            order.append(group.packed.prompts)
            parts.append((*self.states(group, table, inputs, features_KD, captions), group.targets))
        summaries_BD, before_KD, targets_K = (torch.cat(part) for part in zip(*parts, strict=True))
        return normalize(summaries_BD[torch.cat(order).argsort()].float(), dim=-1), before_KD, targets_K

    @torch.no_grad()
    def image_features(self, inputs: dict[str, Tensor], pixels: dict[str, Tensor]) -> Tensor:
        """Features [K, D] of the K image tokens of all images."""
        return image_features(self.vision, inputs, pixels)

    def states(
        self,
        group: Group,
        table: TokenEmbedding,
        inputs: dict[str, Tensor],
        features_KD: Tensor | None,
        captions: bool,
    ) -> tuple[Tensor, Tensor]:
        """Final-normed hidden states of a group: of prompts' ends [B, D], and before the tokens of captions [K, D]."""
        packed = group.packed
        tokens = packed.gather_index.shape[1]
        features = None if features_KD is None else features_KD[packed.feature]
        hidden = embedded(table, packed, group.soft, features)
        positions = torch.arange(tokens, device=hidden.device)[None]
        if "position_ids" in inputs:  # [3, B, T]
            positions = packed.positions(inputs["position_ids"])
        rotary = RotaryEmbedding.from_cos_sin(*self.language.rotary_emb(hidden, positions))
        mask_TT = None
        if not hidden.is_cuda and tokens <= UNFUSED_TRAINING_TOKENS:
            mask_TT = torch.full((tokens, tokens), -torch.inf, dtype=hidden.dtype).triu_(1)
        for layer in self.layers[: self.depth - 1]:
            hidden = layer(hidden, group, rotary, mask_TT)
        # Prompts are embedded after `depth` layers, captions predicted after all.
        ends_BD = None
        if not captions or self.depth < len(self.layers):
            ends_BD = rms_norm(self.language.norm, self.last(hidden, group, rotary))
            if not captions:
                return ends_BD, hidden[:0]
        for layer in self.layers[self.depth - 1 : -1]:
            hidden = layer(hidden, group, rotary, mask_TT)
        hidden = rms_norm(self.language.norm, self.layers[-1](hidden, group, rotary, mask_TT, group.wanted))
        return hidden[group.summary] if ends_BD is None else ends_BD, hidden[group.before]


class _Parts:
    """What both kinds of layer do: projections to heads, and what comes after attention."""

    def __init__(self, layer: DecoderLayer) -> None:
        self.layer, self.attention = layer, layer.self_attn
        self.width = self.attention.head_dim
        self.kv_heads = self.attention.k_proj.out_features // self.width

    def heads(self, group: Group, normed_ND: Tensor, *projections: LinearLayer) -> Tensor:
        """Projections side by side, as padded rows of heads [B, T, heads, d]."""
        return padded(lora_linear(normed_ND, *projections), group.packed, group.shared).unflatten(2, (-1, self.width))

    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Hidden states after attention's output projection, and the MLP."""
        hidden = hidden + lora_linear(attended, self.attention.o_proj)
        normed, mlp = rms_norm(self.layer.post_attention_layernorm, hidden), self.layer.mlp
        if mlp.config.hidden_act == "silu":
            inner = swiglu(lora_linear(normed, mlp.gate_proj, mlp.up_proj))
        else:
            inner = mlp.act_fn(lora_linear(normed, mlp.gate_proj)) * lora_linear(normed, mlp.up_proj)
        return hidden + lora_linear(inner, mlp.down_proj)


class TrainingLayer(_Parts):
    """A decoder layer on packed tokens."""

    def __call__(
        self,
        hidden_ND: Tensor,
        group: Group,
        rotary: RotaryEmbedding,
        mask_TT: Tensor | None,
        wanted_U: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the layer [N, D], or of the wanted tokens only [U, D]."""
        arguments = (hidden_ND, group, rotary, mask_TT, wanted_U)
        if self.layer.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self.compute(*arguments)

    def compute(
        self, hidden: Tensor, group: Group, rotary: RotaryEmbedding, mask_TT: Tensor | None, wanted_U: Tensor | None
    ) -> Tensor:
        """The layer itself."""
        # Packed tokens -> padded rows of query, key and value heads.
        normed_ND = rms_norm(self.layer.input_layernorm, hidden)
        heads_BTHd = self.heads(group, normed_ND, self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        # Queries and keys, which lie side by side, are rotated together.
        rest = heads_BTHd.shape[2] - self.kv_heads
        both_BTHd, value_BTKd = heads_BTHd.split([rest, self.kv_heads], dim=2)
        query_BTHd, key_BTKd = rotary(both_BTHd).split([rest - self.kv_heads, self.kv_heads], dim=2)
        attended_BTD = causal_attention(query_BTHd, key_BTKd, value_BTKd, mask_TT)
        # Back to packed tokens, or to the wanted ones of these.
        source_index = group.packed.source_index
        if wanted_U is not None:
            hidden, source_index = hidden.index_select(0, wanted_U), source_index[wanted_U]
        return self.output(hidden, attended_BTD.flatten(0, 1).index_select(0, source_index))


class LastTrainingLayer(_Parts):
    """The layer that is embedded from: packed tokens -> the last token of each prompt, whose query alone is needed."""

    def __call__(self, hidden_ND: Tensor, group: Group, rotary: RotaryEmbedding) -> Tensor:
        """Hidden states [B, D] of the prompts' last tokens after the layer."""
        last_B = group.packed.gather_index.gather(1, group.ends[:, None])[:, 0]
        # Keys and values of all tokens, queries of the last ones.
        normed_ND = rms_norm(self.layer.input_layernorm, hidden_ND)
        pairs_BTHd = self.heads(group, normed_ND, self.attention.k_proj, self.attention.v_proj)
        key_BTKd, value_BTKd = pairs_BTHd.chunk(2, dim=2)
        query_B1Hd = lora_linear(normed_ND[last_B], self.attention.q_proj).view(len(last_B), 1, -1, self.width)
        # A prompt's last token sees that prompt, not the caption or the padding after it.
        seen_BT = torch.arange(key_BTKd.shape[1], device=last_B.device) <= group.ends[:, None]
        attended_BH1d = scaled_dot_product_attention(
            rotary.at(group.ends)(query_B1Hd).transpose(1, 2),
            rotary(key_BTKd).transpose(1, 2),
            value_BTKd.transpose(1, 2),
            attn_mask=seen_BT[:, None, None],
            enable_gqa=True,
        )
        return self.output(hidden_ND[last_B], attended_BH1d.flatten(1))


def pack_training(model: EmbeddingModel, config: RunConfig) -> str | None:
    """Train on packed tokens from now on; returns the reason where that cannot be."""
    reason = packing_unsupported(model.backbone, model.base.config.get_text_config(), config)
    if reason is None:
        model.packed = PackedTraining(model)
    return reason
