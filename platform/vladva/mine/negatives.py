"""Negatives: for every sample the captions of others that a model ranks near it, and wrongly so.

    images and short captions --embed, index--> OUT/_mine/{table,images,texts}
    a shard's samples --searches--> negatives of each sample --> OUT/SHARD.tar, OUT/_mine/shards/SHARD.parquet

Two ways lead to a negative: a caption near the sample's image, and the caption of an image near one of the sample's
captions. Either must be less similar than the sample's own by a margin, absolute and relative: what is as near as the
positive, or nearer, is likely true as well. Never a caption of the same image, nor of an equal one, nor a text that
either of them has. The nearest are kept.

A shard is written once, with the samples and in the order that it had; its `negatives` are what training reads. The
same call goes on where it was interrupted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from vladva.core import ray_tasks, storage
from vladva.core.progress import Progress
from vladva.data.shard_copy import copy_shard
from vladva.data.shard_index import ShardIndex
from vladva.embed.corpus import ITEM, Corpus
from vladva.embed.item_source import item_dataset
from vladva.embed.pipeline import encode
from vladva.embed.source_items import ROWS_PER_READ
from vladva.embed.table import embedding_matrix, open_table, read_each
from vladva.index.build import build_index
from vladva.index.vector_index import VectorIndex, open_index

if TYPE_CHECKING:
    from vladva.data.sidecar import SampleRef
    from vladva.index.store import VectorStore

MINED = "_mine"  # folder in OUT: what is no shard
INDEXED: tuple[Literal["image", "text"], ...] = ("image", "text")
NEGATIVE_ROWS = pa.schema(
    {
        "id": pa.string(),  # of the sample
        "caption": pa.string(),  # its own, which the negative is compared with
        "similarity": pa.float32(),
        "negative": pa.string(),
        "negative_similarity": pa.float32(),
        "negative_id": pa.string(),  # of the sample whose caption it is
        "found_by": pa.string(),  # "image" or "caption"
    }
)


@dataclass(frozen=True)
class MiningConfig:
    """What is looked for."""

    per_sample: int = 4
    """Negatives kept of each sample, at most."""
    neighbours: int = 50
    """Hits that are looked at for each image, and for each caption."""
    margin: float = 0.05
    """A negative is less similar than the sample's own by so much, at least."""
    relative: float = 0.95
    """And no more than this fraction of it."""
    short_below: int = 30
    """Captions of fewer tokens are short; others are not contrasted, and neither searched nor found."""

    def __post_init__(self) -> None:
        for name, value in (("per_sample", self.per_sample), ("neighbours", self.neighbours)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.margin < 0 or not 0 < self.relative <= 1:
            raise ValueError(
                f"margin is {self.margin} and relative {self.relative}: a negative must be less similar than the "
                f"positive, so the one must be 0 or more, the other above 0 and at most 1"
            )

    def ceiling(self, positive: float) -> float:
        """The highest similarity of a negative, given that of the sample's own."""
        return min(positive - self.margin, positive * self.relative if positive > 0 else positive)


@dataclass(frozen=True)
class MiningQuery:
    """A sample to find negatives of: its image's vector [D], and its short captions with theirs [C, D]."""

    id: str
    image_D: np.ndarray
    captions: Sequence[str]
    captions_CD: np.ndarray


@dataclass(frozen=True)
class MinedNegative:
    """A caption that the model ranks near a sample; `caption` is the sample's own that it is compared with."""

    text: str
    similarity: float
    owner: str
    caption: str
    positive: float
    found_by: Literal["image", "caption"]

    @property
    def gap(self) -> float:
        """How much less similar it is than the sample's own."""
        return self.positive - self.similarity


class EqualImages:
    """Samples that have the same image as another: those ids, and the captions of all that share an image."""

    def __init__(self, image_of: Mapping[str, bytes], captions: Mapping[bytes, frozenset[str]]) -> None:
        self.image_of, self.captions = image_of, captions

    def same(self, one: str, other: str) -> bool:
        """Whether two samples are the same, or have the same image."""
        return one == other or (one in self.image_of and self.image_of[one] == self.image_of.get(other))

    def captions_of(self, sample: str) -> frozenset[str]:
        """The captions of the samples with the same image."""
        return self.captions.get(self.image_of[sample], frozenset()) if sample in self.image_of else frozenset()


class NegativeFinder:
    """Samples -> their negatives, by searches in two indexes of one model: of captions, and of images."""

    def __init__(self, texts: VectorStore, images: VectorStore, equal: EqualImages, config: MiningConfig) -> None:
        self.texts, self.images, self.equal, self.config = texts, images, equal, config

    def __call__(self, query: MiningQuery) -> list[MinedNegative]:
        """The nearest negatives of a sample, nearest first; none for a sample without short caption."""
        if not query.captions:
            return []
        own = {*query.captions, *self.equal.captions_of(query.id)}
        best: dict[str, MinedNegative] = {}
        for found in (*self.near_image(query), *self.near_captions(query)):
            allowed = found.similarity <= self.config.ceiling(found.positive)
            if not allowed or found.text in own or self.equal.same(query.id, found.owner):
                continue
            if found.text not in best or found.gap < best[found.text].gap:
                best[found.text] = found
        nearest = sorted(best.values(), key=lambda each: (each.gap, each.text))
        return nearest[: self.config.per_sample]

    def near_image(self, query: MiningQuery) -> Iterator[MinedNegative]:
        """Captions near the image, beside the nearest of its own."""
        similarities_C = query.captions_CD @ query.image_D
        nearest = int(similarities_C.argmax())
        for hit in self.texts.search(query.image_D, min(self.config.neighbours, self.texts.num_rows)):
            owner = hit.id.rpartition("#")[0]
            positive = float(similarities_C[nearest])
            yield MinedNegative(hit.columns["text"], hit.score, owner, query.captions[nearest], positive, "image")

    def near_captions(self, query: MiningQuery) -> Iterator[MinedNegative]:
        """The captions of images near one of the captions, beside its own image."""
        for caption, caption_D in zip(query.captions, query.captions_CD, strict=True):
            positive = float(caption_D @ query.image_D)
            for hit in self.images.search(caption_D, min(self.config.neighbours, self.images.num_rows)):
                if hit.columns["caption"]:
                    yield MinedNegative(hit.columns["caption"], hit.score, hit.id, caption, positive, "caption")


# --- the job ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MiningSummary:
    """What was found: of how many samples, how many negatives, and by which way."""

    uri: str
    samples: int
    with_negatives: int
    negatives: int
    found_by: dict[str, int]
    copied_shards: int  # now; the others were there
    unreadable: int  # members of tars that are no files: they are in no copy
    fingerprint: str

    def __str__(self) -> str:
        ways = ", ".join(f"{count:,} near its {way}" for way, count in sorted(self.found_by.items()))
        return (
            f"{self.uri}: {self.negatives:,} negatives ({ways or 'none'}) of {self.with_negatives:,} of "
            f"{self.samples:,} samples, by model {self.fingerprint}"
        )


def mine(
    model: str,
    data_uri: str,
    out_uri: str,
    config: MiningConfig,
    *,
    adapter: bool = True,
    actors: int | tuple[int, int] = 2,
    batch_size: int = 64,
    dtype: str = "float32",
    cpus_per_actor: int = 1,
    gpus_per_actor: float = 0,
) -> MiningSummary:
    """Copy the shards of a scanned data set with the negatives that the model gives each sample; needs a Ray cluster.

    Raises ValueError for samples without images, and where `out_uri` holds what was mined otherwise.
    """
    index = ShardIndex.open(data_uri)
    out_uri = storage.absolute(out_uri)
    if out_uri == index.data_uri:
        raise ValueError(f"--out {out_uri} is where the data are; give another folder")
    if index.samples(0, 1)[0].width == 0:
        raise ValueError(f"{index.data_uri} holds texts without images; negatives are mined for images")
    table = storage.join(out_uri, MINED, "table")
    items = mining_items(index, config.short_below)
    encode(
        items.items,
        model,
        table,
        adapter=adapter,
        actors=actors,
        batch_size=batch_size,
        dtype=dtype,
        cpus_per_actor=cpus_per_actor,
        gpus_per_actor=gpus_per_actor,
        read_images=items.read_images,
        corpus=items.uri,
        total=items.num_items,
    )
    return copy_with_negatives(index, out_uri, config)


def copy_with_negatives(index: ShardIndex, out_uri: str, config: MiningConfig) -> MiningSummary:
    """What `mine` does once everything is embedded."""
    table = storage.join(out_uri, MINED, "table")
    fingerprint = open_table(table).fingerprint
    claim_mining(out_uri, index, fingerprint, config)
    for kind in INDEXED:
        index_once(table, storage.join(out_uri, MINED, f"{kind}s"), kind)
    job = ShardMiner(index, out_uri, equal_images(table, index), config)
    found: Counter[str] = Counter()
    with Progress("mining", index.num_samples) as progress:
        for counts in ray_tasks.each(job, range(len(index.shards))):
            found.update(counts)
            progress.advance(counts["samples"], f"{found['negatives']:,} negatives")
    return MiningSummary(
        out_uri,
        found["samples"],
        found["with_negatives"],
        found["negatives"],
        {way: found[way] for way in ("image", "caption") if found[way]},
        found["copied"],
        found["unreadable"],
        fingerprint,
    )


def claim_mining(out_uri: str, index: ShardIndex, fingerprint: str, config: MiningConfig) -> None:
    """Write down what is mined at `out_uri`. Raises ValueError where that was something else."""
    file = storage.join(out_uri, MINED, "config.json")
    stamp = {"data": index.fingerprint, "model": fingerprint, **asdict(config)}
    if storage.exists(file):
        before = storage.read_json(file)
        if changed := [
            f"{name} was {before.get(name)}, is {stamp[name]}" for name in stamp if before.get(name) != stamp[name]
        ]:
            raise ValueError(f"{out_uri} holds what was mined otherwise ({'; '.join(changed)}); give another --out")
    storage.write_json(file, stamp)


def mining_items(index: ShardIndex, short_below: int) -> Corpus:
    """The images and the short captions of a scanned data set, each caption with the id that embedding gives it."""
    total = index.num_samples
    pieces = [(first, min(ROWS_PER_READ, total - first)) for first in range(0, total, ROWS_PER_READ)]
    read = partial(_items, index, short_below)
    per_sample = len(next(read(*pieces[0]))) / pieces[0][1]
    return Corpus(index.data_uri, item_dataset(pieces, read, ITEM), round(total * per_sample))


def _items(index: ShardIndex, short_below: int, first: int, count: int) -> Iterator[list[dict[str, Any]]]:
    yield mining_rows(index, short_below, first, count)


def mining_rows(index: ShardIndex, short_below: int, first: int, count: int) -> list[dict[str, Any]]:
    """The items of some samples: each image, with its first short caption, and each short caption."""
    items: list[dict[str, Any]] = []
    for ref in index.samples(first, count):
        if ref.pair is not None:
            raise ValueError(f"{ref.id} has a query or a positive of its own: negatives are mined for images alone")
        place = {name: getattr(ref, name) for name in ("id", "shard", "offset", "length", "crc32")}
        short = short_captions(ref, short_below)
        items.append({**place, "kind": "image", "caption": next(iter(short.values()), None), "image": None})
        items += [{**place, "id": f"{ref.id}#{i}", "kind": "text", "text": text} for i, text in short.items()]
    return items


def short_captions(ref: SampleRef, short_below: int) -> dict[int, str]:
    """The captions of a sample that are contrasted, by their numbers."""
    pairs = zip(ref.captions, ref.caption_tokens, strict=True)
    return {i: text for i, (text, tokens) in enumerate(pairs) if tokens < short_below}


def index_once(table: str, uri: str, kind: Literal["image", "text"]) -> None:
    """Index the rows of one kind, unless that has been done."""
    done = storage.join(uri, "_mined.json")
    if not storage.exists(done):
        summary = build_index(table, uri, kind=kind, filter_columns=["shard"], replace=True)
        storage.write_json(done, {"version": summary.version})


def equal_images(table: str, index: ShardIndex) -> EqualImages:
    """Which samples have the same image as another, by the digests in the table."""
    files = [storage.join(table, file) for file in open_table(table).files]
    rows = pa.concat_tables(read_each(files, ["id", "kind", "content"]))
    rows = rows.filter(pa.compute.equal(rows["kind"], "image"))
    counts = rows.group_by("content").aggregate([("id", "count")])
    repeated = counts.filter(pa.compute.greater(counts["id_count"], 1))["content"]
    shared = rows.filter(pa.compute.is_in(rows["content"], repeated.combine_chunks()))
    image_of = dict(zip(shared["id"].to_pylist(), shared["content"].to_pylist(), strict=True))
    captions: dict[bytes, set[str]] = {}
    for shard in sorted({name.partition("#")[0] for name in image_of}):
        numbers = index.numbers_of(shard)
        for name in image_of.keys() & numbers.keys():
            [ref] = index.samples(numbers[name], 1)
            captions.setdefault(image_of[name], set()).update(ref.captions)
    return EqualImages(image_of, {image: frozenset(texts) for image, texts in captions.items()})


@dataclass(frozen=True)
class ShardMiner:
    """A Ray task: the number of a shard -> its copy with negatives, unless that is there; and the counts."""

    index: ShardIndex
    out_uri: str
    equal: EqualImages
    config: MiningConfig

    def __call__(self, number: int) -> dict[str, int]:
        shard = self.index.shards[number]
        copy, listing = storage.join(self.out_uri, shard), negatives_uri(self.out_uri, shard)
        first = self.index.ends[number - 1] if number else 0
        refs = self.index.samples(first, self.index.ends[number] - first)
        copied = unreadable = 0
        if storage.exists(listing):
            rows = next(read_each([listing]))
        else:
            negatives = self.negatives_of(shard, refs)
            keys = {ref.id.partition("#")[2]: {"negatives": [n.text for n in negatives[ref.id]]} for ref in refs}
            unreadable = copy_shard(storage.join(self.index.data_uri, shard), copy, keys)
            rows = negative_rows(negatives)
            write_listing(listing, rows)
            copied = 1
        return {
            "samples": len(refs),
            "negatives": len(rows),
            "with_negatives": len(rows["id"].unique()),
            "copied": copied,
            "unreadable": unreadable,
            **Counter(rows["found_by"].to_pylist()),
        }

    def negatives_of(self, shard: str, refs: Sequence[SampleRef]) -> dict[str, list[MinedNegative]]:
        """The negatives of each sample of a shard."""
        texts, images = (opened_for_mining(storage.join(self.out_uri, MINED, kind)) for kind in ("texts", "images"))
        find = NegativeFinder(texts, images, self.equal, self.config)
        image_of, caption_of = (vectors_of_shard(store, shard) for store in (images, texts))
        found: dict[str, list[MinedNegative]] = {}
        for ref in refs:
            short = short_captions(ref, self.config.short_below)
            known = [i for i in short if f"{ref.id}#{i}" in caption_of]  # what could not be embedded is quarantined
            found[ref.id] = []
            if known and ref.id in image_of:
                vectors_CD = np.stack([caption_of[f"{ref.id}#{i}"] for i in known])
                found[ref.id] = find(MiningQuery(ref.id, image_of[ref.id], [short[i] for i in known], vectors_CD))
        return found


def vectors_of_shard(store: VectorIndex, shard: str) -> dict[str, np.ndarray]:
    """The unit vectors of the rows of an index that are of one shard, by id."""
    quoted = shard.replace("'", "''")
    rows = store.dataset.to_table(columns=["id", "embedding"], filter=f"shard = '{quoted}'")
    matrix_ND = embedding_matrix(rows)
    matrix_ND = matrix_ND / np.linalg.norm(matrix_ND, axis=1, keepdims=True)
    return dict(zip(rows["id"].to_pylist(), matrix_ND, strict=True))


@lru_cache(maxsize=2)
def opened_for_mining(uri: str) -> VectorIndex:
    """An index in memory, where it fits: once a process."""
    index = open_index(uri)
    index.warm()
    return index


def negative_rows(negatives: Mapping[str, Sequence[MinedNegative]]) -> pa.Table:
    """The negatives of samples as rows of NEGATIVE_ROWS."""
    rows = [
        {
            "id": sample,
            "caption": each.caption,
            "similarity": each.positive,
            "negative": each.text,
            "negative_similarity": each.similarity,
            "negative_id": each.owner,
            "found_by": each.found_by,
        }
        for sample, found in negatives.items()
        for each in found
    ]
    return pa.Table.from_pylist(rows, NEGATIVE_ROWS)


def negatives_uri(out_uri: str, shard: str) -> str:
    """The list of the negatives of a shard; written after the shard."""
    return storage.join(out_uri, MINED, "shards", f"{shard}.parquet")


def write_listing(uri: str, rows: pa.Table) -> None:
    """Write a shard's negatives."""
    import pyarrow.parquet as pq

    body = pa.BufferOutputStream()
    pq.write_table(rows, body)
    storage.write_bytes_atomically(uri, body.getvalue().to_pybytes())
