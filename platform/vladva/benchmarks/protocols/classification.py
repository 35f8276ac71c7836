"""Zero-shot classification: is an image's class, described in words, the nearest of all classes? (CLIP's protocol.)

A class is the normalised mean of the normalised embeddings of its name in several templates. Classes of the same name
are equal and tie; the reported score gives them their expected share (`metrics.Outcomes`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import resources

import numpy as np
import pyarrow as pa

from vladva.benchmarks.benchmark import Result, check_count, score_outcomes
from vladva.benchmarks.metrics import Outcomes, Ties, class_embeddings, hits_at, rank, unit_rows
from vladva.benchmarks.protocols.unique_items import UniqueItems, in_lists
from vladva.benchmarks.readers.labels import read_labelled
from vladva.benchmarks.score_columns import OWN_TABLE, ScoreColumn, TableLayout
from vladva.data.image_refs import ImageRef

TOP_K = (1, 5)


@dataclass(frozen=True, kw_only=True)
class Classification:
    """Declaration of a classification benchmark. Image folders are relative to the data folder and tried in order."""

    title: str
    images: tuple[str, ...]
    prompts: str  # file in benchmarks/: class names in the order of the labels, and templates by suffix of the metric
    source: str
    licence: str
    num_images: int | None = None
    ties: Ties = "expected"
    table: TableLayout = OWN_TABLE
    only_by_name: bool = False
    paper_layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> Sequence[ScoreColumn]:
        """See `Benchmark.columns`."""
        return [ScoreColumn((f"Top-{k}",), f"top{k}", f"top{k}") for k in TOP_K]

    @property
    def headlines(self) -> Mapping[str, str]:
        """See `Benchmark.headlines`."""
        return {"top1": "top-1"}

    def read(self, data_uri: str) -> "ClassificationTask":
        """See `Benchmark.read`."""
        labelled = read_labelled(data_uri, self.images, self.title)
        check_count(self.title, "images", self.num_images, len(labelled.images))
        file = resources.files("vladva.benchmarks.tasks").joinpath(self.prompts).read_bytes()
        words = json.loads(file)
        names = words["class_names"]
        if labelled.num_folders:
            check_count(self.title, "class folders", len(names), labelled.num_folders)
        texts = UniqueItems()
        prompts = {
            suffix: np.stack([texts.add(template.replace("{c}", name) for template in templates) for name in names])
            for suffix, templates in words["templates"].items()
        }
        return ClassificationTask(
            texts.items,
            labelled.images,
            np.array(labelled.labels),
            prompts,
            len(names),
            self.ties,
            counts={"images": len(labelled.images), "classes": len(names), "prompts": len(texts.items)},
            files={self.prompts: sha256(file).hexdigest()},
        )


@dataclass(frozen=True)
class ClassificationTask:
    """See `Task`. `prompts[suffix]` is int [C, P]: the texts that describe each class."""

    texts: tuple[str, ...]
    images: list[ImageRef]
    labels: np.ndarray
    prompts: dict[str, np.ndarray]
    num_classes: int
    ties: Ties
    counts: dict[str, int]
    files: dict[str, str]

    @property
    def chance(self) -> dict[str, float]:
        """k of C classes."""
        return {f"top{k}{suffix}": k / self.num_classes for suffix in self.prompts for k in TOP_K}

    def score(self, text_embeddings: np.ndarray, image_embeddings: np.ndarray) -> Result:
        """See `Task.score`. Metrics: top1 and top5 with each set of templates."""
        images = unit_rows(image_embeddings)
        outcomes: dict[str, Outcomes] = {}
        tables = []
        for suffix, rows in self.prompts.items():
            classes = class_embeddings(text_embeddings, rows)
            ranks = rank(images, classes, self.labels, np.arange(len(classes)), keep=max(TOP_K))
            outcomes |= {f"top{k}{suffix}": hits_at(ranks, k) for k in TOP_K}
            columns = {
                "task": [f"top{suffix}"] * len(images),
                "sample": [image.name for image in self.images],
                "label": self.labels,
                "above": ranks.above,
                "tied": ranks.tied,
                "nearest": in_lists(ranks.nearest),
                "similarity": in_lists(ranks.similarity),
            }
            tables.append(pa.table(columns))
        samples = {"images": {metric: of.under(self.ties) for metric, of in outcomes.items()}}
        return Result(*score_outcomes(outcomes, self.ties), pa.concat_tables(tables), samples)
