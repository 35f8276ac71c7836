"""Matching two captions to two images: Winoground's protocol. See `metrics.winoground` for text, image and group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vladva.benchmarks.benchmark import PairScores, Result, check_count, score_outcomes
from vladva.benchmarks.metrics import Ties, cosines, unit_rows, winoground
from vladva.benchmarks.protocols.unique_items import UniqueItems
from vladva.benchmarks.readers.files import read_first
from vladva.benchmarks.readers.images import parquet_images, pick_images
from vladva.benchmarks.readers.winoground import WINOGROUND_IMAGES, WinogroundExample, read_examples
from vladva.benchmarks.score_columns import OWN_TABLE, ScoreColumn, TableLayout
from vladva.data.image_refs import ImageRef


@dataclass(frozen=True, kw_only=True)
class Matching:
    """Declaration of a matching benchmark. Paths are relative to the data folder and tried in order."""

    title: str
    annotations: tuple[str, ...]
    images: tuple[str, ...]
    source: str
    licence: str
    num_examples: int | None = None
    ties: Ties = "strict"
    table: TableLayout = OWN_TABLE
    only_by_name: bool = False
    paper_layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> Sequence[ScoreColumn]:
        """See `Benchmark.columns`."""
        return [ScoreColumn((score.title(),), score, score) for score in ("image", "text", "group")]

    @property
    def headlines(self) -> Mapping[str, str]:
        """See `Benchmark.headlines`."""
        return {score: score for score in ("text", "image", "group")}

    def read(self, data_uri: str) -> "MatchingTask":
        """See `Benchmark.read`."""
        file = read_first(data_uri, self.annotations, self.title)
        examples = read_examples(file.path, file.data)
        check_count(self.title, f"examples in {file.path}", self.num_examples, len(examples))
        names = [example.images[side] for side in (0, 1) for example in examples]
        if file.path.endswith(".parquet"):
            half = len(examples)
            images = [
                *parquet_images(data_uri, file.path, WINOGROUND_IMAGES[0], names[:half]),
                *parquet_images(data_uri, file.path, WINOGROUND_IMAGES[1], names[half:]),
            ]
        else:
            images = pick_images(data_uri, self.images, names, self.title)
        texts = UniqueItems()
        captions = np.stack([texts.add(example.captions[side].strip() for example in examples) for side in (0, 1)])
        counts = {"examples": len(examples), "images": len(images), "distinct_captions": len(texts.items)}
        return MatchingTask(
            texts.items, images, captions, examples, self.ties, counts=counts, files={file.path: file.sha256}
        )


@dataclass(frozen=True)
class MatchingTask:
    """See `Task`. `captions` is int [2, N]; image 0 of example n is `images[n]`, image 1 is `images[N + n]`."""

    texts: tuple[str, ...]
    images: list[ImageRef]
    captions: np.ndarray
    examples: list[WinogroundExample]
    ties: Ties
    counts: dict[str, int]
    files: dict[str, str]

    @property
    def chance(self) -> dict[str, float]:
        """Shares of the random orders of four scores that count as success."""
        return {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}

    def score(self, text_embeddings: np.ndarray, image_embeddings: np.ndarray) -> Result:
        """See `Task.score`. Metrics: text, image, group."""
        texts, images = unit_rows(text_embeddings), unit_rows(image_embeddings)
        return self.score_pairs(lambda image, text: cosines(images[image], texts[text]))

    def score_pairs(self, of_pairs: PairScores) -> Result:
        """The same by any measure of how well an image and a text fit."""
        numbers = np.arange(2 * len(self.examples)).reshape(2, -1)
        pairs = [[of_pairs(numbers[image], self.captions[caption]) for image in (0, 1)] for caption in (0, 1)]
        cosine: np.ndarray = np.array(pairs).transpose(2, 0, 1)  # [N, caption, image]
        outcomes = winoground(cosine)
        columns = {
            "task": ["winoground"] * len(self.examples),
            "sample": [str(example.id) for example in self.examples],
            "tag": [example.tag for example in self.examples],
            **{f"caption_{side}": [example.captions[side] for example in self.examples] for side in (0, 1)},
            **{f"cosine_c{c}_i{i}": cosine[:, c, i] for c in (0, 1) for i in (0, 1)},
            **{metric: samples.under(self.ties) for metric, samples in outcomes.items()},
        }
        samples = {"examples": {metric: of.under(self.ties) for metric, of in outcomes.items()}}
        return Result(*score_outcomes(outcomes, self.ties), pa.table(columns), samples)
