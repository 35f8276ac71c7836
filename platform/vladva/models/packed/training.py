"""Training forward: a chunk -> embeddings and what predicts its captions, with gradients, and no more than they need.

As the fast forward of embedding (fast_forward.py): tokens are packed, those that follow the same tokens are computed
once, the last layer's output projection and MLP run only on the ends of prompts, and on captions where there is a
caption loss. But weights are used where they are, with LoRA, and every operation has a gradient (operations.py). The
frozen vision tower runs without; what it gave for an image can be handed in again.

B prompts, T tokens of the longest, N packed tokens, K tokens of captions, D width, H heads, K key-value heads of d.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from vladva.losses.next_token import cross_entropy_sum, mean_share
from vladva.models.packed.autograd_ops import (
    RotaryEmbedding,
    SharedPrefix,
    TokenEmbedding,
    causal_attention,
    embedded,
    lora_linear,
    norm,
    padded,
    swiglu,
)
from vladva.models.packed.clip_tower import with_packed_tower
from vladva.models.packed.packing import Packed, full, groups, pack

if TYPE_CHECKING:
    from types import ModuleType

    from transformers import PreTrainedConfig

    from vladva.config import RunConfig
    from vladva.models.embedding_model import EmbeddingModel

GROUP_TOKENS = {"cpu": 1024, "cuda": 32_768}
SHORT = 256  # tokens up to which a CPU computes attention as products and softmax, not by a fused kernel


def packing_unsupported(backbone: ModuleType, text: PreTrainedConfig, config: RunConfig) -> str | None:
    """Why a run must train the plain forward; None where it can do with this one.

    Dropout draws a mask for padded tokens, ZeRO-3 partitions the weights.
    """
    if config.model.lora_dropout:
        return "LoRA dropout"
    if config.train.zero_stage == 3:
        return "ZeRO-3"
    if text.model_type not in backbone.PACKED_DECODERS:
        return f"no packed forward for {text.model_type}"
    return "attention in a sliding window" if text.to_dict().get("sliding_window") is not None else None


@dataclass(frozen=True)
class Group:
    """A group of prompts with their captions, packed."""

    packed: Packed
    shared: SharedPrefix
    ends: Tensor  # [B] the column of each prompt's last token
    wanted: Tensor  # [U] the tokens whose last hidden state is needed: ends, and what predicts captions
    summary: Tensor  # [B] the end of each prompt among the U
    before: Tensor  # [K] what predicts each token of a caption among the U
    targets: Tensor  # [K] that token

    @classmethod
    def of(cls, ids_BT: np.ndarray, prompts_B: np.ndarray, packed: Packed, device: torch.device) -> Group:
        """The group of packed prompts, on the device."""
        rows, longest = packed.prompts.numpy(), int(packed.lengths.max())
        index, ends, steps = packed.index.numpy()[:, :longest], prompts_B[rows] - 1, np.arange(longest)
        predicts = (steps >= ends[:, None]) & (steps < packed.lengths.numpy()[:, None] - 1)
        needed = np.concatenate([index[np.arange(len(rows)), ends], index[predicts]])
        wanted, order = np.unique(needed, return_inverse=True)
        wanted = np.pad(wanted, (0, full(len(wanted)) - len(wanted)))
        targets = ids_BT[rows, 1:longest][predicts[:, :-1]]
        arrays = ends, wanted, order[: len(rows)], order[len(rows) :], targets
        shared = SharedPrefix(**{name: places.to(device) for name, places in vars(SharedPrefix.of(packed)).items()})
        return cls(packed.to(device), shared, *(torch.from_numpy(array).to(device) for array in arrays))


class PackedTraining:
    """Tokens, pixels -> embeddings, hidden states, of a model with a Llama's decoder (Qwen2's has biases besides)."""

    def __init__(self, model: EmbeddingModel) -> None:
        self.model = model
        self.language = model.base.model.language_model
        self.vision = with_packed_tower(model.base.model)
        self.depth = model.layer or len(self.language.layers)
        self.layers = [Layer(layer) for layer in self.language.layers]
        self.last = LastLayer(self.language.layers[self.depth - 1])

    def __call__(
        self, tokens: dict[str, Tensor], pixels: dict[str, Tensor] | None = None, caption_tokens: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Embeddings [B, D] (float32, unit norm) of the prompts, and the next-token loss of the captions after them.

        `caption_tokens` is the number of caption tokens in the global batch, over which the loss is a mean; with None
        the captions are left out, and the loss is 0.
        """
        if caption_tokens is None:
            prompts = tokens | {"lengths": tokens["prompt_lengths"]}
            embeddings_BD = self.run(prompts, pixels, captions=False)[0]
            return embeddings_BD, embeddings_BD.new_zeros(())
        embeddings_BD, before_KD, targets_K = self.with_captions(tokens, pixels)
        head = TokenEmbedding.of(self.model.base.lm_head)
        replaced = None if head.rows is None else (head.soft, head.rows)
        total = cross_entropy_sum(before_KD, head.base.weight, targets_K, replaced=replaced)
        return embeddings_BD, mean_share(total, caption_tokens)

    def with_captions(
        self, tokens: dict[str, Tensor], pixels: dict[str, Tensor] | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Embeddings [B, D]; final-normed hidden states [K, D] before all tokens of captions, and those tokens [K]."""
        return self.run(tokens, pixels, captions=True)

    def run(
        self, tokens: dict[str, Tensor], pixels: dict[str, Tensor] | None, *, captions: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both of the above. ZeRO adds up gradients in the order in which they come, which must be that of all ranks.

        So the way through the layers depends on `captions`, not on whether there is one in this chunk.
        """
        inputs = self.model.inputs(tokens, pixels)
        features_KD = None
        if pixels is not None:
            features_KD = pixels["features"] if "features" in pixels else self.image_features(inputs)
        ids_BT, prompts_B, lengths_B = (tokens[name].cpu().numpy() for name in ("ids", "prompt_lengths", "lengths"))
        device, image_token = tokens["ids"].device, self.model.base.config.image_token_id
        order, parts = [], []
        for rows in groups(lengths_B, GROUP_TOKENS[device.type]):
            group = Group.of(ids_BT, prompts_B, pack(ids_BT, lengths_B, rows, image_token), device)
            order.append(group.packed.prompts)
            parts.append((*self.states(group, inputs, features_KD, captions), group.targets))
        summaries_BD, before_KD, targets_K = (torch.cat(part) for part in zip(*parts, strict=True))
        return normalize(summaries_BD[torch.cat(order).argsort()].float(), dim=-1), before_KD, targets_K

    @torch.no_grad()
    def image_features(self, inputs: dict[str, Tensor]) -> Tensor:
        """Features [K, D] of the K image tokens of all images."""
        of_text = ("input_ids", "attention_mask", "position_ids")
        of_images = {name: value for name, value in inputs.items() if name not in of_text}
        return torch.cat(list(self.vision.get_image_features(**of_images).pooler_output))

    def states(
        self, group: Group, inputs: dict[str, Tensor], features_KD: Tensor | None, captions: bool
    ) -> tuple[Tensor, Tensor]:
        """Final-normed hidden states of a group: of prompts' ends [B, D], and before the tokens of captions [K, D]."""
        packed = group.packed
        tokens = packed.index.shape[1]
        features = None if features_KD is None else features_KD[packed.feature]
        hidden = embedded(self.language.embed_tokens, packed.ids, packed.is_image, features)
        positions = torch.arange(tokens, device=hidden.device)[None]
        if "position_ids" in inputs:  # [3, B, T]
            positions = packed.positions(inputs["position_ids"])
        turn = RotaryEmbedding.by(*self.language.rotary_emb(hidden, positions))
        mask_TT = None
        if not hidden.is_cuda and tokens <= SHORT:
            mask_TT = torch.full((tokens, tokens), -torch.inf, dtype=hidden.dtype).triu_(1)
        for layer in self.layers[: self.depth - 1]:
            hidden = layer(hidden, group, turn, mask_TT)
        ends_BD = None
        if not captions or self.depth < len(self.layers):
            ends_BD = norm(self.language.norm, self.last(hidden, group, turn))
            if not captions:
                return ends_BD, hidden[:0]
        for layer in self.layers[self.depth - 1 : -1]:
            hidden = layer(hidden, group, turn, mask_TT)
        hidden = norm(self.language.norm, self.layers[-1](hidden, group, turn, mask_TT, group.wanted))
        return hidden[group.summary] if ends_BD is None else ends_BD, hidden[group.before]


class Layer:
    """A decoder layer on packed tokens."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.attention, self.feed = layer, layer.self_attn, layer.mlp
        self.width = self.attention.head_dim
        self.kv_heads = self.attention.k_proj.out_features // self.width

    def __call__(
        self,
        hidden_ND: Tensor,
        group: Group,
        turn: RotaryEmbedding,
        mask_TT: Tensor | None,
        wanted_U: Tensor | None = None,
    ) -> Tensor:
        """Hidden states after the layer [N, D], or of the wanted tokens only [U, D]."""
        arguments = (hidden_ND, group, turn, mask_TT, wanted_U)
        if self.layer.gradient_checkpointing and torch.is_grad_enabled():
            return checkpoint(self.compute, *arguments, use_reentrant=False, preserve_rng_state=False)
        return self.compute(*arguments)

    def compute(
        self, hidden: Tensor, group: Group, turn: RotaryEmbedding, mask_TT: Tensor | None, wanted_U: Tensor | None
    ) -> Tensor:
        """The layer itself."""
        normed_ND = norm(self.layer.input_layernorm, hidden)
        heads_BTHd = self.heads(group, normed_ND, self.attention.q_proj, self.attention.k_proj, self.attention.v_proj)
        rest = heads_BTHd.shape[2] - self.kv_heads
        turned_BTHd, value_BTKd = heads_BTHd.split([rest, self.kv_heads], dim=2)
        query_BTHd, key_BTKd = turn(turned_BTHd).split([rest - self.kv_heads, self.kv_heads], dim=2)
        attended_BTD = causal_attention(query_BTHd, key_BTKd, value_BTKd, mask_TT)
        place = group.packed.place
        if wanted_U is not None:
            hidden, place = hidden.index_select(0, wanted_U), place[wanted_U]
        return self.output(hidden, attended_BTD.flatten(0, 1).index_select(0, place))

    def heads(self, group: Group, normed_ND: Tensor, *projections: nn.Module) -> Tensor:
        """Projections side by side, as padded rows of heads [B, T, heads, d]."""
        return padded(lora_linear(normed_ND, *projections), group.packed, group.shared).unflatten(2, (-1, self.width))

    def output(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Hidden states after attention's output projection, and the MLP."""
        hidden = hidden + lora_linear(attended, self.attention.o_proj)
        rms_norm_linear, mlp = norm(self.layer.post_attention_layernorm, hidden), self.feed
        if mlp.config.hidden_act == "silu":
            inner = swiglu(lora_linear(rms_norm_linear, mlp.gate_proj, mlp.up_proj))
        else:
            inner = mlp.act_fn(lora_linear(rms_norm_linear, mlp.gate_proj)) * lora_linear(rms_norm_linear, mlp.up_proj)
        return hidden + lora_linear(inner, mlp.down_proj)


class LastLayer(Layer):
    """The layer that is embedded from: packed tokens -> the last token of each prompt, whose query alone is needed."""

    def __call__(self, hidden_ND: Tensor, group: Group, turn: RotaryEmbedding) -> Tensor:
        """Hidden states [B, D] of the prompts' last tokens after the layer."""
        last_B = group.packed.index.gather(1, group.ends[:, None])[:, 0]
        normed_ND = norm(self.layer.input_layernorm, hidden_ND)
        pairs_BTHd = self.heads(group, normed_ND, self.attention.k_proj, self.attention.v_proj)
        key_BTKd, value_BTKd = pairs_BTHd.chunk(2, dim=2)
        query_B1Hd = lora_linear(normed_ND[last_B], self.attention.q_proj).view(len(last_B), 1, -1, self.width)
        seen_BT = torch.arange(key_BTKd.shape[1], device=last_B.device) <= group.ends[:, None]
        attended_BH1d = scaled_dot_product_attention(
            turn.at(group.ends)(query_B1Hd).transpose(1, 2),
            turn(key_BTKd).transpose(1, 2),
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
