"""Adapter: everything that is learned, as one PEFT adapter of an embedding model.

It holds LoRA on the language model's linear layers and the embeddings of the soft-prompt tokens. With the adapter off
the model is the original generator, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vladva.config import ModelConfig

if TYPE_CHECKING:
    from vladva.models.embedding_model import EmbeddingModel

# How to prompt a model, and which: beside an adapter's weights, beside a whole checkpoint, or alone in a folder.
ADAPTER_NOTE = "vladva.json"


# Fields of ModelConfig that decide, with the weights, what the embeddings are.
NOTED = (
    "checkpoint",
    "layer",
    "image_prompt",
    "text_prompt",
    "soft_prompts",
    "max_image_tokens",
    "chat_template",
)


def add_adapter(model: EmbeddingModel, config: ModelConfig) -> None:
    """Put a new adapter on the model: LoRA, and soft prompts that start as the hand-written ones.

    With the initial adapter (LoRA's second factor is zero) the model embeds exactly as zero-shot.
    """
    from peft import LoraConfig, PeftConfig, TrainableTokensConfig, get_peft_model

    preprocessor, embed_tokens = model.preprocessor, model.backbone.embed_tokens
    soft = [i for side in ("image", "text") for i in preprocessor.soft_ids[side]]
    grow_embeddings(model.lvlm, max(soft, default=0) + 1)
    adapter: PeftConfig
    if config.lora_rank:
        adapter = LoraConfig(
            r=config.lora_rank,
            lora_alpha=config.lora_alpha,
            lora_dropout=config.lora_dropout,
            target_modules=model.backbone.lora_targets,
            trainable_token_indices={embed_tokens: soft} if soft else None,
        )
    else:  # PEFT has no LoRA without a layer to put it on
        adapter = TrainableTokensConfig(token_indices=soft, target_modules=[embed_tokens])
    model.lvlm = get_peft_model(model.lvlm, adapter)
    if soft:
        table = model.base.get_input_embeddings()
        written = [i for side in ("image", "text") for i in preprocessor.prompt_ids[side]]
        with torch.no_grad():
            tokens = table.token_adapter if config.lora_rank else table
            tokens.trainable_tokens_delta["default"].copy_(table.weight[written])
    raise_precision(model)


def raise_precision(model: EmbeddingModel) -> None:
    """What is trained in float32, in which the optimizer works whatever the base model's dtype."""
    for parameter in model.lvlm.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def grow_embeddings(lvlm: Any, rows: int) -> None:
    """Make room for `rows` tokens, to a multiple of 64. LLaVA-1.5, Qwen2-VL and the tiny model have them already."""
    there = lvlm.get_input_embeddings().num_embeddings
    if there < rows:
        lvlm.resize_token_embeddings(rows, pad_to_multiple_of=64, mean_resizing=False)
        for table in (lvlm.get_input_embeddings(), lvlm.get_output_embeddings()):
            table.weight.data[there:] = 0  # not at random: an adapter gives the same model whenever it is loaded


class AdapterSwitch:
    """Turns the adapter off for a moment, as `PeftModel.disable_adapter` does, without walking through the model.

    PEFT looks up every layer, and takes the gradient from every parameter of its, on the way out and back again: for
    each generated token, 41 ms of CPU on a model of 7 billion parameters. In a forward its layers read one flag each:
    here those are set, and nothing else. Not for training: parameters keep their `requires_grad`.
    """

    def __init__(self, lvlm: nn.Module) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        layers = (each for each in lvlm.modules() if isinstance(each, (BaseTunerLayer, AuxiliaryTrainingWrapper)))
        # Through a module's own `__setattr__`, which looks for parameters first, it would take twenty times as long.
        self.flags = [vars(layer) for layer in layers]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within it the model computes as without the adapter; afterwards as before."""
        before = [each.get("_disable_adapters", False) for each in self.flags]  # of some kinds the class has it
        try:
            for each in self.flags:
                each["_disable_adapters"] = True
            yield
        finally:
            for each, was in zip(self.flags, before, strict=True):
                each["_disable_adapters"] = was


def save_adapter(model: EmbeddingModel, config: ModelConfig, folder: Path) -> None:
    """Write the adapter in PEFT's format, with a note of base model, layer and prompts beside it."""
    model.lvlm.save_pretrained(folder, save_embedding_layers=False)
    (folder / ADAPTER_NOTE).write_text(json.dumps(adapter_note(config), indent=2) + "\n")


def adapter_note(config: ModelConfig) -> dict[str, Any]:
    """What must be known, beside the weights, to embed with an adapter."""
    return {name: getattr(config, name) for name in NOTED}


def load_adapter(model: EmbeddingModel, folder: Path, *, trainable: bool = False) -> None:
    """Put a saved adapter on the model."""
    import warnings

    from peft import PeftModel

    # PEFT asks for a property of transformers by the name it is about to lose.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    soft = [i for side in ("image", "text") for i in model.preprocessor.soft_ids[side]]
    grow_embeddings(model.lvlm, max(soft, default=0) + 1)
    model.lvlm = PeftModel.from_pretrained(model.lvlm, folder, is_trainable=trainable)
    if trainable:
        raise_precision(model)
