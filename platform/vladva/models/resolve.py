"""Model reference: what the name of a model stands for, how it embeds, and the fingerprint of its embeddings."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from vladva.adapter import ADAPTER_NOTE
from vladva.backbones import resolve
from vladva.batches import Preprocessor
from vladva.config import ModelConfig
from vladva.prompts import IMAGE_PROMPT, TEXT_PROMPT


@dataclass(frozen=True)
class ModelReference:
    """A model by name: a base checkpoint, and the local folder of an adapter where there is one."""

    checkpoint: str
    adapter: Path | None = None
    prompts: tuple[str, str] = (IMAGE_PROMPT, TEXT_PROMPT)  # of the base model, zero-shot


def find_model(model: str) -> ModelReference:
    """Resolve a run folder, a checkpoint `.../step-N`, an adapter folder, `tiny`, a name or path of Hugging Face's, or
    one of `systems.py`.

    Raises ValueError where a run has no checkpoint yet.
    """
    from vladva import checkpoint, storage, systems

    if storage.exists(storage.join(model, "config.json")) and storage.exists(storage.join(model, "checkpoints")):
        newest = checkpoint.latest(model)
        if newest is None:
            raise ValueError(f"{model} has no complete checkpoint yet (looked in {storage.join(model, 'checkpoints')})")
        model = newest
    if storage.exists(storage.join(model, "adapter", ADAPTER_NOTE)):
        adapter = checkpoint.load_adapter(model)
        return ModelReference(json.loads((adapter / ADAPTER_NOTE).read_text())["checkpoint"], adapter)
    if (Path(model) / ADAPTER_NOTE).exists():
        return ModelReference(json.loads((Path(model) / ADAPTER_NOTE).read_text())["checkpoint"], Path(model))
    system = systems.find(model)
    if system:
        return ModelReference(system.checkpoint, prompts=system.prompts)
    return ModelReference(model)


def config_of(reference: ModelReference, adapter: Path | None, dtype: str) -> ModelConfig:
    """The configuration to embed with: what the adapter was trained with, or the base model's, zero-shot."""
    if adapter:
        return ModelConfig(dtype=dtype, **json.loads((adapter / ADAPTER_NOTE).read_text()))
    image_prompt, text_prompt = reference.prompts
    return ModelConfig(
        reference.checkpoint,
        dtype=dtype,  # type: ignore[arg-type]
        image_prompt=image_prompt,
        text_prompt=text_prompt,
        soft_prompts=False,
    )


def fingerprint_of(
    config: ModelConfig, adapter: Path | None, layer: int, dimension: int, preprocessor: Preprocessor
) -> str:
    """16 hex digits that change with base model, adapter, prompts, layer, dimension or preprocessing."""
    parts = {
        "base": base_revision(resolve(config.checkpoint)),
        "adapter": hashlib.sha256((adapter / "adapter_model.safetensors").read_bytes()).hexdigest()
        if adapter
        else None,
        "prompts": [config.image_prompt, config.text_prompt, config.soft_prompts],
        "layer": layer,
        "dimension": dimension,
        "pixels": json.loads(preprocessor.image_processor.to_json_string()),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def base_revision(checkpoint: str) -> str:
    """The commit of a model from the hub; of a local folder, a hash of its configuration and samples of its weights."""
    from transformers import AutoConfig

    folder = Path(checkpoint)
    if not folder.is_dir():
        return str(AutoConfig.from_pretrained(checkpoint)._commit_hash)
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size}".encode())
        with path.open("rb") as file:
            for offset in range(0, path.stat().st_size, max(1 << 20, path.stat().st_size // 64)):
                file.seek(offset)
                digest.update(file.read(1 << 16))
    return digest.hexdigest()
