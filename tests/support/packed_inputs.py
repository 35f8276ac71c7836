"""What the packed forwards are tested with: models of every family that has them, texts and images of many sizes."""

from __future__ import annotations

from itertools import islice

import torch

from tests.support import families
from vladva.config import ModelConfig
from vladva.data.scenes.captions import captions
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import render
from vladva.models.adapter import add_adapter
from vladva.models.batch import as_tensors
from vladva.models.embedding_model import EmbeddingModel
from vladva.models.preprocessor import Preprocessor

FAST = [name for name in families.BUILDERS if name != "qwen3_vl"]
WORDED = [text for scene, random in islice(scenes("train"), 8) for text in captions(scene, random)[:3]]
TEXTS = [*WORDED, WORDED[0], f"{WORDED[0]} once more", "x"]  # one is there twice, one begins with another


def load(folder: str, dtype: str = "float32", layer: int | None = None, *, adapter: bool = False) -> EmbeddingModel:
    """A model, with biases and norms that are not as they begin; with an adapter, LoRA is not merged."""
    config = ModelConfig(checkpoint=folder, dtype=dtype, layer=layer, lora_rank=4)  # type: ignore[arg-type]
    model = EmbeddingModel(config, Preprocessor(folder, soft_prompts=adapter)).eval()
    if adapter:
        add_adapter(model, config)
    torch.manual_seed(1)
    for name, parameter in model.lvlm.named_parameters():
        if "lora_B" in name or name.endswith((".bias", "norm.weight")):
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def inputs(model: EmbeddingModel, kind: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor] | None]:
    """Texts of many lengths; images of several sizes, two of them the same, with captions that are not to be seen.

    Of the kind "mixed": images with words and without, and texts, each with an instruction or without.
    """
    preprocessor = model.preprocessor
    if kind == "text":
        return as_tensors(preprocessor.texts(TEXTS), "cpu"), None
    images = [render(scene) for scene, _ in islice(scenes("train"), 5)]
    images = [*images, images[1].resize((90, 40)), images[0]]
    if kind == "mixed":
        shown = [None, *images, None]
        asked = [None, "Find the same with this change.", TEXTS[2]]
        rows = [
            preprocessor.item_prompt(TEXTS[i] if image is None or i % 3 else None, image and image.size, asked[i % 3])
            for i, image in enumerate(shown)
        ]
        return as_tensors(preprocessor.pad([(row, []) for row in rows]), "cpu"), as_tensors(
            preprocessor.pixels(images), "cpu"
        )
    long = [None, *TEXTS[: len(images) - 1]]
    tokens = preprocessor.images([image.size for image in images], long)
    return as_tensors(tokens, "cpu"), as_tensors(preprocessor.pixels(images), "cpu")
