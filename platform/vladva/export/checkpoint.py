"""Exported checkpoint: the adapter merged into the base model, in Hugging Face's own form.

    config.json, model*.safetensors   the model: LoRA merged, soft prompts as rows of its token table, cut to its layer
    tokenizer*, *processor_config     the base model's, with the soft-prompt tokens
    chat_template.jinja               renders the embedding prompts (`chat_template.py`)
    modules.json, 1_Pooling, ...      what sentence-transformers reads (`sentence_transformers_files.py`)
    vladva.json                       the prompts, for vladva itself
    vladva_export.json                where it came from, and the probe (`probe.py`)
    README.md                         the model card (`model_card.py`)

The same folder serves transformers, sentence-transformers, vLLM, and vladva itself.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from vladva.export.chat_template import embedding_chat_template
from vladva.models.backbones import checkpoint_file

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from vladva.models.embedder import Embedder

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
CLIP_TOWER = "clip_vision_model"
VIDEO = "video_preprocessor_config.json"


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place when the block ends without an error.

    Raises ValueError where `out` exists: an export is never mixed with another.
    """
    if out.exists():
        raise ValueError(f"--out {out} exists already; give a new folder, or delete it first")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        yield folder
        for path in (folder, *folder.rglob("*")):  # temporary folders, and safetensors' files, are their owner's alone
            path.chmod(0o755 if path.is_dir() else 0o644)
        folder.rename(out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def merged_model(embedder: Embedder, dtype: Dtype) -> PreTrainedModel:
    """The Hugging Face model that embeds as `embedder` does, without any adapter's layers; `embedder` is used up.

    Its language model ends with the layer that embeds. LoRA is merged in the precision in which the embedder was
    loaded, then everything is rounded to `dtype`.
    """
    import torch
    from peft import PeftModel

    lvlm = embedder.model.lvlm
    if isinstance(lvlm, PeftModel):
        lvlm = lvlm.merge_and_unload()
    assert embedder.layer is not None  # only a dual encoder has none
    cut_layers(lvlm, embedder.layer)
    return lvlm.to(getattr(torch, dtype))


def cut_layers(lvlm: PreTrainedModel, layer: int) -> None:
    """Drop the layers of the language model above `layer`, in the model and in its configuration."""
    language_model = lvlm.model.language_model
    language_model.layers = language_model.layers[:layer]
    for config in (lvlm.config.get_text_config(), language_model.config):
        config.num_hidden_layers = layer
        if getattr(config, "layer_types", None):
            config.layer_types = list(config.layer_types)[:layer]


def write_processor(embedder: Embedder, folder: Path) -> None:
    """Write tokenizer, image processor and processor as files of the base checkpoint, with our template.

    Nothing here makes a processor: those of the Qwen families cannot be made without torchvision.
    """
    preprocessor = embedder.preprocessor
    tokenizer = preprocessor.tokenizer
    tokenizer.chat_template = embedding_chat_template(
        tokenizer.chat_template, preprocessor.prompts["image"], preprocessor.prompts["text"], _begin_of(tokenizer)
    )
    tokenizer.padding_side = "right"
    tokenizer.save_pretrained(folder)
    preprocessor.image_processor.save_pretrained(folder)
    processor = _base_file(embedder, "processor_config.json")
    for part in ("image_processor", "video_processor", "feature_extractor"):  # these have files of their own here
        settings = processor.pop(part, None)
        if part == "video_processor" and settings:
            _write_json(folder / VIDEO, settings)
    config = embedder.model.base.config
    if hasattr(config, "vision_feature_select_strategy"):  # LLaVA: what checkpoints of 2023 leave to the caller
        has_class_token = config.vision_config.model_type == CLIP_TOWER
        processor.setdefault("patch_size", config.vision_config.patch_size)
        processor.setdefault("vision_feature_select_strategy", config.vision_feature_select_strategy)
        processor.setdefault("num_additional_image_tokens", int(has_class_token))
    if processor:
        _write_json(folder / "processor_config.json", processor)
    if video := _base_file(embedder, VIDEO):
        _write_json(folder / VIDEO, video)


def _begin_of(tokenizer: PreTrainedTokenizerBase) -> str:
    """The token that the tokenizer puts before every text; empty where there is none, or the chat template has it."""
    bos: str | None = tokenizer.bos_token
    if bos is None or tokenizer("a").input_ids[:1] != [tokenizer.bos_token_id]:
        return ""
    question: Any = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    return "" if str(tokenizer.apply_chat_template(question, tokenize=False)).startswith(bos) else bos


def write_merged_checkpoint(embedder: Embedder, folder: Path, dtype: Dtype, matryoshka: tuple[int, ...] = ()) -> None:
    """Write model, tokenizer and processor; `embedder` is used up.

    matryoshka: dimensions to which the embeddings may be cut, for which they were trained.
    """
    write_processor(embedder, folder)
    model = merged_model(embedder, dtype)
    if matryoshka:  # vLLM refuses `dimensions` without these
        model.config.is_matryoshka = True
        model.config.matryoshka_dimensions = sorted(matryoshka)
    model.save_pretrained(folder)
    if model.config.vision_config.model_type == CLIP_TOWER:
        name_clip_tower_as_published(folder)


def name_clip_tower_as_published(folder: Path) -> None:
    """Give the weights of a CLIP tower the prefix `vision_model.`, which they have in LLaVA's published checkpoints.

    transformers 5 saves them without it and loads either; vLLM looks for it.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            renamed = {_published_name(name): weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
            save_file(renamed, file.with_suffix(".renamed"), weights.metadata())
        file.with_suffix(".renamed").replace(file)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        content = json.loads(index.read_text())
        content["weight_map"] = {_published_name(name): file for name, file in content["weight_map"].items()}
        _write_json(index, content)


def _published_name(name: str) -> str:
    return re.sub(r"(^|\.)vision_tower\.(?!vision_model\.)", r"\1vision_tower.vision_model.", name)


def _base_file(embedder: Embedder, name: str) -> dict[str, Any]:
    """A JSON file of the base checkpoint; empty where it has none."""

    path = checkpoint_file(embedder.config.checkpoint, name)
    return json.loads(Path(path).read_text()) if path else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
