"""A LLaVA of 186M parameters with random weights, and texts and images for it: what the throughput benchmarks share.

A ViT of 12 x 384 (patch 28 on 224 pixels: 64 image tokens), a Llama of 30 x 576 with a vocabulary of 49,152: large
enough that matrix products are most of the time, small enough for two cores.
"""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from vladva.data.scenes import scene

if TYPE_CHECKING:
    from PIL import Image

NUM_TEXTS, NUM_IMAGES = 128, 32
IMAGE_SIZE, PATCH_SIZE = 224, 28
SHORT, LONG = (6, 18), (40, 120)  # fewest and most words of a caption; each word is a token, the prompt is 15


def build_random_llava(folder: Path, *, seed: int = 0) -> str:
    """Write the checkpoint in bfloat16, with the tiny model's tokenizer and a CLIP image processor; returns its path.

    vladva, transformers (`AutoProcessor`) and sentence-transformers load it.
    """
    import torch
    from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vladva.models.backbones import TINY
    from vladva.models.tiny.model import save_checkpoint

    vision = CLIPVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=384,
    )
    text = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config)
    save_checkpoint(model, AutoTokenizer.from_pretrained(TINY), folder)
    model.to(torch.bfloat16).save_pretrained(folder)
    size = {"size": {"shortest_edge": IMAGE_SIZE}, "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}}
    for name, changes in (("preprocessor_config", size), ("processor_config", {"patch_size": PATCH_SIZE})):
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes, indent=2) + "\n")
    return str(folder)


def texts(count: int = NUM_TEXTS, length: tuple[int, int] = SHORT, *, seed: int = 0) -> list[str]:
    """Different texts of fewest to most words; those of the length SHORT are 26 tokens on average, prompt included."""
    random = Random(seed)
    words = [*scene.COLOURS, *scene.SHAPES, "small", "large", "a", "the", "and", "of", "to", "left", "right"]
    return [" ".join(random.choices(words, k=random.randint(*length))) for _ in range(count)]


def images(count: int = NUM_IMAGES, *, seed: int = 0) -> list[Image.Image]:
    """Different images of 224 x 224 random pixels."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    return [Image.fromarray(image) for image in pixels]
