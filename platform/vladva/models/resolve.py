"""Model reference: what the name of a model stands for, how it embeds, and the fingerprint of its embeddings."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast

from vladva.config import IMAGE_PROMPT, TEXT_PROMPT, ModelConfig
from vladva.core import storage
from vladva.core.model_description import ModelDescription
from vladva.models import checkpoint, model_zoo
from vladva.models.adapter import ADAPTER_NOTE, NOTED
from vladva.models.backbones import checkpoint_source, pinned
from vladva.models.dual_encoder_embedder import DualPreprocessor, describe_dual_encoder
from vladva.models.dual_encoders import is_dual_encoder
from vladva.models.fingerprint import describe_lvlm
from vladva.models.interface import InputPreprocessor
from vladva.models.preprocessor import Preprocessor

EXPORT_NOTE = "vladva_export.json"  # in a folder that jobs/export.py wrote


@dataclass(frozen=True)
class ModelReference:
    """A model by name: a base checkpoint, and the local folder of an adapter where there is one."""

    checkpoint: str
    adapter: Path | None = None
    prompts: tuple[str, str] = (IMAGE_PROMPT, TEXT_PROMPT)  # of the base model, zero-shot
    note: Path | None = None  # says how to prompt a model that is no adapter of ours: an export, or somebody else's


def find_model(model: str) -> ModelReference:
    """Resolve a run folder, a checkpoint `.../step-N`, an adapter folder, an exported folder, `tiny`, a name or path of
    Hugging Face's, or one of `model_zoo.py`; a name may have @REVISION behind it.

    A folder with `vladva.json` (see `read_note`) is prompted as that says: our exports, and models of others.

    Raises ValueError where a run has no checkpoint yet, and for a note with unknown or missing keys.
    """
    if storage.exists(storage.join(model, "config.json")) and storage.exists(storage.join(model, "checkpoints")):
        newest = checkpoint.latest(model)
        if newest is None:
            raise ValueError(f"{model} has no complete checkpoint yet (looked in {storage.join(model, 'checkpoints')})")
        model = newest
    if storage.exists(storage.join(model, "adapter", ADAPTER_NOTE)):
        adapter = checkpoint.fetch_adapter(model)
        return ModelReference(read_note(adapter / ADAPTER_NOTE)["checkpoint"], adapter)
    note = Path(model) / ADAPTER_NOTE
    if note.exists():
        found = read_note(note)["checkpoint"]
        if (Path(model) / "adapter_config.json").exists():
            return ModelReference(found, Path(model))
        return ModelReference(found, note=note)
    name, separator, revision = model.partition("@")
    system = model_zoo.find(name)
    if system:
        return ModelReference(f"{system.checkpoint}{separator}{revision}", prompts=system.prompts)
    return ModelReference(model)


def read_note(path: Path) -> dict[str, Any]:
    """Content of a `vladva.json`: `checkpoint`, and what is not the default of the fields NOTED of ModelConfig.

    A checkpoint that begins with a dot is a path beside the file: `.` is the file's own folder.

    Raises ValueError, naming the file, for what is no such note.
    """
    try:
        note = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    unknown = sorted(note.keys() - set(NOTED)) if isinstance(note, dict) else []
    if not isinstance(note, dict) or unknown or not isinstance(note.get("checkpoint"), str):
        said = f"unknown {', '.join(unknown)}; " if unknown else ""
        raise ValueError(f"{path}: {said}it needs `checkpoint` and takes {', '.join(NOTED[1:])}")
    if note["checkpoint"].startswith("."):
        note["checkpoint"] = str((path.parent / note["checkpoint"]).resolve())
    return note


def check_exported_tokens(folder: Path, preprocessor: Preprocessor) -> None:
    """Compare the token ids of an export's probe with what its tokenizer gives here.

    Raises ValueError where they differ: another version of transformers reads the tokenizer otherwise.
    """
    if not (folder / EXPORT_NOTE).exists():
        return
    probe = json.loads((folder / EXPORT_NOTE).read_text())["probe"]
    for kind, ids in (
        ("text", preprocessor.text_prompt(probe["text"])),
        ("image", preprocessor.image_prompt(tuple(probe["image_size"]))),
    ):
        if ids != probe[f"{kind}_ids"]:
            raise ValueError(
                f"{folder}: the probe {kind} has other token ids than when the model was exported: this version of "
                "transformers reads its tokenizer otherwise, and embeddings would be wrong; export the model again"
            )


def config_of(reference: ModelReference, adapter: Path | None, dtype: str) -> ModelConfig:
    """The configuration to embed with: what the adapter was trained with, or the base model's, zero-shot."""
    number = cast("Literal['float32', 'bfloat16']", dtype)  # an unknown one fails where weights are loaded
    if adapter:
        return ModelConfig(dtype=number, **read_note(adapter / ADAPTER_NOTE))
    if reference.note:
        return ModelConfig(dtype=number, **{"soft_prompts": False, **read_note(reference.note)})
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
