"""Fingerprint: 16 hex digits that change with whatever changes an embedding."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from vladva.config import ModelConfig
from vladva.core.model_description import ModelDescription
from vladva.models.backbones import checkpoint_source, commit_of
from vladva.models.preprocessor import Preprocessor


def describe_lvlm(
    config: ModelConfig, adapter: Path | None, layer: int | None, preprocessor: Preprocessor
) -> ModelDescription:
    """What tables, indexes and scores say about an LVLM that embeds from `layer` (None: the configuration's)."""
    language_model = preprocessor.config.get_text_config()
    layer = layer or config.layer or language_model.num_hidden_layers
    dimension = language_model.hidden_size
    description: ModelDescription = {
        "base_model": displayed(config.checkpoint),
        "adapter": str(adapter) if adapter else None,
        "image_prompt": config.image_prompt,
        "text_prompt": config.text_prompt,
        "soft_prompts": config.soft_prompts,
        "layer": layer,
        "dimension": dimension,
        "dtype": config.dtype,
        "fingerprint": fingerprint_of(config, adapter, layer, dimension, preprocessor),
    }
    revision = checkpoint_source(config.checkpoint).revision
    return description if revision is None else {**description, "revision": revision}


def displayed(checkpoint: str) -> str:
    """A checkpoint as people know it: without the revision."""
    return checkpoint if checkpoint_source(checkpoint).revision is None else checkpoint_source(checkpoint).name


def fingerprint_of(
    config: ModelConfig, adapter: Path | None, layer: int, dimension: int, preprocessor: Preprocessor
) -> str:
    """16 hex digits that change with base model, adapter, prompts, layer, dimension or preprocessing."""
    parts = {
        "base": base_revision(config.checkpoint),
        "adapter": hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
        if adapter
        else None,
        "prompts": [config.image_prompt, config.text_prompt, config.soft_prompts],
        **({"chat_template": config.chat_template} if config.chat_template else {}),
        "layer": layer,
        "dimension": dimension,
        "pixels": json.loads(preprocessor.image_processor.to_json_string()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def base_revision(checkpoint: str) -> str:
    """The commit of a model from the hub; of a local folder, a hash of its configuration and samples of its weights."""
    folder = Path(checkpoint_source(checkpoint).name)
    if not folder.is_dir():
        return commit_of(checkpoint)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            for offset in range(0, path.stat().st_size, max(1 << 20, path.stat().st_size // 64)):
                file.seek(offset)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()
