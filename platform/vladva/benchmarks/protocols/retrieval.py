"""Image-text retrieval: is one of an image's own captions nearest to it, and is a caption nearest to its own image?

`t2i_r<k>`: of all captions, the share whose image is among the k nearest images. `i2t_r<k>`: of all images, the
share with at least one of their captions among the k nearest captions of the whole split. Any number of captions per
image; a caption of another image is a negative even when it reads the same, which makes a tie. Where the images
are in groups (nocaps' domains), each score is there for the queries of each group too, against the whole gallery.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256

import numpy as np
import pyarrow as pa

from vladva.benchmarks.benchmark import Result, check_count, score_outcomes
from vladva.benchmarks.metrics import Outcomes, Ranks, Ties, hits_at, rank, unit_rows
from vladva.benchmarks.protocols.unique_items import UniqueItems, in_lists
from vladva.benchmarks.readers.captions import read_caption_tables, read_captioned_images
from vladva.benchmarks.readers.files import AnnotationFile, read_first
from vladva.benchmarks.readers.images import pick_images
from vladva.benchmarks.score_columns import OWN_TABLE, ScoreColumn, TableLayout
from vladva.data.image_refs import ImageRef

RETRIEVAL_CUTOFFS = (1, 5, 10)
DIRECTIONS = {"t2i": ("image retrieval", "image_retrieval"), "i2t": ("text retrieval", "text_retrieval")}
NEAREST = 10  # neighbours kept per query in the outcomes, for looking at


@dataclass(frozen=True, kw_only=True)
class Retrieval:
    """Declaration of a retrieval benchmark. Paths are relative to the data folder and tried in order."""

    title: str
    annotations: tuple[str, ...]
    images: tuple[str, ...]
    source: str
    licence: str
    num_images: int | None = None
    num_captions: int | tuple[int, ...] | None = None
    min_captions_per_image: int = 1
    max_captions_per_image: int | None = None  # keep only the first ones (some papers cut COCO at 5); None keeps all
    tables: tuple[str, ...] = ()  # patterns of Parquet files that hold images and captions, tried first
    groups: Mapping[str, int] | None = None  # group -> its images, where the annotations name groups
    table: TableLayout = OWN_TABLE
    only_by_name: bool = False
    column_title: str = ""  # between "image retrieval" and "R@1" in the headings of a table that is shared
    cutoffs: tuple[int, ...] = (1, 10)  # that have a column
    paper_set: str = ""  # what the paper's keys call the data set
    paper_layers: Mapping[str, str] = field(default_factory=dict)
    image_ids: str = ""  # sha256 of the numbers in the images' names, sorted, one a line; empty expects nothing
    ties: Ties = "expected"

    @property
    def columns(self) -> Sequence[ScoreColumn]:
        """See `Benchmark.columns`: both directions at each of the cut-offs."""
        found = []
        for direction, (heading, paper) in DIRECTIONS.items():
            for k in self.cutoffs:
                headings = (heading, self.column_title, f"R@{k}") if self.column_title else (heading, f"R@{k}")
                key = f"{paper}.{self.paper_set}.R@{k}" if self.paper_set else None
                found.append(ScoreColumn(headings, f"{direction}_r{k}", key))
        return found

    @property
    def headlines(self) -> Mapping[str, str]:
        """See `Benchmark.headlines`."""
        return {f"{direction}_r1": f"{heading} R@1" for direction, (heading, _) in DIRECTIONS.items()}

    def read(self, data_uri: str) -> "RetrievalTask":
        """See `Benchmark.read`."""
        tables = read_caption_tables(data_uri, self.tables)
        if tables:
            file = AnnotationFile(self.tables[0], b"", tables.sha256)
            rows = tables.rows
        else:
            file = read_first(data_uri, self.annotations, self.title)
            rows = read_captioned_images(data_uri, file.path)
            check_ids(self.title, file.path, [row.name for row in rows], self.image_ids)
        check_count(self.title, f"images in {file.path}", self.num_images, len(rows))
        check_count(self.title, f"distinct images in {file.path}", len(rows), len({row.name for row in rows}))
        check_count(self.title, f"captions in {file.path}", self.num_captions, sum(len(row.captions) for row in rows))
        poor = [row.name for row in rows if len(row.captions) < self.min_captions_per_image]
        check_count(self.title, f"images with fewer than {self.min_captions_per_image} captions", 0, len(poor))

        rows = [row._replace(captions=row.captions[: self.max_captions_per_image]) for row in rows]
        owners = np.repeat(np.arange(len(rows)), [len(row.captions) for row in rows])
        texts = UniqueItems()
        caption_text = texts.add(caption.strip() for row in rows for caption in row.captions)
        images = tables.images if tables else pick_images(data_uri, self.images, (row.name for row in rows), self.title)
        counts = {"images": len(rows), "captions": len(owners), "distinct_captions": len(texts.items)}
        if self.max_captions_per_image:
            counts["max_captions_per_image"] = self.max_captions_per_image
        groups = np.array([row.group for row in rows])
        if self.groups and groups[0]:
            for name, expected in self.groups.items():
                check_count(self.title, f"{name} images in {file.path}", expected, int((groups == name).sum()))
        return RetrievalTask(
            texts.items, images, caption_text, owners, self.ties, counts, {file.path: file.sha256}, groups
        )


def check_ids(title: str, path: str, names: Sequence[str], expected: str) -> None:
    """Raise ValueError unless the numbers that end the images' names are those expected; "" expects nothing."""
    if not expected:
        return
    numbers = [name.rpartition(".")[0].rpartition("_")[2].lstrip("0") for name in names]
    # The published hash is of sorted numbers; whether as numbers or as texts is not said.
    orders = sorted(numbers, key=int), sorted(numbers)
    found, other = (sha256("".join(f"{number}\n" for number in order).encode()).hexdigest() for order in orders)
    if expected not in (found, other):
        raise ValueError(
            f"{title}: the images of {path} are not those of the split: expected sha256 {expected[:16]}... of their "
            f"sorted numbers, found {found[:16]}..."
        )


@dataclass(frozen=True)
class RetrievalTask:
    """See `Task`. Caption t of the split is `texts[caption_text[t]]` and describes `images[caption_image[t]]`."""

    texts: tuple[str, ...]
    images: list[ImageRef]
    caption_text: np.ndarray
    caption_image: np.ndarray
    ties: Ties
    counts: dict[str, int]
    files: dict[str, str]
    image_group: np.ndarray  # "" where there are no groups

    @property
    def chance(self) -> dict[str, float]:
        """Scores of a model to which all items are equal: every negative ties with the positives."""
        owned = np.bincount(self.caption_image, minlength=len(self.images))
        one = np.ones(len(self.caption_image), np.int64)
        guesses = {
            "t2i": Ranks(0 * one, one * (len(self.images) - 1), one, one, one),
            "i2t": Ranks(0 * owned, len(self.caption_image) - owned, owned, owned, owned),
        }
        return {metric: hits.mean("expected") for of in self._hits(guesses).values() for metric, hits in of.items()}

    def score(self, text_embeddings: np.ndarray, image_embeddings: np.ndarray) -> Result:
        """See `Task.score`. Metrics: t2i_r1, t2i_r5, t2i_r10, i2t_r1, i2t_r5, i2t_r10; of each group, with its name."""
        return self.result(self.rank(text_embeddings, image_embeddings, NEAREST))

    def rank(self, text_embeddings: np.ndarray, image_embeddings: np.ndarray, keep: int) -> dict[str, Ranks]:
        """Where the right ones stand in each direction, and the `keep` nearest of each query."""
        captions, images = unit_rows(text_embeddings)[self.caption_text], unit_rows(image_embeddings)
        numbers = np.arange(len(images))
        return {
            "t2i": rank(captions, images, self.caption_image, numbers, keep=keep),
            "i2t": rank(images, captions, numbers, self.caption_image, keep=keep),
        }

    def nearest_pairs(self, direction: str, ranks: Ranks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of each query with its nearest: numbers of image and text, whether they belong together; each [Q, keep]."""
        nearest = ranks.nearest
        queries = np.broadcast_to(np.arange(len(nearest))[:, None], nearest.shape)
        image, caption = (nearest, queries) if direction == "t2i" else (queries, nearest)
        return image, self.caption_text[caption], self.caption_image[caption] == image

    def result(self, ranks: Mapping[str, Ranks]) -> Result:
        """The scores and outcomes of ranks in both directions."""
        to_image, to_text = ranks["t2i"], ranks["i2t"]
        sets = self._hits(ranks)
        samples = {name: {metric: hits.under(self.ties) for metric, hits in of.items()} for name, of in sets.items()}
        hits = {metric: outcomes for of in sets.values() for metric, outcomes in of.items()}
        return Result(*score_outcomes(hits, self.ties), self._outcomes(to_image, to_text), samples)

    def _hits(self, directions: Mapping[str, Ranks]) -> dict[str, dict[str, Outcomes]]:
        """Set of queries -> metric -> outcomes: all queries of each direction, then those of each group."""
        group_of = {"t2i": self.image_group[self.caption_image], "i2t": self.image_group}
        sets = {}
        for direction, ranks in directions.items():
            hits = {f"{direction}_r{k}": hits_at(ranks, k) for k in RETRIEVAL_CUTOFFS}
            sets[direction] = hits
            for group in sorted(set(self.image_group) - {""}):
                among = group_of[direction] == group
                sets[f"{direction} {group}"] = {
                    f"{metric}_{group.replace('-', '_')}": Outcomes(*(policy[among] for policy in outcomes))
                    for metric, outcomes in hits.items()
                }
        return sets

    def _outcomes(self, to_image: Ranks, to_text: Ranks) -> pa.Table:
        """One row per query. `rank` counts from 1 and is the worst place the best positive can take among its ties."""
        image_names = np.array([image.name for image in self.images], object)
        captions = np.array(self.texts, object)[self.caption_text]
        right = to_image.nearest == self.caption_image[:, None]
        to_image_rows = _rows("t2i", captions, image_names[self.caption_image], image_names, to_image, right)
        right = self.caption_image[to_text.nearest] == np.arange(len(image_names))[:, None]
        return pa.concat_tables([to_image_rows, _rows("i2t", image_names, image_names, captions, to_text, right)])


def _rows(
    task: str, queries: np.ndarray, owners: np.ndarray, gallery: np.ndarray, ranks: Ranks, right: np.ndarray
) -> pa.Table:
    return pa.table(
        {
            "task": [task] * len(queries),
            "query": pa.array(queries, pa.string()),
            "image": pa.array(owners, pa.string()),
            "rank": ranks.above + ranks.tied + 1,
            "above": ranks.above,
            "tied": ranks.tied,
            "tied_positives": ranks.tied_positives,
            "nearest": in_lists(ranks.nearest, names=pa.array(gallery, pa.string())),
            "similarity": in_lists(ranks.similarity),
            "right": in_lists(right),
        }
    )
