"""Negatives page: fifty samples with the negatives that were mined for them, as a self-contained HTML page."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from vladva.core import storage
from vladva.core.sampling import spread
from vladva.data.shard_index import ShardIndex, read_samples
from vladva.embed.table import read_each
from vladva.mine.negatives import MINED, MiningSummary, negatives_uri
from vladva.report.html import data_uri, page_environment

SAMPLES_SHOWN = 50


@dataclass(frozen=True)
class ShownNegative:
    """A negative with its similarity, and the sample's own caption that it is compared with."""

    text: str
    similarity: float
    caption: str
    positive: float
    found_by: str


@dataclass(frozen=True)
class MinedSample:
    """An image with its negatives."""

    id: str
    image: str
    negatives: list[ShownNegative]


def write_negatives_page(uri: str, index: ShardIndex, summary: MiningSummary) -> str:
    """Write the page to `uri`, or beside the list of negatives; returns where it is."""
    uri = uri or storage.join(summary.uri, MINED, "negatives.html")
    template = page_environment().get_template("negatives.html.j2")
    page = template.render(summary=summary, samples=choose_samples(index, summary.uri))
    storage.write_bytes_atomically(uri, page.encode())
    return uri


def choose_samples(index: ShardIndex, out_uri: str) -> list[MinedSample]:
    """Samples at even distances among those that have negatives, from as many shards as there can be."""
    shards = [index.shards[i] for i in spread(len(index.shards), SAMPLES_SHOWN)]
    per_shard = -(-SAMPLES_SHOWN // len(shards))
    shown: list[MinedSample] = []
    for shard, rows in zip(shards, read_each([negatives_uri(out_uri, shard) for shard in shards]), strict=True):
        ids = rows["id"].unique().to_pylist()
        chosen = [ids[i] for i in spread(len(ids), per_shard)] if ids else []
        shown += [_sample(index, shard, name, rows) for name in chosen]
    return shown[:SAMPLES_SHOWN]


def _sample(index: ShardIndex, shard: str, name: str, rows: pa.Table) -> MinedSample:
    [data] = read_samples(index.data_uri, index.samples(index.numbers_of(shard)[name], 1))
    found = rows.filter(pa.compute.equal(rows["id"], name)).to_pylist()
    negatives = [
        ShownNegative(row["negative"], row["negative_similarity"], row["caption"], row["similarity"], row["found_by"])
        for row in found
    ]
    return MinedSample(name, data_uri(data), negatives)
