"""Item content: what becomes one vector, the same from a shard's JSON to `vladva.load().embed` and to HTTP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class ItemContent:
    """A text, an image, or both; and an instruction that says what the vector is wanted for."""

    text: str | None = None
    image: Image | None = None
    instruction: str | None = None

    @property
    def size(self) -> tuple[int, int] | None:
        """(width, height) of the image, None where there is none."""
        return None if self.image is None else self.image.size
