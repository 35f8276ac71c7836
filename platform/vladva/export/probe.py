"""Probe: a text and an image whose token ids and embeddings are kept with an export, to prove that it still is itself.

Tokenizers and image processors drift between versions of transformers. Whoever loads an export computes the probe
again: other ids mean another tokenizer, and every embedding would be a little wrong.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from PIL import Image

from vladva.models.backbones import backbone_of

if TYPE_CHECKING:
    from vladva.models.embedder import Embedder

TEXT = "A red circle to the left of a blue square, 2 metres (6.5 ft) away: naïve Zoë's photo, n°7."


class ExportProbe(TypedDict):
    """What the model makes of the probe text and the probe image."""

    text: str
    text_ids: list[int]
    image_size: tuple[int, int]
    image_ids: list[int]
    text_embedding: list[float]
    image_embedding: list[float]


def probe_image() -> Image.Image:
    """An image of 96 x 64 pixels with gradients and an edge, the same on every machine."""
    rows, columns = np.mgrid[0:64, 0:96]
    channels = (rows * 4, columns * 8 // 3, 255 * ((rows // 16 + columns // 16) % 2))
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def make_probe(embedder: Embedder) -> ExportProbe:
    """The probe by our own embedder, before it is exported."""
    image = probe_image()
    return {
        "text": TEXT,
        "text_ids": embedder.preprocessor.text_prompt(TEXT),
        "image_size": image.size,
        "image_ids": embedder.preprocessor.image_prompt(image.size),
        "text_embedding": embedder.embed_texts([TEXT])[0].tolist(),
        "image_embedding": embedder.embed_images([image])[0].tolist(),
    }


def embed_by_transformers(folder: Path, content: dict[str, Any]) -> tuple[list[int], np.ndarray]:
    """Token ids and embedding [D] of one part of a message by transformers alone, as the model card shows; float32.

    Of the processor it takes only tokenizer and image processor: Qwen's cannot be loaded without torchvision. With
    torchvision, transformers would resize images otherwise than Pillow, so the image processor is asked for Pillow's.
    """
    import torch
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # an encoder leaves the checkpoint's LM head out, which is reported as unexpected
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    finally:
        logging.set_verbosity(verbosity)
    messages = [{"role": "user", "content": [content]}]
    text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs: dict[str, torch.Tensor] = {}
    if image := content.get("image"):
        count = backbone_of(str(folder)).num_image_tokens(model.config, image_processor, image.size)
        image_token = tokenizer.convert_ids_to_tokens(model.config.image_token_id)
        text = text.replace(image_token, image_token * count)
        inputs = dict(image_processor(images=[image], return_tensors="pt"))
    begins = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
    ids = tokenizer(text, add_special_tokens=not begins, return_tensors="pt").input_ids
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "image_grid_thw" in inputs:
        inputs["mm_token_type_ids"] = (ids == model.config.image_token_id).int()
    with torch.inference_mode():
        hidden_TD = model(**inputs).last_hidden_state[0]
    return ids[0].tolist(), torch.nn.functional.normalize(hidden_TD[-1].float(), dim=0).numpy()


def check_probe(folder: Path, probe: ExportProbe) -> float:
    """Compute the probe by plain transformers; returns the smaller cosine to what our embedder gave.

    Raises ValueError where token ids differ, with the first difference.
    """
    parts: dict[str, dict[str, Any]] = {
        "text": {"type": "text", "text": probe["text"]},
        "image": {"type": "image", "image": probe_image()},
    }
    cosines = []
    for kind, part in parts.items():
        ids, embedding_D = embed_by_transformers(folder, part)
        kept: list[int] = probe[f"{kind}_ids"]  # type: ignore[literal-required]
        if ids != kept:
            at = next((i for i, (a, b) in enumerate(zip(ids, kept, strict=False)) if a != b), min(len(ids), len(kept)))
            raise ValueError(
                f"{folder}: the probe {kind} has other token ids than when the model was exported, from position {at} "
                f"({ids[at : at + 5]} instead of {kept[at : at + 5]}); this version of transformers "
                "reads its tokenizer or chat template differently"
            )
        cosines.append(float(embedding_D @ np.array(probe[f"{kind}_embedding"], np.float32)))  # type: ignore[literal-required]
    return min(cosines)
