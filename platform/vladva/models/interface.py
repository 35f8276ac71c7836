"""Interface: what every loaded model can do (`Embeds`), and what only some can (`Generates`).

Importing this file loads no framework: commands and servers ask `isinstance(model, Generates)` and import no model.

N images or texts, D width, Q vectors of one image (1 for most models).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from vladva.core.item_content import ItemContent
from vladva.core.model_description import ModelDescription

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

    from vladva.models.batch import Pixels, Tokens


class InputPreprocessor(Protocol):
    """Makes token ids and pixels of images and texts, for one model; needs no weights."""

    config: Any  # of transformers, or what stands for it; has get_text_config()
    tokenizer: Any
    image_processor: Any

    def text_prompt(self, text: str) -> list[int]:
        """Token ids that ask for the embedding of a text. Raises ValueError for a text that the model cannot take."""
        ...

    def image_prompt(self, size: tuple[int, int]) -> list[int]:
        """Token ids that ask for the embedding of an image of (width, height); none for dual encoders."""
        ...

    def item_prompt(
        self, text: str | None = None, size: tuple[int, int] | None = None, instruction: str | None = None
    ) -> list[int]:
        """Token ids that ask for the embedding of a text, of an image of (width, height), or of both together.

        Raises ValueError for what the model cannot take: a dual encoder takes one of the two, without instruction.
        """
        ...

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens of each text by itself."""
        ...

    def pad(self, rows: Sequence[tuple[list[int], list[int]]]) -> Tokens:
        """Right-pad (prompt, caption) pairs of token ids to the longest."""
        ...

    def pixels(self, images: Sequence[Image.Image]) -> Pixels:
        """Images resized and cut up as the model wants them, uint8."""
        ...


class Embeds(Protocol):
    """A loaded model that embeds texts and images into one space."""

    dimension: int
    fingerprint: str
    device: torch.device

    @property
    def preprocessor(self) -> InputPreprocessor:
        """What makes the inputs of `forward`."""
        ...

    @property
    def model(self) -> torch.nn.Module:
        """The module with the weights."""
        ...

    def forward(self, tokens: dict[str, torch.Tensor], pixels: dict[str, torch.Tensor] | None, /) -> torch.Tensor:
        """Unit vectors of texts [B, D], or of images [B, Q * D], on the device."""
        ...

    def description(self) -> ModelDescription:
        """What tables and indexes made with this model carry."""
        ...

    def count_text_tokens(self, texts: Sequence[str]) -> list[int]:
        """Tokens that embedding each text costs, prompt included."""
        ...

    def num_image_tokens(self, width: int, height: int) -> int:
        """Tokens that embedding an image costs, prompt included."""
        ...

    def count_item_tokens(self, item: ItemContent) -> int:
        """Tokens that embedding an item costs, prompt included. Raises ValueError for what the model cannot take."""
        ...

    def embed_texts(self, texts: Sequence[str], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32."""
        ...

    def embed_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32; [N, Q, D] where an image has several."""
        ...

    def embed_items(self, items: Sequence[ItemContent], batch_size: int = 64) -> np.ndarray:
        """Unit vectors [N, D], float32, one of each item. Raises ValueError for what the model cannot take."""
        ...


@runtime_checkable
class Generates(Protocol):
    """A loaded model that answers in words: LVLMs do, dual encoders do not."""

    def generate(
        self,
        messages: list[dict[str, Any]],
        images: Sequence[Image.Image] = (),
        *,
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        adapter: bool = False,
    ) -> Iterator[str]:
        """Pieces of the assistant's answer, as they come."""
        ...
