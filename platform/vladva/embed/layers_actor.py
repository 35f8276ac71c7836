"""Layers: the embeddings of several layers from one pass over the model.

A hook keeps what leaves a decoder layer at the summary token, and the final norm is put on each: the embedding from
layer k is that of the model cut off after k layers, which is how a single layer is run (`embedding_model.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn
from torch.nn.functional import normalize

from vladva.embed.actor import EmbeddingActor
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableTarget
from vladva.models.batch import Pixels, as_tensors
from vladva.models.embedding_model import EmbeddingModel


def embed_layers(
    model: EmbeddingModel,
    tokens: dict[str, torch.Tensor],
    pixels: dict[str, torch.Tensor] | None,
    layers: Sequence[int],
) -> torch.Tensor:
    """Embeddings [L, B, D] (float32, unit norm) from each of the layers, counted from 1, in one pass to the deepest."""
    base: Any = model.base  # a Hugging Face module: what is in it no type says
    language = base.model.language_model
    rows = torch.arange(len(tokens["ids"]), device=tokens["ids"].device)
    summaries: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Callable[[nn.Module, Any], None]:
        def hook(_: nn.Module, args: Any) -> None:
            summaries[layer] = args[0][rows, tokens["prompt_lengths"] - 1]

        return hook

    # What goes into the next layer, or into the norm: DeepStack (Qwen3-VL) adds to what comes out of a layer.
    following = {layer: language.norm if layer == max(layers) else language.layers[layer] for layer in layers}
    hooks = [module.register_forward_pre_hook(keep(layer)) for layer, module in following.items()]
    try:
        model.backbone.hidden_states(model.base, model.inputs(tokens, pixels), max(layers))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack([normalize(language.norm(summaries[layer]).float(), dim=-1) for layer in layers])


class LayersEmbeddingActor(EmbeddingActor):
    """Ray Data stage: as EmbeddingActor, but with a table for each of several layers, all filled in the same pass."""

    def __init__(self, load: dict[str, Any], targets: Mapping[int, TableTarget]) -> None:
        """`targets`: layer -> its table."""
        deepest = max(targets)
        super().__init__({**load, "layer": deepest}, targets[deepest])
        assert isinstance(self.embedder.model, EmbeddingModel), "`describe` refuses layers of a dual encoder"
        self.lvlm = self.embedder.model
        self.targets = targets
        self.width = len(targets) * self.embedder.dimension

    def computed_at_once(self) -> int:
        """One batch: hooks are the model's, not a pass's."""
        return 1

    def tables(self) -> list[str]:
        """Where the layers' tables are."""
        return [target.uri for target in self.targets.values()]

    def forward(self, prompts: list[list[int]], pixels: list[Pixels] | None) -> np.ndarray:
        """Embeddings [N, L * D] of prepared items, the layers side by side."""
        tokens = as_tensors(self.embedder.preprocessor.pad([(prompt, []) for prompt in prompts]), self.embedder.device)
        images = None if pixels is None else as_tensors(Pixels.concatenate(pixels), self.embedder.device)
        with torch.inference_mode():
            embeddings_LND = embed_layers(self.lvlm, tokens, images, list(self.targets))
        return embeddings_LND.transpose(0, 1).flatten(1).cpu().numpy()

    def write(self, items: pa.Table, embeddings: np.ndarray) -> None:
        """Write the batch's part in every layer's table."""
        parts = np.split(embeddings, len(self.targets), axis=1)
        for target, embeddings_ND in zip(self.targets.values(), parts, strict=True):
            write_part(target.uri, items, embeddings_ND, target.model, target.stored_as)
