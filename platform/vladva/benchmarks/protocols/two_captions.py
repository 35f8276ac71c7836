"""Two true captions against one false one: SugarCrepe++'s protocol. All scores are strict: a tie is a failure.

`<subset>_itt` (image-text): both true captions are nearer to the image than the false one. `<subset>_tot` (text
only): the true captions are nearer to each other than either is to the false one. `<subset>_p1` and `_p2` are the two
halves of ITT. `itt_macro` and `tot_macro` are means over subsets. The three texts get the same prompt.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from vladva.benchmarks.benchmark import PairScores, Result, check_count, score_outcomes
from vladva.benchmarks.metrics import Outcomes, Ties, all_above, cosines, unit_rows
from vladva.benchmarks.protocols.subsets import Subset, read_subsets
from vladva.benchmarks.protocols.unique_items import UniqueItems
from vladva.benchmarks.readers.images import pick_images
from vladva.benchmarks.readers.sugar_crepe import CaptionChoiceRow
from vladva.benchmarks.score_columns import OWN_TABLE, ScoreColumn, TableLayout
from vladva.data.image_refs import ImageRef

CHANCE = {"itt": 1 / 3, "tot": 1 / 3, "p1": 1 / 2, "p2": 1 / 2}


@dataclass(frozen=True, kw_only=True)
class TwoCaptions:
    """Declaration of a two-captions benchmark. Paths are relative to the data folder and tried in order."""

    title: str
    annotations: tuple[str, ...]
    images: tuple[str, ...]
    subsets: tuple[Subset, ...]
    source: str
    licence: str
    num_images: int | None = None
    ties: Ties = "strict"
    table: TableLayout = OWN_TABLE
    only_by_name: bool = False
    paper_layers: Mapping[str, str] = field(default_factory=dict)

    @property
    def columns(self) -> Sequence[ScoreColumn]:
        """See `Benchmark.columns`: both scores of each subset, whose metrics begin with GROUP_KIND."""
        found = []
        for subset in self.subsets:
            group, _, kind = subset.metric.partition("_")
            for score in ("itt", "tot"):
                heading = (group.title(), kind.title(), score.upper())
                found.append(ScoreColumn(heading, f"{subset.metric}_{score}", f"{group}.{kind}.{score.upper()}"))
        return found

    @property
    def headlines(self) -> Mapping[str, str]:
        """See `Benchmark.headlines`."""
        return {"itt_macro": "ITT", "tot_macro": "TOT"}

    def read(self, data_uri: str) -> "TwoCaptionsTask":
        """See `Benchmark.read`."""
        subsets = read_subsets(data_uri, self.annotations, self.subsets, self.title)
        texts, images = UniqueItems(), UniqueItems()
        quadruples = {
            metric: np.stack(
                [
                    images.add(row.image for row in rows),
                    texts.add(row.caption.strip() for row in rows),
                    texts.add(row.caption2.strip() for row in rows),
                    texts.add(row.negative.strip() for row in rows),
                ]
            )
            for metric, rows in subsets.rows.items()
        }
        check_count(self.title, "distinct images in all subsets", self.num_images, len(images.items))
        unwinnable = sum(
            int(((negative == p1) | (negative == p2)).sum()) for _, p1, p2, negative in quadruples.values()
        )
        return TwoCaptionsTask(
            texts.items,
            pick_images(data_uri, self.images, images.items, self.title),
            quadruples,
            subsets.rows,
            self.ties,
            counts=subsets.counts | {"images": len(images.items), "rows_that_cannot_be_won": unwinnable},
            files=subsets.files,
        )


@dataclass(frozen=True)
class TwoCaptionsTask:
    """See `Task`. `quadruples[subset]` is int [4, N]: image, two true captions and the false one of each row."""

    texts: tuple[str, ...]
    images: list[ImageRef]
    quadruples: dict[str, np.ndarray]
    rows: dict[str, list[CaptionChoiceRow]]
    ties: Ties
    counts: dict[str, int]
    files: dict[str, str]

    @property
    def chance(self) -> dict[str, float]:
        """Shares of the random orders of the scores in question that count as success."""
        single = {f"{subset}_{score}": value for subset in self.quadruples for score, value in CHANCE.items()}
        return single | {"itt_macro": CHANCE["itt"], "tot_macro": CHANCE["tot"]}

    def score(self, text_embeddings: np.ndarray, image_embeddings: np.ndarray) -> Result:
        """See `Task.score`. Metrics: four per subset, itt_macro, tot_macro."""
        images = unit_rows(image_embeddings)
        texts = unit_rows(text_embeddings)
        return self.score_pairs(lambda image, text: cosines(images[image], texts[text]), text_embeddings)

    def score_pairs(self, of_pairs: PairScores, text_embeddings: np.ndarray) -> Result:
        """The same by any measure of how well an image and a text fit; texts are compared by their embeddings."""
        texts = unit_rows(text_embeddings)
        outcomes: dict[str, Outcomes] = {}
        tables = []
        for subset, (image, first, second, negative) in self.quadruples.items():
            p1, p2, n = texts[first], texts[second], texts[negative]
            i_p1, i_p2, i_n = (of_pairs(image, text)[:, None] for text in (first, second, negative))
            p1_p2, p1_n, p2_n = (cosines(a, b)[:, None] for a, b in ((p1, p2), (p1, n), (p2, n)))
            found = {
                "itt": all_above(np.hstack([i_p1, i_p2]), i_n),
                "tot": all_above(p1_p2, np.hstack([p1_n, p2_n])),
                "p1": all_above(i_p1, i_n),
                "p2": all_above(i_p2, i_n),
            }
            outcomes |= {f"{subset}_{score}": samples for score, samples in found.items()}
            cosine = {"i_p1": i_p1, "i_p2": i_p2, "i_n": i_n, "p1_p2": p1_p2, "p1_n": p1_n, "p2_n": p2_n}
            tables.append(_table(subset, self.rows[subset], found, cosine, self.ties))
        scores, tie_rates = score_outcomes(outcomes, self.ties)
        for values in (scores, tie_rates):
            for score in ("itt", "tot"):
                values[f"{score}_macro"] = float(np.mean([values[f"{subset}_{score}"] for subset in self.quadruples]))
        samples = {
            subset: {f"{subset}_{score}": outcomes[f"{subset}_{score}"].under(self.ties) for score in CHANCE}
            for subset in self.quadruples
        }
        share = 1 / len(self.quadruples)
        averages = {f"{score}_macro": {f"{s}_{score}": share for s in self.quadruples} for score in ("itt", "tot")}
        return Result(scores, tie_rates, pa.concat_tables(tables), samples, averages)


def _table(
    subset: str, rows: list[CaptionChoiceRow], found: dict[str, Outcomes], cosine: dict[str, np.ndarray], ties: Ties
) -> pa.Table:
    columns: dict[str, Sequence[str] | np.ndarray] = {
        "task": [subset] * len(rows),
        "sample": [row.key for row in rows],
        "image": [row.image for row in rows],
        "caption": [row.caption for row in rows],
        "caption2": [row.caption2 for row in rows],
        "negative_caption": [row.negative for row in rows],
    }
    columns |= {f"cosine_{name}": values[:, 0] for name, values in cosine.items()}
    columns |= {score: samples.under(ties) for score, samples in found.items()}
    return pa.table(columns)
