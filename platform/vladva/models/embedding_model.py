"""Embedding model: what is trained, an LVLM that gives a normalised vector for an image or a text, and both losses.

The embedding is the hidden state at the last prompt token of layer k, after the model's final norm, L2-normalised in
float32.

B images or texts, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import nn
from torch.nn.functional import normalize

from vladva.config import ModelConfig
from vladva.losses.next_token import next_token
from vladva.models.preprocessor import Preprocessor


class PackedForward(Protocol):
    """A forward without padding that training can run on (packed/training.py)."""

    def __call__(
        self, tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None, caption_tokens: int | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embeddings [B, D] and the next-token loss, as `EmbeddingModel.forward` gives them."""
        ...

    def image_features(self, inputs: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor]) -> torch.Tensor:
        """Features [K, D] of the K image tokens of all images."""
        ...


class EmbeddingModel(nn.Module):
    """The trained module: backbone with adapter, and the scalars that are learned with the contrastive loss.

    scalars: their names and values; each becomes a parameter of that name. mapped: leave the LVLM's weights in its
    files, in their dtype, for someone who takes them from there one by one.
    """

    pixel_mean: torch.Tensor
    pixel_std: torch.Tensor

    def __init__(
        self,
        config: ModelConfig,
        preprocessor: Preprocessor,
        *,
        scalars: Mapping[str, float] | None = None,
        device: torch.device | str = "cpu",
        mapped: bool = False,
    ) -> None:
        super().__init__()
        self.preprocessor = preprocessor
        self.backbone = preprocessor.backbone
        self.layer = config.layer
        dtype = None if mapped else getattr(torch, config.dtype)
        self.lvlm: Any = self.backbone.load(config.checkpoint, dtype, device)
        layers = self.lvlm.config.get_text_config().num_hidden_layers
        if config.layer is not None and config.layer > layers:
            raise ValueError(f"model.layer is {config.layer}, but {config.checkpoint} has {layers} layers")
        if config.layer == layers:
            self.layer = None
        self.scalar_names = tuple(scalars or ())
        for name, value in (scalars or {}).items():
            self.register_parameter(name, nn.Parameter(torch.tensor([value])))  # DeepSpeed does not take 0-d ones
        mean, std = preprocessor.pixel_statistics()
        self.register_buffer("pixel_mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.packed: PackedForward | None = None  # what training runs on, where it can

    @property
    def base(self) -> Any:
        """The Hugging Face model, with the adapter's layers in place where there is one.

        Of any class that a backbone loads: it has `config`, `generation_config`, `lm_head` and `model`, which has
        `language_model` and `get_image_features`.
        """
        from peft import PeftModel

        return self.lvlm.get_base_model() if isinstance(self.lvlm, PeftModel) else self.lvlm

    def inputs(
        self, tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None
    ) -> dict[str, torch.Tensor]:
        """What the Hugging Face model takes; uint8 pixels [R, 3, h, w] are normalised here, on the device."""
        ids = tokens["ids"]
        positions = torch.arange(ids.shape[1], device=ids.device)
        inputs = {"input_ids": ids, "attention_mask": (positions < tokens["lengths"][:, None]).long()}
        if pixels is None:
            return self.backbone.model_inputs(self.base.config, inputs, None, None)
        values = pixels["values"]
        if "features" not in pixels:
            values = values.float().sub_(self.pixel_mean).div_(self.pixel_std).to(self.base.dtype)
        return self.backbone.model_inputs(self.base.config, inputs, values, pixels["sizes"])

    def forward(
        self,
        tokens: dict[str, torch.Tensor],
        pixels: dict[str, torch.Tensor] | None = None,
        *,
        caption_tokens: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings [B, D] (float32, unit norm), next-token loss of the captions that follow, and the scalars [S].

        One forward serves both losses: attention is causal, so the summary token does not see the caption after it.
        `caption_tokens` is the number of caption tokens in the global batch, over which the loss is a mean; with None
        there is no caption loss (0).
        """
        if self.packed is not None and self.training:
            embeddings, loss = self.packed(tokens, pixels, caption_tokens)
            return embeddings, loss, self.scalars()
        inputs = self.inputs(tokens, pixels)
        if "position_ids" not in inputs:
            # Causal attention with the padding on the right sees none of it. (Without a mask, transformers takes
            # positions that are not 0, 1, 2... for those of several samples in a row.)
            del inputs["attention_mask"]
        # The summary comes first, with and without captions: so dropout draws the same masks for it.
        summary = hidden = self.backbone.hidden_states(self.base, inputs, self.layer)
        if caption_tokens is not None and self.layer is not None:
            hidden = self.backbone.hidden_states(self.base, inputs, None)
        rows = torch.arange(len(hidden), device=hidden.device)
        embeddings = normalize(summary[rows, tokens["prompt_lengths"] - 1].float(), dim=-1)
        loss = hidden.new_zeros((), dtype=torch.float32)
        if caption_tokens is not None:
            loss = next_token(hidden, self.base.lm_head.weight, caption_labels(tokens), caption_tokens)
        return embeddings, loss, self.scalars()

    def scalars(self) -> torch.Tensor:
        """The scalars of the contrastive loss [S], in float32."""
        values: list[torch.Tensor] = [self.get_parameter(name) for name in self.scalar_names]
        return torch.cat(values).float() if values else self.pixel_mean.new_zeros(0)

    def vision_features(self, pixels: dict[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
        """The images as the vision tower, which is frozen, gives them; unchanged where training is not packed."""
        if pixels is None or self.packed is None:
            return pixels
        nothing = pixels["values"].new_zeros(len(pixels["sizes"]), 1, dtype=torch.long)
        tokens = {"ids": nothing, "lengths": nothing[:, 0]}
        features = self.packed.image_features(self.inputs(tokens, pixels), pixels)
        shape = torch.empty(pixels["values"].shape, device="meta")
        return {"values": shape, "sizes": pixels["sizes"], "features": features}


def caption_labels(tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    """Labels [B, T]: the token ids of the captions and their end, -100 on prompts and padding."""
    positions = torch.arange(tokens["ids"].shape[1], device=tokens["ids"].device)
    caption = (positions >= tokens["prompt_lengths"][:, None]) & (positions < tokens["lengths"][:, None])
    return tokens["ids"].masked_fill(~caption, -100)


def checkpoint_activations(model: EmbeddingModel) -> None:
    """Keep only the inputs of the language model's layers for backward; a frozen vision tower keeps nothing anyway."""
    language_model = model.base.model.language_model
    language_model.gradient_checkpointing_enable({"use_reentrant": False})
