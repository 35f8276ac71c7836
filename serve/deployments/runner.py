"""Runner: what the engine asks of a loaded model: of every one that it embeds a batch (`EmbedsBatches`), of one that
generates that it scores a batch and takes conversations a step further (`TakesSteps`).

The runners are in runners.py; an engine of another make can stand behind these Protocols, or behind the methods of the
replica (generation.py), where it has a loop of its own. All methods are called by one thread, but for `embed` of a
runner that is `concurrent`: that has one of its own.

B items, D width, V tokens of the vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from vladva.models.batch import Pixels


@dataclass(frozen=True)
class Encoded:
    """A prompt as the model takes it: token ids, pixels of its images, and what it costs in a batch."""

    ids: list[int]
    pixels: "Pixels | None"
    cost: int


@dataclass(eq=False)
class OpenConversation:
    """A conversation that is being answered: what was read of its prompt, and the answer's last token."""

    encoded: Encoded
    adapter: bool
    state: Any  # the runner's own
    read: int = 0  # tokens of the prompt
    last: int | None = None

    @property
    def unread(self) -> int:
        """Tokens of the prompt that the model has not seen."""
        return len(self.encoded.ids) - self.read


class EmbedsBatches(Protocol):
    """Runs a model that embeds (`Embeds` of vladva/models/interface.py): all do."""

    @property
    def concurrent(self) -> bool:
        """Whether it may embed while another thread answers and scores with the same model."""
        ...

    def embed(self, items: Sequence[Encoded]) -> "np.ndarray":
        """Unit vectors [B, D], float32, adapter on."""
        ...


class TakesSteps(Protocol):
    """Runs a model that answers (`Generates` of vladva/models/interface.py)."""

    def next_token_logits(self, items: Sequence[Encoded]) -> "torch.Tensor":
        """Logits [B, V] of the token after each prompt, adapter off."""
        ...

    def reserved(self, tokens: int) -> int:
        """Tokens of cache that a conversation of `tokens` takes."""
        ...

    def begin(self, encoded: Encoded, tokens: int, *, adapter: bool) -> OpenConversation:
        """A conversation of up to `tokens` tokens, its images seen, none of its tokens read."""
        ...

    def step(self, parts: Sequence[tuple[OpenConversation, int]]) -> "list[torch.Tensor | None]":
        """Read so many tokens of each prompt, or each answer's last token: logits [V] of the next, where one is due."""
        ...

    def end(self, progress: OpenConversation) -> None:
        """Free what a conversation holds."""
        ...
