"""Statistics: what a scanned data set holds, in counts, from its sidecars alone.

One Ray task a shard counts, and the counts are added up here, so that memory does not grow with the data set. Only for
the duplicates something of single samples is kept: of a big data set, of every n-th different image and caption (all
copies of it, by checksum), and the numbers are multiplied by n.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vladva.config import DataConfig
from vladva.core import ray_tasks
from vladva.core.progress import Progress
from vladva.core.storage import RangedFile
from vladva.data.shard_index import ShardIndex
from vladva.data.sidecar import sidecar_uri

TOKEN_BOUNDS = (0, 5, 10, 15, 20, 25, 30, 40, 50, 75, 100, 150, 200, 300, 400, 500, 1000)  # the last bin is open
CAPTIONS_PER_IMAGE = 11  # captions from which images are counted together
SIDE_BOUNDS = tuple(round(2 ** (power / 2)) for power in range(34))  # pixels: 1, 1, 2, 3, 4, 6, 8, 11, 16 ..
MEGAPIXEL_BOUNDS = (0.0, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # the last bin is open
SAMPLED = 500_000  # different images, and captions, that are watched for copies
CAPTIONS_EXPECTED = 4  # per image, for the same
LARGEST = 5


@dataclass
class Duplicates:
    """What occurs more than once, of one in `every`: key -> [how often, name of one of them]."""

    every: int
    seen: dict[int, list[Any]] = field(default_factory=dict)

    def add(self, key: int, count: int, name: str) -> None:
        """`count` more of this key."""
        known = self.seen.setdefault(key, [0, name])
        known[0] += count
        known[1] = min(known[1], name)  # the tasks come in any order

    @property
    def num_duplicates(self) -> int:
        """Copies beyond the first; an estimate where `every` is more than 1."""
        return self.every * sum(count - 1 for count, _ in self.seen.values())

    @property
    def groups(self) -> int:
        """Different things that occur more than once; an estimate likewise."""
        return self.every * sum(count > 1 for count, _ in self.seen.values())

    def largest(self) -> list[tuple[int, str]]:
        """(how often, name) of what occurs most."""
        repeated = [(count, name) for count, name in self.seen.values() if count > 1]
        return sorted(repeated, key=lambda found: (-found[0], found[1]))[:LARGEST]


@dataclass
class DatasetStatistics:
    """Counts of a data set. Histograms are bin number -> count; sizes are (width's bin, height's bin) -> count."""

    num_samples: int
    num_shards: int
    images: Duplicates
    captions: Duplicates
    fingerprint: str
    num_captions: int = 0
    image_bytes: int = 0
    texts_alone: int = 0
    tokens: Counter[int] = field(default_factory=Counter)
    captions_per_image: Counter[int] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    megapixels: Counter[int] = field(default_factory=Counter)

    def add(self, counts: dict[str, Any]) -> None:
        """Take what `ShardCounter` gives."""
        for name in ("num_captions", "image_bytes", "texts_alone"):
            setattr(self, name, getattr(self, name) + counts[name])
        for name in ("tokens", "captions_per_image", "megapixels"):
            getattr(self, name).update(dict(counts[name]))
        self.sizes.update({(width, height): count for width, height, count in counts["sizes"]})
        for copies, rows in ((self.images, counts["images"]), (self.captions, counts["captions"])):
            for row in rows:
                copies.add(*row)

    def kinds(self) -> dict[str, int]:
        """Captions that training takes for short, for long, and does not use, by the bounds of its configuration."""
        short, long = (TOKEN_BOUNDS.index(bound) for bound in (DataConfig.short_below, DataConfig.long_below))
        bins = self.tokens.items()
        return {
            "short": sum(count for bin_, count in bins if bin_ < short),
            "long": sum(count for bin_, count in bins if short <= bin_ < long),
            "unused": sum(count for bin_, count in bins if bin_ >= long),
        }

    def __str__(self) -> str:
        kinds = self.kinds()
        about = "about " if self.images.every > 1 else ""
        return (
            f"{self.image_bytes / 1e6:,.1f} MB of images, {self.num_captions:,} captions: {kinds['short']:,} short "
            f"(below {DataConfig.short_below} tokens), {kinds['long']:,} long, {kinds['unused']:,} of "
            f"{DataConfig.long_below} tokens or more; {about}{self.images.num_duplicates:,} images and "
            f"{about}{self.captions.num_duplicates:,} captions are copies of another"
        )


def compute_statistics(data_uri: str, index_uri: str | None = None) -> DatasetStatistics:
    """Count what is in the index of a scanned data set; needs a Ray cluster. Raises ValueError where there is none."""
    index = ShardIndex.open(data_uri, index_uri)
    every = max(1, math.ceil(index.num_samples / SAMPLED))
    captions_every = max(1, math.ceil(index.num_samples * CAPTIONS_EXPECTED / SAMPLED))
    counter = ShardCounter(index.index_uri, index.shards, every, captions_every)
    shards = range(len(index.shards))
    summary = DatasetStatistics(
        index.num_samples, len(shards), Duplicates(every), Duplicates(captions_every), index.fingerprint
    )
    with Progress("counting shards", len(shards)) as progress:
        for counts in ray_tasks.each(counter, shards):
            summary.add(counts)
            progress.advance(1)
    return summary


@dataclass(frozen=True)
class ShardCounter:
    """Ray Data stage: number of a shard -> its counts."""

    index_uri: str
    shards: tuple[str, ...]
    every: int
    captions_every: int

    def __call__(self, number: int) -> dict[str, Any]:
        columns = ["id", "length", "captions", "caption_tokens", "width", "height", "crc32"]
        table = pq.ParquetFile(RangedFile(sidecar_uri(self.index_uri, self.shards[number]))).read(columns)
        width, height, length = (table[name].to_numpy().astype(np.int64) for name in ("width", "height", "length"))
        shown = width > 0
        tokens = pc.list_flatten(table["caption_tokens"]).to_numpy()
        captions_per_image = pc.list_value_length(table["captions"]).to_numpy()
        sides = [np.searchsorted(SIDE_BOUNDS, side[shown], side="right") - 1 for side in (width, height)]
        megapixels = (width * height)[shown] / 1e6
        keys = table["crc32"].to_numpy().astype(np.int64) << 30 | length & 0x3FFFFFFF
        return {
            "num_captions": len(tokens),
            "image_bytes": int(length[shown].sum()),
            "texts_alone": int((~shown).sum()),
            "tokens": _counted(np.searchsorted(TOKEN_BOUNDS, tokens, side="right") - 1),
            "captions_per_image": _counted(np.minimum(captions_per_image, CAPTIONS_PER_IMAGE)),
            "megapixels": _counted(np.searchsorted(MEGAPIXEL_BOUNDS, megapixels, side="right") - 1),
            "sizes": [[bin_ // 100, bin_ % 100, count] for bin_, count in _counted(sides[0] * 100 + sides[1])],
            "images": list(self._images(keys, table["id"])),
            "captions": list(self._captions(table)),
        }

    def _images(self, keys: np.ndarray, ids: pa.ChunkedArray) -> Iterator[tuple[int, int, str]]:
        # The checksum's bits are as good as random: its remainder draws one in `every`, in all shards the same ones.
        unique, first, counts = np.unique(keys, return_index=True, return_counts=True)
        for key, row, count in zip(unique.tolist(), first.tolist(), counts.tolist(), strict=True):
            if (key >> 30) % self.every == 0:
                yield key, count, ids[row].as_py()

    def _captions(self, table: pa.Table) -> Iterator[tuple[int, int, str]]:
        for text, count in Counter(pc.list_flatten(table["captions"]).to_pylist()).items():
            key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
            if key % self.captions_every == 0:
                yield key, count, text[:200]


def _counted(bins: np.ndarray) -> list[list[int]]:
    values, counts = np.unique(bins, return_counts=True)
    return [[int(value), int(count)] for value, count in zip(values, counts, strict=True)]
