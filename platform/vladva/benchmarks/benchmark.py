"""Benchmarks: what is measured, on which files, and with which counts to expect. One declarative file each.

The folder listing is the menu: every module here holds one `BENCHMARK` and is found by its file name, so adding a
benchmark is adding a file. `protocols/` holds what several benchmarks do alike (read, then score), `readers/` the forms
in which annotations and images come. Reading a benchmark gives a `Task`: the unique texts and images to
embed, and a `score` that turns their embeddings into numbers without any model at hand.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import pyarrow as pa

from vladva.benchmarks.bootstrap import Averages, Samples
from vladva.benchmarks.metrics import Outcomes, Ties
from vladva.benchmarks.score_columns import ScoreColumn, TableLayout
from vladva.data.image_refs import ImageRef


@dataclass(frozen=True)
class Result:
    """What one model reached in one benchmark.

    `scores` and `tie_rates` are fractions in [0, 1] by metric; `outcomes` has one row per sample, enough to compute
    every score again. `samples` and `averages` are what the scores are means of, for `bootstrap.py`.
    """

    scores: dict[str, float]
    tie_rates: dict[str, float]
    outcomes: pa.Table
    samples: Samples
    averages: Averages = field(default_factory=dict)


# Numbers of images and of texts, both int [N] -> how well each two fit, float [N].
PairScores = Callable[[np.ndarray, np.ndarray], np.ndarray]


class Task(Protocol):
    """A benchmark whose files have been read and counted."""

    texts: Sequence[str]  # each once, stripped
    images: Sequence[ImageRef]  # each once
    counts: dict[str, int]
    files: dict[str, str]  # annotation file -> sha256 of its bytes
    chance: dict[str, float]  # score of a model that guesses, by metric

    def score(self, text_embeddings: np.ndarray, image_embeddings: np.ndarray) -> Result:
        """Embeddings of `texts` [T, D] and of `images` [I, D], in their order and of any float type -> scores."""
        ...


@runtime_checkable
class AsksMixed(Protocol):
    """A `Task` that also asks with an image and words in one vector, of a model that has such vectors."""

    @property
    def mixed(self) -> Sequence[tuple[int, int]]:
        """Numbers of image and text of each such query [Q]."""
        ...

    def score_mixed(
        self, text_embeddings: np.ndarray, image_embeddings: np.ndarray, mixed_embeddings: np.ndarray
    ) -> Result:
        """As `Task.score`, with the embeddings of `mixed` [Q, D], in their order."""
        ...


class Benchmark(Protocol):
    """The declaration: where a benchmark's files are under a data folder, and what must be found in them."""

    title: str
    ties: Ties  # policy of the reported scores
    source: str
    licence: str

    @property
    def only_by_name(self) -> bool:
        """Whether it is left out where all benchmarks of a folder are asked for."""
        ...

    @property
    def table(self) -> TableLayout:
        """The table that its scores are shown in."""
        ...

    @property
    def columns(self) -> Sequence[ScoreColumn]:
        """Its columns there, by heading and then as they are declared."""
        ...

    @property
    def headlines(self) -> Mapping[str, str]:
        """The metrics that stand for it where there is room for one or two, and what they are called."""
        ...

    @property
    def paper_layers(self) -> Mapping[str, str]:
        """Metric -> its key in the paper's table of layers, where it is there."""
        ...

    def read(self, data_uri: str) -> Task:
        """Read the annotations, check the counts, find the images.

        Raises FileNotFoundError when the annotations are not under `data_uri`; ValueError, saying what was expected and
        what was found, when they are there but are not what they should be, or an image is missing.
        """
        ...


def benchmark_names() -> list[str]:
    """Names of all benchmarks, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent / "tasks")]))


def find_benchmark(name: str) -> Benchmark:
    """The benchmark declared in `tasks/<name>.py`; ValueError if there is none."""
    if name not in benchmark_names():
        raise ValueError(f"benchmarks: there is no {name!r}; known are {', '.join(benchmark_names())}")
    return importlib.import_module(f"vladva.benchmarks.tasks.{name}").BENCHMARK


def score_outcomes(outcomes: Mapping[str, Outcomes], ties: Ties) -> tuple[dict[str, float], dict[str, float]]:
    """Outcomes by metric -> scores and tie rates by metric."""
    scores = {metric: samples.mean(ties) for metric, samples in outcomes.items()}
    return scores, {metric: samples.tie_rate for metric, samples in outcomes.items()}


def check_count(title: str, what: str, expected: int | Sequence[int] | None, found: int) -> None:
    """Raise ValueError unless `found` is the expected number (or one of them); None expects nothing."""
    allowed = [expected] if isinstance(expected, int) else list(expected or [found])
    if found not in allowed:
        raise ValueError(f"{title}: expected {' or '.join(map(str, allowed))} {what}, found {found}")
