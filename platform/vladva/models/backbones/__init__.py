"""Backbones: one file per LVLM family, named after the `model_type` of its Hugging Face configuration.

A file holds only what differs between families, under agreed names:

    load(checkpoint, dtype)                    the pretrained model
    LORA_TARGETS                               regular expression of the language model's linear layers
    EMBED_TOKENS                               name of the token embedding, for PEFT's trainable_token_indices
    PACKED_DECODERS                              `model_type`s of its language models that fast_forward.py computes
    num_image_tokens(config, processor, size)  image tokens of an image of (width, height)
    pixels(processor, image)                   an image as the image processor cuts it up, neither rescaled nor
                                               normalised [R, 3, h, w], and its (height, width) where that matters
    limit_image_tokens(config, processor, most)  has the processor make larger images smaller
    model_inputs(config, inputs, values, sizes)  what the model takes: `inputs` holds input_ids and attention_mask;
                                               normalised pixels [R, 3, h, w] and sizes [N, 2], or None without images
    hidden_states(model, inputs, layer)        final-normed hidden states [B, T, D] of layer `layer` (None: the last)

Adding a family is adding a file; nothing is registered.
"""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

CONFIGS = Path(__file__).parent / "configs"
TINY = Path(__file__).parents[1] / "tiny/weights"  # the packaged checkpoint


def resolve(checkpoint: str) -> str:
    """The name or folder to load: `tiny` stands for the checkpoint that ships with the package."""
    if checkpoint == "tiny":
        return str(TINY)
    return checkpoint


def real_config(checkpoint: str) -> PreTrainedConfig:
    """The published configuration of a checkpoint, from this package: nothing is downloaded.

    Raises ValueError where the package does not have it.
    """
    from transformers import AutoConfig

    files = {json.loads(path.read_text())["checkpoint"]: path for path in sorted(CONFIGS.glob("*.json"))}
    if checkpoint not in files:
        raise ValueError(f"there is no configuration of {checkpoint!r} in the package; known: {', '.join(files)}")
    content = json.loads(files[checkpoint].read_text())
    del content["checkpoint"]
    return AutoConfig.for_model(**content)


def without_weights(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration on the meta device: every parameter's shape, no memory."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def backbone_of(checkpoint: str) -> ModuleType:
    """The backbone module of a checkpoint. Raises ValueError where there is no checkpoint or no such family."""
    from transformers import AutoConfig

    try:
        model_type = AutoConfig.from_pretrained(resolve(checkpoint)).model_type
    except (OSError, ValueError) as error:
        raise ValueError(f"model.checkpoint {checkpoint!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    known = sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))
    if model_type not in known:
        raise ValueError(f"{checkpoint} is a {model_type!r} model; vladva has backbones for {', '.join(known)}")
    return import_module(f"vladva.models.backbones.{model_type}")
