"""Choosing a caption: is the true caption nearer to the image than one false caption? SugarCrepe's protocol.

One score per subset, strict: a tie is a failure. Beside them the two averages in use, labelled: `_macro` is the mean of
subset scores (most papers), `_micro` the mean over all rows (SugarCrepe's own table 5).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vladva.benchmarks.benchmark import PairScores, Result, score_outcomes
from vladva.benchmarks.metrics import Outcomes, Ties, all_above, cosines, unit_rows
from vladva.benchmarks.protocols.subsets import Subset, read_subsets
from vladva.benchmarks.protocols.unique_items import UniqueItems
from vladva.benchmarks.readers.images import pick_images
from vladva.benchmarks.readers.sugar_crepe import CaptionChoiceRow
from vladva.benchmarks.score_columns import OWN_TABLE, ScoreColumn, TableLayout
from vladva.data.image_refs import ImageRef


@dataclass(frozen=True, kw_only=True)
class CaptionChoice:
    """Declaration of a caption-choice benchmark. Paths are relative to the data folder and tried in order."""

    title: str
    annotations: tuple[str, ...]
    images: tuple[str, ...]
    subsets: tuple[Subset, ...]
    groups: Mapping[str, tuple[str, ...]]  # macro average -> its subsets
    source: str
    licence: str
    ties: Ties = "strict"
    table: TableLayout = OWN_TABLE
    only_by_name: bool = False
    paper_layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> Sequence[ScoreColumn]:
        """See `Benchmark.columns`: the subsets, whose metrics are GROUP_KIND and the paper's keys GROUP.KIND."""
        split = [subset.metric.partition("_") for subset in self.subsets]
        return [
            ScoreColumn((group.title(), kind.title()), group + _ + kind, f"{group}.{kind}") for group, _, kind in split
        ]

    @property
    def headlines(self) -> Mapping[str, str]:
        """See `Benchmark.headlines`."""
        return {"average_macro": "average"}

    def read(self, data_uri: str) -> "CaptionChoiceTask":
        """See `Benchmark.read`."""
        subsets = read_subsets(data_uri, self.annotations, self.subsets, self.title)
        texts, images = UniqueItems(), UniqueItems()
        triples = {
            metric: np.stack(
                [
                    images.add(row.image for row in rows),
                    texts.add(row.caption.strip() for row in rows),
                    texts.add(row.negative.strip() for row in rows),
                ]
            )
            for metric, rows in subsets.rows.items()
        }
        return CaptionChoiceTask(
            texts.items,
            pick_images(data_uri, self.images, images.items, self.title),
            triples,
            subsets.rows,
            self.groups,
            self.ties,
            counts=subsets.counts | {"images": len(images.items)},
            files=subsets.files,
        )


@dataclass(frozen=True)
class CaptionChoiceTask:
    """See `Task`. `triples[metric]` is int [3, N]: image, true caption and false caption of each row."""

    texts: tuple[str, ...]
    images: list[ImageRef]
    triples: dict[str, np.ndarray]
    rows: dict[str, list[CaptionChoiceRow]]
    groups: Mapping[str, tuple[str, ...]]
    ties: Ties
    counts: dict[str, int]
    files: dict[str, str]

    @property
    def chance(self) -> dict[str, float]:
        """One of two, in every subset and average."""
        return dict.fromkeys([*self.triples, *self.groups, "average_macro", "average_micro"], 0.5)

    def score(self, text_embeddings: np.ndarray, image_embeddings: np.ndarray) -> Result:
        """See `Task.score`. Metrics: one per subset, one per group, average_macro, average_micro."""
        texts, images = unit_rows(text_embeddings), unit_rows(image_embeddings)
        return self.score_pairs(lambda image, text: cosines(images[image], texts[text]))

    def score_pairs(self, of_pairs: PairScores) -> Result:
        """The same by any measure of how well an image and a text fit."""
        outcomes: dict[str, Outcomes] = {}
        tables = []
        for metric, (image, caption, negative) in self.triples.items():
            right, wrong = of_pairs(image, caption), of_pairs(image, negative)
            outcomes[metric] = all_above(right[:, None], wrong[:, None])
            tables.append(_table(metric, self.rows[metric], right, wrong, outcomes[metric].under(self.ties)))
        scores, tie_rates = score_outcomes(outcomes, self.ties)
        pooled = Outcomes(*(np.concatenate(columns) for columns in zip(*outcomes.values(), strict=True)))
        averages = dict(self.groups) | {"average_macro": tuple(outcomes)}
        for values in (scores, tie_rates):
            values |= {name: float(np.mean([values[metric] for metric in of])) for name, of in averages.items()}
        scores["average_micro"], tie_rates["average_micro"] = pooled.mean(self.ties), pooled.tie_rate
        samples = {metric: {metric: of.under(self.ties)} for metric, of in outcomes.items()}
        weights = {name: dict.fromkeys(of, 1 / len(of)) for name, of in averages.items()}
        rows = len(pooled.strict)
        weights["average_micro"] = {metric: len(of.strict) / rows for metric, of in outcomes.items()}
        return Result(scores, tie_rates, pa.concat_tables(tables), samples, weights)


def _table(
    metric: str, rows: list[CaptionChoiceRow], right: np.ndarray, wrong: np.ndarray, outcome: np.ndarray
) -> pa.Table:
    return pa.table(
        {
            "task": [metric] * len(rows),
            "sample": [row.key for row in rows],
            "image": [row.image for row in rows],
            "caption": [row.caption for row in rows],
            "negative_caption": [row.negative for row in rows],
            "caption_score": right,
            "negative_score": wrong,
            "outcome": outcome,
        }
    )
