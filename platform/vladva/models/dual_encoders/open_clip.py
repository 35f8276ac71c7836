"""Any model of the open_clip package (`pip install 'vladva[open_clip]'`), as checkpoint `open_clip:MODEL:WEIGHTS`.

MODEL is one of open_clip's, WEIGHTS a tag of its own or the path of a file, `open_clip:ViT-B-32:weights.pt`.
Weights from OpenAI need a `-quickgelu` model: without it the activation is silently another one. Images are prepared
by transformers' CLIPImageProcessor, with the sizes and statistics that open_clip gives.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from vladva.models.dual_encoders import DualEncoderFamily, Tools

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 77


@dataclass(frozen=True)
class OpenClip(DualEncoderFamily):
    """One vector an image, one a text."""

    def tools(self, checkpoint: str) -> Tools:
        """Configuration (widths and context length), open_clip's tokenizer, an image processor with its settings."""
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
        text = SimpleNamespace(max_position_embeddings=settings["text_cfg"].get("context_length", MAX_TOKENS))
        # A ResNet has no patches; it ends on a 32nd of the image's side.
        vision = SimpleNamespace(image_size=side, patch_size=settings["vision_cfg"].get("patch_size", 32))
        config = SimpleNamespace(
            embed_dim=settings["embed_dim"], vision_config=vision, text_config=text, get_text_config=lambda: text
        )
        return Tools(config, open_clip.get_tokenizer(name), processor)

    def revision(self, checkpoint: str) -> str:
        """Model and weights by name; of weights in a file, their size and time too."""
        file = Path(parts(checkpoint)[1])
        return f"{checkpoint} {file.stat().st_size} {file.stat().st_mtime_ns}" if file.is_file() else checkpoint

    def load(self, checkpoint: str, dtype: torch.dtype) -> torch.nn.Module:
        """The pretrained model."""
        name, weights = parts(checkpoint)
        return library().create_model(name, pretrained=weights).to(dtype)

    def shape(self, config: Any) -> tuple[int, int]:
        """One vector an image."""
        return 1, config.embed_dim

    def token_ids(self, config: Any, tokenizer: Any, text: str) -> list[int]:
        """Token ids, padded with zeros to the whole context as open_clip's models want them."""
        return tokenizer([text], context_length=config.text_config.max_position_embeddings)[0].tolist()

    def text_vectors(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The text tower's vectors [B, D]; it finds the end of a text by itself."""
        return model.encode_text(ids)

    def image_vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """The vision tower's vectors [B, D]."""
        return model.encode_image(pixels)


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


FAMILY = OpenClip(version=1)
