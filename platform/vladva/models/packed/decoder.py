"""Decoder: what the two packed forwards share: which models they can run, and how a layer of these is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from vladva.config import RunConfig
    from vladva.models.backbones import Backbone


class LinearLayer(Protocol):
    """A linear layer of torch's, or one with LoRA of PEFT's."""

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, /) -> Tensor:
        """x [N, in] -> [N, out]."""
        ...


class RMSNorm(Protocol):
    """A root-mean-square norm."""

    weight: Tensor
    variance_epsilon: float

    def __call__(self, x: Tensor, /) -> Tensor:
        """Rows divided by their root mean square, times the weight."""
        ...


class Attention(Protocol):
    """Attention with rotary positions, its key-value heads shared by groups of query heads."""

    head_dim: int
    q_proj: LinearLayer
    k_proj: LinearLayer
    v_proj: LinearLayer
    o_proj: LinearLayer


class GatedMLP(Protocol):
    """down(act(gate(x)) * up(x))."""

    config: Any  # `hidden_act` names the activation
    act_fn: Any
    gate_proj: LinearLayer
    up_proj: LinearLayer
    down_proj: LinearLayer


class DecoderLayer(Protocol):
    """A layer of a Llama, or of what is built like one (Mistral, Qwen2: with biases besides)."""

    gradient_checkpointing: bool
    input_layernorm: RMSNorm
    self_attn: Attention
    post_attention_layernorm: RMSNorm
    mlp: GatedMLP


class Decoder(Protocol):
    """A language model without its head."""

    config: Any
    embed_tokens: torch.nn.Module
    layers: Sequence[DecoderLayer]
    norm: RMSNorm

    def rotary_emb(self, hidden: Tensor, positions: Tensor, /) -> tuple[Tensor, Tensor]:
        """Cosine and sine [B, T, d] of positions [B, T], or [3, B, T] where images have rows and columns."""
        ...


def decoder_unsupported(backbone: Backbone, text: PreTrainedConfig) -> str | None:
    """Why a language model cannot be run on packed tokens; None where it can. text: its configuration."""
    if text.model_type not in backbone.packed_decoders:
        return f"no packed forward for {text.model_type}"
    return "attention in a sliding window" if text.to_dict().get("sliding_window") is not None else None


def packing_unsupported(backbone: Backbone, text: PreTrainedConfig, config: RunConfig) -> str | None:
    """Why a run must train on padded tokens; None where it can train on packed ones.

    Dropout draws a mask for padded tokens, ZeRO-3 partitions the weights.
    """
    if config.model.lora_dropout:
        return "LoRA dropout"
    if config.train.zero_stage == 3:
        return "ZeRO-3"
    return decoder_unsupported(backbone, text)
