"""Any model of the open_clip package (`pip install 'vladva[open_clip]'`), as checkpoint `open_clip:MODEL:WEIGHTS`.

MODEL is one of open_clip's, WEIGHTS a tag of its own or the path of a file, `open_clip:ViT-B-32:weights.pt`.
Weights from OpenAI need a `-quickgelu` model: without it the activation is silently another one. Images are prepared
by transformers' CLIPImageProcessor, with the sizes and statistics that open_clip gives.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn

MAX_TOKENS = 77


def library() -> ModuleType:
    """The open_clip package. Raises ValueError naming the extra where it, or the torchvision it needs, is not there."""
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            f"an open_clip checkpoint needs open_clip and torchvision: pip install 'vladva[open_clip]' ({error})"
        ) from error
    return open_clip


def parts(checkpoint: str) -> tuple[str, str]:
    """Model and weights of `open_clip:MODEL:WEIGHTS`. Raises ValueError for any other form."""
    prefix, _, rest = checkpoint.partition(":")
    model, _, weights = rest.partition(":")
    if prefix != "open_clip" or not model or not weights:
        raise ValueError(f"model.checkpoint {checkpoint!r} is not of the form open_clip:MODEL:WEIGHTS")
    return model, weights


def tools(checkpoint: str) -> tuple[Any, Any, Any]:
    """Configuration (width and context length), open_clip's tokenizer, and an image processor with its settings."""
    from transformers import CLIPImageProcessor

    name, weights = parts(checkpoint)
    open_clip = library()
    settings = open_clip.get_model_config(name)
    pretrained = open_clip.get_pretrained_cfg(name, weights) or {}
    side = settings["vision_cfg"]["image_size"]
    processor = CLIPImageProcessor(
        size={"shortest_edge": side},
        crop_size={"height": side, "width": side},
        image_mean=pretrained.get("mean") or open_clip.OPENAI_DATASET_MEAN,
        image_std=pretrained.get("std") or open_clip.OPENAI_DATASET_STD,
    )
    length = settings["text_cfg"].get("context_length", MAX_TOKENS)
    text = SimpleNamespace(max_position_embeddings=length)
    config = SimpleNamespace(embed_dim=settings["embed_dim"], get_text_config=lambda: text)
    return config, open_clip.get_tokenizer(name), processor


def revision(checkpoint: str) -> str:
    """Model and weights by name; of weights in a file, their size and time too."""
    file = Path(parts(checkpoint)[1])
    return f"{checkpoint} {file.stat().st_size} {file.stat().st_mtime_ns}" if file.is_file() else checkpoint


def load(checkpoint: str, dtype: torch.dtype) -> nn.Module:
    """The pretrained model."""
    name, weights = parts(checkpoint)
    return library().create_model(name, pretrained=weights).to(dtype)


def shape(config: SimpleNamespace) -> tuple[int, int]:
    """One vector an image."""
    return 1, config.embed_dim


def token_ids(config: SimpleNamespace, tokenizer: Any, text: str) -> list[int]:
    """Token ids, padded with zeros to the whole context as open_clip's models want them."""
    return tokenizer([text], context_length=config.get_text_config().max_position_embeddings)[0].tolist()


def text_vectors(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The text tower's vectors [B, D]; it finds the end of a text by itself."""
    return model.encode_text(ids)


def image_vectors(model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    """The vision tower's vectors [B, D]."""
    return model.encode_image(pixels)
