"""Dual encoders, the baselines: one file per family, named after the `model_type` of its Hugging Face configuration.

A file defines `FAMILY`, a `DualEncoderFamily`: what differs between families, and nothing else. Adding a family is
adding a file; nothing is registered. `dual_encoder_embedder.py` makes an embedder of any of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from vladva.models.backbones import pretrained

if TYPE_CHECKING:
    import torch

OPEN_CLIP = "open_clip:"  # checkpoints `open_clip:MODEL:WEIGHTS`, which Hugging Face's classes cannot load
OWN_CODE = {"EvaCLIPModel": "eva_clip"}  # architectures that call themselves CLIP and are not


class Tools(NamedTuple):
    """What prepares a checkpoint's inputs, of transformers or what stands for it."""

    config: Any
    tokenizer: Any
    image_processor: Any


@dataclass(frozen=True)
class DualEncoderFamily(ABC):
    """A family of dual encoders: how it is loaded, and how it reads texts and images.

    B texts or images, T tokens, D width, Q vectors of an image.
    """

    version: int
    """Part of the fingerprint. Raise it by one with every change that makes other embeddings of the same weights: other
    cleaning of captions, context length, pooling. Rewording a comment is none."""

    def tools(self, checkpoint: str) -> Tools:
        """Those that lie with a Hugging Face checkpoint."""
        from transformers import AutoConfig, AutoTokenizer
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        return Tools(
            pretrained(AutoConfig, checkpoint),
            pretrained(AutoTokenizer, checkpoint),
            pretrained(AutoImageProcessor, checkpoint, backend="pil"),
        )

    @abstractmethod
    def load(self, checkpoint: str, dtype: torch.dtype) -> torch.nn.Module:
        """The pretrained model."""

    @abstractmethod
    def shape(self, config: Any) -> tuple[int, int]:
        """Vectors Q of an image, and their width D; a text has one vector."""

    def num_image_tokens(self, config: Any) -> int:
        """Tokens that the vision tower makes of an image: its patches and the class token."""
        vision = config.vision_config
        return (vision.image_size // vision.patch_size) ** 2 + 1

    @abstractmethod
    def token_ids(self, config: Any, tokenizer: Any, text: str) -> list[int]:
        """A text as the family reads it, cut where its context ends."""

    @abstractmethod
    def text_vectors(self, model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Token ids and attention mask [B, T] -> [B, D]."""

    @abstractmethod
    def image_vectors(self, model: Any, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels [B, 3, H, W] -> [B, D], or [B, Q, D] of Q vectors each."""

    def revision(self, checkpoint: str) -> str | None:
        """What changes with the weights, where Hugging Face does not know it; None where it does."""
        return None


def dual_encoder_families() -> list[str]:
    """The names of the families, which are those of their files."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py"))


def family_name(checkpoint: str) -> str | None:
    """The family of a checkpoint; None where that is no dual encoder (an LVLM, then, or nothing at all)."""
    if checkpoint.startswith(OPEN_CLIP):
        return "open_clip"
    from transformers import AutoConfig

    try:
        config = pretrained(AutoConfig, checkpoint)
    except (OSError, ValueError):
        return None  # `backbone_of` says what is wrong with it
    architecture = (config.architectures or [""])[0]
    name = OWN_CODE.get(architecture, config.model_type).replace("-", "_")
    return name if name in dual_encoder_families() else None


def find_family(name: str) -> DualEncoderFamily:
    """The family of that name."""
    return import_module(f"{__name__}.{name}").FAMILY


def is_dual_encoder(checkpoint: str) -> bool:
    """Whether a checkpoint is a dual encoder: it embeds, and generates nothing."""
    return family_name(checkpoint) is not None
