"""Model reference: what the name of a model stands for, how it embeds, and the fingerprint of its embeddings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, cast

from vladva.config import IMAGE_PROMPT, TEXT_PROMPT, ModelConfig
from vladva.core import storage
from vladva.core.model_description import ModelDescription
from vladva.models import checkpoint, model_zoo
from vladva.models.adapter import ADAPTER_NOTE
from vladva.models.backbones import checkpoint_source, pinned
from vladva.models.dual_encoder_embedder import DualPreprocessor, describe_dual_encoder
from vladva.models.dual_encoders import is_dual_encoder
from vladva.models.fingerprint import describe_lvlm
from vladva.models.interface import InputPreprocessor
from vladva.models.preprocessor import Preprocessor


@dataclass(frozen=True)
class ModelReference:
    """A model by name: a base checkpoint, and the local folder of an adapter where there is one."""

    checkpoint: str
    adapter: Path | None = None
    prompts: tuple[str, str] = (IMAGE_PROMPT, TEXT_PROMPT)  # of the base model, zero-shot


def find_model(model: str) -> ModelReference:
    """Resolve a run folder, a checkpoint `.../step-N`, an adapter folder, `tiny`, a name or path of Hugging Face's, or
    one of `model_zoo.py`; a name may have @REVISION behind it.

    Raises ValueError where a run has no checkpoint yet.
    """
    if storage.exists(storage.join(model, "config.json")) and storage.exists(storage.join(model, "checkpoints")):
        newest = checkpoint.latest(model)
        if newest is None:
            raise ValueError(f"{model} has no complete checkpoint yet (looked in {storage.join(model, 'checkpoints')})")
        model = newest
    if storage.exists(storage.join(model, "adapter", ADAPTER_NOTE)):
        adapter = checkpoint.fetch_adapter(model)
        return ModelReference(json.loads((adapter / ADAPTER_NOTE).read_text())["checkpoint"], adapter)
    if (Path(model) / ADAPTER_NOTE).exists():
        return ModelReference(json.loads((Path(model) / ADAPTER_NOTE).read_text())["checkpoint"], Path(model))
    name, separator, revision = model.partition("@")
    system = model_zoo.find(name)
    if system:
        return ModelReference(f"{system.checkpoint}{separator}{revision}", prompts=system.prompts)
    return ModelReference(model)


def config_of(reference: ModelReference, adapter: Path | None, dtype: str) -> ModelConfig:
    """The configuration to embed with: what the adapter was trained with, or the base model's, zero-shot."""
    number = cast("Literal['float32', 'bfloat16']", dtype)  # an unknown one fails where weights are loaded
    if adapter:
        return ModelConfig(dtype=number, **json.loads((adapter / ADAPTER_NOTE).read_text()))
    image_prompt, text_prompt = reference.prompts
    return ModelConfig(
        reference.checkpoint,
        dtype=number,
        image_prompt=image_prompt,
        text_prompt=text_prompt,
        soft_prompts=False,
    )


def dtype_for(model: str, gpus: float) -> str:
    """The dtype to compute in where none is asked for: on CPUs float32, on GPUs the run's own, or bfloat16."""
    if not gpus:
        return "float32"
    run = model.rstrip("/").partition("/checkpoints/")[0]
    recipe = storage.join(run, "config.json")
    if storage.exists(recipe) and storage.exists(storage.join(run, "checkpoints")):
        return storage.read_json(recipe)["model"]["dtype"]
    return "bfloat16"


def pin(model: str) -> str:
    """The model as every process finds it, now and later.

    A path that is absolute; of a run the newest checkpoint there is now; of a model on the hub `NAME@COMMIT`.
    """
    model = storage.absolute(model) if storage.exists(model) else model
    if storage.exists(storage.join(model, "checkpoints")):
        return checkpoint.latest(model) or model
    return pin_revision(model)


def pin_revision(model: str) -> str:
    """A model on the hub as `NAME@COMMIT`; any other as it is."""
    if storage.exists(model) or find_model(model).adapter is not None:
        return model
    commit = checkpoint_source(pinned(find_model(model).checkpoint)).revision
    return f"{model.partition('@')[0]}@{commit}" if commit else model


def describe(
    model: str, *, adapter: bool, dtype: str, layer: int | None = None
) -> tuple[ModelConfig, ModelDescription]:
    """Configuration and description (`Embedder.description`) of a model, without its weights.

    `layer`: as if it embedded from there. Raises ValueError where the model has no such layer.
    """
    reference = find_model(model)
    folder = reference.adapter if adapter else None
    config = config_of(reference, folder, dtype)
    if is_dual_encoder(config.checkpoint):
        if layer is not None:
            raise ValueError(f"layers: {model} is a dual encoder, which embeds from its last layer only")
        return config, describe_dual_encoder(config.checkpoint, dtype)
    preprocessor = Preprocessor.of(config)
    layers = preprocessor.config.get_text_config().num_hidden_layers
    if layer is not None and not 1 <= layer <= layers:
        raise ValueError(f"layers: there is no layer {layer} in {model}; its language model has layers 1 to {layers}")
    return config, describe_lvlm(config, folder, layer, preprocessor)


@lru_cache(maxsize=2)
def preprocessor_of(config: ModelConfig) -> InputPreprocessor:
    """The model's preprocessor: one a process."""
    if is_dual_encoder(config.checkpoint):
        return DualPreprocessor(config.checkpoint)
    return Preprocessor.of(config)
