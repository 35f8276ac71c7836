"""Dual encoders, the baselines: one file per family, named after the `model_type` of its Hugging Face configuration.

A file holds only what differs between families, under agreed names:

    tools(checkpoint)                      configuration, tokenizer and image processor
    load(checkpoint, dtype)                the pretrained model
    shape(config)                          vectors of an image, and their width D; a text has one vector
    token_ids(config, tokenizer, text)     a text as the family reads it, cut where its context ends
    text_vectors(model, ids, mask)         token ids and attention mask [B, T] -> [B, D]
    image_vectors(model, pixels)           normalised pixels [B, 3, H, W] -> [B, D], or [B, Q, D] of Q vectors each
    revision(checkpoint)                   what changes with the weights; only where Hugging Face does not know it

Adding a family is adding a file; nothing is registered. `dual_encoder.py` makes an embedder of any of them.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from vladva.models.backbones import packaged

OPEN_CLIP = "open_clip:"  # checkpoints `open_clip:MODEL:WEIGHTS`, which Hugging Face's classes cannot load
OWN_CODE = {"EvaCLIPModel": "eva_clip"}  # architectures that call themselves CLIP and are not


def family_of(checkpoint: str) -> ModuleType | None:
    """The family's module; None where the checkpoint is no dual encoder (an LVLM, then, or nothing at all)."""
    if checkpoint.startswith(OPEN_CLIP):
        return import_module(f"{__name__}.open_clip")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(packaged(checkpoint))
    except (OSError, ValueError):
        return None  # `backbone_of` says what is wrong with it
    architecture = (config.architectures or [""])[0]
    name = OWN_CODE.get(architecture, config.model_type).replace("-", "_")
    known = {path.stem for path in Path(__file__).parent.glob("[a-z]*.py")}
    return import_module(f"{__name__}.{name}") if name in known else None


def pretrained_tools(checkpoint: str) -> tuple[Any, Any, Any]:
    """Configuration, tokenizer and image processor that lie with a Hugging Face checkpoint."""
    from transformers import AutoConfig, AutoTokenizer
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    config = AutoConfig.from_pretrained(checkpoint)
    return (
        config,
        AutoTokenizer.from_pretrained(checkpoint),
        AutoImageProcessor.from_pretrained(checkpoint, backend="pil"),
    )
