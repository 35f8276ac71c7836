"""Composed retrieval: is the picture that an image and a change in words ask for nearest to them, of all pictures?

`composed_r<k>`: of all queries, the share whose target is among the k nearest images; the query's own image is not
counted, the other images and the targets of all other queries are. A query is one vector of image and words. Beside it
stand what its parts reach by themselves: `image_only_r1`, `text_only_r1`, and `halfway_r1`, the sum of the two vectors,
which is also all that a model without such queries (a dual encoder) has.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vladva.benchmarks.benchmark import Result, check_count, score_outcomes
from vladva.benchmarks.metrics import Ranks, Ties, hits_at, rank_scores, unit_rows
from vladva.benchmarks.protocols.unique_items import UniqueItems, in_lists
from vladva.benchmarks.readers.files import parse_json, read_first
from vladva.benchmarks.readers.images import pick_images
from vladva.benchmarks.score_columns import OWN_TABLE, ScoreColumn, TableLayout
from vladva.data.image_refs import ImageRef

COMPOSED_CUTOFFS = (1, 5, 10)
KEPT = 10  # neighbours of a query in the outcomes, for looking at
CONTROLS = {"image_only": "image alone", "text_only": "words alone", "halfway": "sum of both"}


@dataclass(frozen=True, kw_only=True)
class Composed:
    """Declaration of a composed-retrieval benchmark. Paths are relative to the data folder and tried in order."""

    title: str
    annotations: tuple[str, ...]
    images: tuple[str, ...]
    source: str
    licence: str
    table: TableLayout = OWN_TABLE
    only_by_name: bool = False
    paper_layers: Mapping[str, str] = field(default_factory=dict)
    ties: Ties = "expected"

    @property
    def columns(self) -> Sequence[ScoreColumn]:
        """See `Benchmark.columns`: each cut-off, then what the parts reach."""
        found = [ScoreColumn(("composed", f"R@{k}"), f"composed_r{k}") for k in COMPOSED_CUTOFFS]
        return found + [ScoreColumn((heading, "R@1"), f"{name}_r1") for name, heading in CONTROLS.items()]

    @property
    def headlines(self) -> Mapping[str, str]:
        """See `Benchmark.headlines`."""
        return {"composed_r1": "composed retrieval R@1"}

    def read(self, data_uri: str) -> "ComposedTask":
        """See `Benchmark.read`."""
        file = read_first(data_uri, self.annotations, self.title)
        rows = parse_json(file.path, file.data)
        fields = ("image", "text", "target")
        good = isinstance(rows, list) and all(
            isinstance(row, dict) and all(isinstance(row.get(name), str) for name in fields) for row in rows
        )
        if not good or not rows:
            raise ValueError(f'{file.path}: expected a list of {{"image", "text", "target"}}, each a text')
        names, texts = UniqueItems(), UniqueItems()
        image, target = (names.add(row[name] for row in rows) for name in ("image", "target"))
        text = texts.add(row["text"].strip() for row in rows)
        check_count(self.title, f"queries in {file.path} that ask for their own image", 0, int((image == target).sum()))
        images = pick_images(data_uri, self.images, names.items, self.title)
        counts = {"queries": len(rows), "images": len(images), "texts": len(texts.items)}
        return ComposedTask(texts.items, images, image, text, target, self.ties, counts, {file.path: file.sha256})


@dataclass(frozen=True)
class ComposedTask:
    """See `Task` and `AsksMixed`. Query q asks `images[image[q]]` with `texts[text[q]]` for `images[target[q]]`."""

    texts: tuple[str, ...]
    images: list[ImageRef]
    image: np.ndarray
    text: np.ndarray
    target: np.ndarray
    ties: Ties
    counts: dict[str, int]
    files: dict[str, str]

    @property
    def mixed(self) -> list[tuple[int, int]]:
        """See `AsksMixed.mixed`."""
        return list(zip(self.image.tolist(), self.text.tolist(), strict=True))

    @property
    def chance(self) -> dict[str, float]:
        """A model to which all images are equal draws one of those that are not the query's own."""
        others = len(self.images) - 1
        scores = {f"composed_r{k}": min(1.0, k / others) for k in COMPOSED_CUTOFFS}
        return scores | {f"{name}_r1": 1 / others for name in CONTROLS}

    def score(self, text_embeddings: np.ndarray, image_embeddings: np.ndarray) -> Result:
        """See `Task.score`: of a model without composed queries, whose query is the sum of the two vectors."""
        texts, images = unit_rows(text_embeddings)[self.text], unit_rows(image_embeddings)
        if images.ndim == 3:
            raise ValueError("composed retrieval: the model gives an image several vectors, of which no query is made")
        return self.score_mixed(text_embeddings, image_embeddings, unit_rows(texts + images[self.image]))

    def score_mixed(
        self, text_embeddings: np.ndarray, image_embeddings: np.ndarray, mixed_embeddings: np.ndarray
    ) -> Result:
        """See `AsksMixed.score_mixed`."""
        texts, images = unit_rows(text_embeddings)[self.text], unit_rows(image_embeddings)
        own = images[self.image]
        asked = {"composed": unit_rows(mixed_embeddings), "image_only": own, "text_only": texts}
        asked["halfway"] = unit_rows(texts + own)
        ranks = {name: self._rank(queries, images) for name, queries in asked.items()}
        hits = {f"composed_r{k}": hits_at(ranks["composed"], k) for k in COMPOSED_CUTOFFS}
        hits |= {f"{name}_r1": hits_at(ranks[name], 1) for name in CONTROLS}
        samples = {"queries": {metric: outcomes.under(self.ties) for metric, outcomes in hits.items()}}
        return Result(*score_outcomes(hits, self.ties), self._outcomes(ranks["composed"]), samples)

    def _rank(self, queries: np.ndarray, images: np.ndarray) -> Ranks:
        """Where the targets stand, the query's own image left out."""
        scores = queries @ images.T
        scores[np.arange(len(scores)), self.image] = -np.inf
        return rank_scores(scores, self.target, np.arange(len(images)), keep=KEPT)

    def _outcomes(self, ranks: Ranks) -> pa.Table:
        names = pa.array([image.name for image in self.images])
        return pa.table(
            {
                "image": names.take(pa.array(self.image)),
                "text": pa.array(self.texts).take(pa.array(self.text)),
                "target": names.take(pa.array(self.target)),
                "above": ranks.above,
                "tied": ranks.tied,
                "nearest": in_lists(ranks.nearest, names),
                "similarity": in_lists(ranks.similarity),
            }
        )
