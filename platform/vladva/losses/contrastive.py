"""The contract of the contrastive losses: what one file of this folder brings, and how it is found by its name.

A loss is a frozen dataclass that its file names `LOSS`: its fields are its settings, and it says which scalars are
learned with it, what it is, and how much memory it takes. Nothing else has to be told of it: `loss.contrastive NAME`
finds the file, `loss.options` sets the fields. To add one, copy `sigmoid.py`.
"""

import importlib
import math
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from vladva.losses.pairs import PairLoss, Pairs, add_nothing, pair_statistics

ROWS = 256  # of the similarity matrix held at once


@dataclass(frozen=True)
class Scalar:
    """A number that is learned with the model: where it starts, and the range in which every step leaves it."""

    start: float
    learned: bool = True
    lowest: float = -math.inf
    highest: float = math.inf


@dataclass(frozen=True)
class ContrastiveLoss(ABC):
    """A loss over the pairs of the global batch. The two settings here are `loss.temperature` and its neighbour."""

    temperature: float
    learn_temperature: bool

    symmetric: ClassVar[bool] = True
    """Whether texts look for their images, too: the figures in the log are means over both directions."""

    @abstractmethod
    def scalars(self) -> dict[str, Scalar]:
        """The scalars of the loss by name. Checkpoints keep them, and AdamW's state, under these names."""

    def figures(self, scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the log says of the scalars: the temperature instead of the logarithm of its inverse."""
        told = dict(scalars)
        if "log_scale" in told:
            told["temperature"] = (-told.pop("log_scale")).exp()
        return told

    @abstractmethod
    def __call__(self, pairs: Pairs, scalars: Mapping[str, Tensor], *, chunk_size: int = ROWS) -> Tensor:
        """The loss, 0-d, with a graph to the embeddings and scalars; 0 where no pair takes part.

        Of `pairs.share` only its part: the terms of these pairs' images, and texts, over the number of all pairs.

        scalars: 0-d float32 each, by their names. chunk_size: rows of the similarity matrix held at once.
        """

    def block_bytes(self, pairs: int, texts: int) -> int:
        """Most bytes that forward or backward holds besides embeddings, for `pairs` images and `texts` text columns."""
        return 3 * ROWS * max(pairs, texts) * 4  # logits, their mask's result and their gradient, in float32


def loss_names() -> list[str]:
    """Names of the contrastive losses, sorted."""
    return sorted(name for name in _modules() if "LOSS" in vars(importlib.import_module(f"vladva.losses.{name}")))


def _modules() -> list[str]:
    return [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]


class LossChoice(Protocol):
    """The fields of a run's `LossConfig` that choose the contrastive loss."""

    @property
    def contrastive(self) -> str: ...
    @property
    def options(self) -> Sequence[str]: ...
    @property
    def temperature(self) -> float: ...
    @property
    def learn_temperature(self) -> bool: ...


def find_loss(choice: LossChoice) -> ContrastiveLoss:
    """The loss of `losses/<contrastive>.py` with its settings. Raises ValueError for what it does not know."""
    name = choice.contrastive
    module = importlib.import_module(f"vladva.losses.{name}") if name in _modules() else None
    cls: type[ContrastiveLoss] | None = getattr(module, "LOSS", None)
    if cls is None:
        raise ValueError(f"loss.contrastive: there is no {name!r}; known are {', '.join(loss_names())}")
    hints = get_type_hints(cls)
    own = [f.name for f in fields(cls) if f.name not in ("temperature", "learn_temperature")]
    settings: dict[str, Any] = {}
    for option in choice.options:
        key, equals, value = option.partition("=")
        if key not in own or not equals:
            known = ", ".join(f"{each}=..." for each in own) or "none"
            raise ValueError(f"loss.options: {option!r} is no option of the loss {name}; it has {known}")
        settings[key] = _parse(f"loss.options {key}", value, hints[key])
    return cls(choice.temperature, choice.learn_temperature, **settings)


def _parse(what: str, text: str, kind: Any) -> Any:
    """The text as a number, as one of several words, or as it is. Raises ValueError."""
    if get_origin(kind) is Literal:
        if text not in get_args(kind):
            raise ValueError(f"{what} is {text!r}; it must be one of {', '.join(get_args(kind))}")
        return text
    if kind is bool:
        return _parse(what, text.lower(), Literal["true", "false"]) == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{what} is {text!r}; it must be a {kind.__name__}") from None


def contrastive_loss(
    loss: ContrastiveLoss,
    pairs: Pairs,
    scalars: Mapping[str, Tensor],
    *,
    widths: Sequence[int] = (),
    chunk_size: int = ROWS,
    add_up: Callable[[Tensor], Tensor] = add_nothing,
) -> PairLoss:
    """The loss of the pairs, with the figures for the log.

    widths: Matryoshka; the loss is also taken of the first d coordinates for each d, and the mean over these and the
        full width is returned. The figures are those of the full width.
    add_up: adds up numbers over the workers whose shares of the pairs these are, for the figures.
    """
    parts = (pairs, *map(pairs.first_dimensions, widths))
    value = torch.stack([loss(part, scalars, chunk_size=chunk_size) for part in parts]).mean()
    figures = pair_statistics(pairs, symmetric=loss.symmetric, chunk_size=chunk_size, add_up=add_up)
    return PairLoss(value, *figures)
