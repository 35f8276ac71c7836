"""Image-text retrieval: is one of a picture's own captions nearest to it, and is a caption nearest to its own picture?

`t2i_r<k>`: of all captions, the share whose picture is among the k nearest pictures. `i2t_r<k>`: of all pictures, the
share with at least one of their captions among the k nearest captions of the whole split. Any number of captions per
picture; a caption of another picture is a negative even when it reads the same, which makes a tie.
"""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from vladva.benchmarks import Result, check, summarise
from vladva.benchmarks.kinds.samples import Unique, clean, in_lists
from vladva.benchmarks.readers.captions import CaptionedImage, read_captions
from vladva.benchmarks.readers.files import read_first
from vladva.benchmarks.readers.images import ImageRef, pick_images
from vladva.metrics import Ranks, Ties, hits_at, rank, unit_rows

CUTOFFS = (1, 5, 10)
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
    ties: Ties = "expected"

    def read(self, data_uri: str) -> "RetrievalTask":
        """See `Benchmark.read`."""
        file = read_first(data_uri, self.annotations, self.title)
        rows = [
            CaptionedImage(row.name, row.captions[: self.max_captions_per_image])
            for row in read_captions(file.path, file.data)
        ]
        owners = np.repeat(np.arange(len(rows)), [len(row.captions) for row in rows])
        check(self.title, f"pictures in {file.path}", self.num_images, len(rows))
        check(self.title, f"distinct pictures in {file.path}", len(rows), len({row.name for row in rows}))
        check(self.title, f"captions in {file.path}", self.num_captions, len(owners))
        poor = [row.name for row in rows if len(row.captions) < self.min_captions_per_image]
        check(self.title, f"pictures with fewer than {self.min_captions_per_image} captions", 0, len(poor))

        texts = Unique()
        caption_text = texts.add(clean(caption) for row in rows for caption in row.captions)
        images = pick_images(data_uri, self.images, (row.name for row in rows), self.title)
        counts = {"images": len(rows), "captions": len(owners), "distinct_captions": len(texts.items)}
        if self.max_captions_per_image:
            counts["max_captions_per_image"] = self.max_captions_per_image
        return RetrievalTask(
            texts.items, images, caption_text, owners, self.ties, counts=counts, files={file.path: file.sha256}
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

    @property
    def chance(self) -> dict[str, float]:
        """Scores of a model to which all items are equal: every negative ties with the positives."""
        owned = np.bincount(self.caption_image, minlength=len(self.images))
        one = np.ones(1, np.int64)
        guesses = {
            "t2i": Ranks(0 * one, one * (len(self.images) - 1), one, one, one),
            "i2t": Ranks(0 * owned, len(self.caption_image) - owned, owned, owned, owned),
        }
        return {f"{way}_r{k}": hits_at(ranks, k).mean("expected") for way, ranks in guesses.items() for k in CUTOFFS}

    def score(self, text_embeddings: np.ndarray, image_embeddings: np.ndarray) -> Result:
        """See `Task.score`. Metrics: t2i_r1, t2i_r5, t2i_r10, i2t_r1, i2t_r5, i2t_r10."""
        captions, images = unit_rows(text_embeddings)[self.caption_text], unit_rows(image_embeddings)
        numbers = np.arange(len(images))
        to_image = rank(captions, images, self.caption_image, numbers, keep=NEAREST)
        to_text = rank(images, captions, numbers, self.caption_image, keep=NEAREST)
        ways = {"t2i": to_image, "i2t": to_text}
        hits = {f"{way}_r{k}": hits_at(ranks, k) for way, ranks in ways.items() for k in CUTOFFS}
        samples = {way: {f"{way}_r{k}": hits[f"{way}_r{k}"].under(self.ties) for k in CUTOFFS} for way in ways}
        return Result(*summarise(hits, self.ties), self._outcomes(to_image, to_text), samples)

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
