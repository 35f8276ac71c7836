"""The sidecar of a shard: one Parquet file with a row per good sample, made by reading the tar once.

The facts about the shard (what file it was made from, with which settings, what is quarantined) are in the metadata of
the same file: a sidecar that exists is complete, and says whether it still holds.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.hashing import short_hash
from vladva.core.images import MAX_PIXELS
from vladva.core.storage import RangedFile
from vladva.data.image_refs import ImageRef
from vladva.data.pair_items import PairItems
from vladva.data.tar_reader import Quarantined, read_tar

CountTokens = Callable[[list[str]], list[int]]

ROWS_PER_GROUP = 512  # of a sidecar; what a task reads to find a run
SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "key": pa.string(),
        "shard": pa.string(),
        "offset": pa.int64(),
        "length": pa.int64(),
        "captions": pa.list_(pa.string()),
        "caption_tokens": pa.list_(pa.int32()),
        "negatives": pa.list_(pa.string()),
        "width": pa.int32(),
        "height": pa.int32(),
        "crc32": pa.int64(),
        "pair": pa.struct(
            {
                **dict.fromkeys(
                    ("query_text", "query_instruction", "positive_text", "positive_instruction"), pa.string()
                ),
                "positive": pa.struct(
                    {"offset": pa.int64(), "length": pa.int64(), "width": pa.int32(), "height": pa.int32()}
                    | {"crc32": pa.int64()}
                ),
            }
        ),
    }
)


@dataclass(frozen=True)
class SampleRef:
    """Where one sample's image is (bytes in a shard), and what is known of it.

    A sample of text alone has its JSON there, and 0 x 0 pixels. `negatives` are hard-negative captions. `pair` is None
    where the pair is an image (or text) and a caption.
    """

    id: str
    shard: str
    offset: int
    length: int
    captions: list[str]
    caption_tokens: list[int]
    negatives: list[str]
    width: int
    height: int
    crc32: int
    pair: PairItems | None = None

    def positive(self, data_uri: str) -> ImageRef | None:
        """Where the positive's image is; None where the positive is a caption."""
        return None if self.pair is None else self.pair.positive_ref(self.id, storage.join(data_uri, self.shard))

    def image(self, data_uri: str) -> ImageRef:
        """Where the image (or the JSON that stands for it) is, for `read_images`."""
        return ImageRef(self.id, self.id, storage.join(data_uri, self.shard), self.offset, self.length, "", self.crc32)


class ScanSettings(TypedDict):
    """What a sidecar depends on besides its shard."""

    version: int  # of what a scan finds in the same shard
    verify: bool
    max_pixels: int
    probe: list[int]  # tokens of some texts, which tell one tokenizer from another


class ListedShard(TypedDict):
    """A shard as its folder lists it: path below the data set, bytes, time of the last change in ns."""

    shard: str
    size: int
    changed: int


class ShardFacts(ListedShard):
    """What is known of a scanned shard."""

    settings: ScanSettings
    num_samples: int
    quarantined: list[tuple[str, str, str]]  # fields of Quarantined
    notes: dict[str, int]  # what was passed over, or done to samples: how often
    digest: str  # of what training uses of the samples
    scanned: bool  # now, and not by an earlier scan


@dataclass(frozen=True)
class Scanner:
    """Ray Data stage: a shard -> its sidecar, unless there is one already; and the facts about it."""

    data_uri: str
    index_uri: str
    count_tokens: CountTokens
    settings: ScanSettings

    def __call__(self, row: ListedShard) -> dict[str, str]:
        sidecar = sidecar_uri(self.index_uri, row["shard"])
        stamp = {"settings": self.settings, "shard": row["shard"], "size": row["size"], "changed": row["changed"]}
        if storage.exists(sidecar):
            known = json.loads(pq.ParquetFile(RangedFile(sidecar)).schema_arrow.metadata[b"vladva"])
            if stamp.items() <= known.items():
                return {"facts": json.dumps(known | {"scanned": False})}
        table, quarantined, notes = scan_shard(
            self.data_uri,
            row["shard"],
            self.count_tokens,
            verify=self.settings["verify"],
            max_pixels=self.settings["max_pixels"],
        )
        used = ["key", "offset", "length", "captions", "negatives", "crc32"]
        used += ["pair"] if table["pair"].null_count < len(table) else []  # else as it was before there were pairs
        content = table.select(used).to_pylist()
        found = {"num_samples": len(table), "quarantined": quarantined, "notes": notes}
        facts = {**stamp, **found, "digest": short_hash(content)}
        storage.write_bytes_atomically(sidecar, parquet_bytes(table, facts))
        return {"facts": json.dumps(facts | {"scanned": True})}


class ScannedShard(NamedTuple):
    """The index of a shard (columns as in SCHEMA, ordered by offset), what of it is not used, and notes with counts."""

    table: pa.Table
    quarantined: list[Quarantined]
    notes: Counter[str]


def scan_shard(
    data_uri: str, shard: str, count_tokens: CountTokens, *, verify: bool = True, max_pixels: int = MAX_PIXELS
) -> ScannedShard:
    """Read one shard."""
    with storage.open_stream(storage.join(data_uri, shard)) as file:
        samples, quarantined, notes = read_tar(file, shard, verify=verify, max_pixels=max_pixels)
    counts = iter(count_tokens([caption for sample in samples for caption in sample.captions]))
    rows = [
        {
            "id": f"{shard}#{sample.key}",
            "key": sample.key,
            "shard": shard,
            "captions": sample.captions,
            "caption_tokens": [next(counts) for _ in sample.captions],
            "negatives": sample.negatives,
            **(sample.image._asdict() if sample.image else {}),
            "pair": sample.pair and sample.pair.to_row(),
        }
        for sample in samples
    ]
    return ScannedShard(pa.Table.from_pylist(rows, SCHEMA), quarantined, notes)


def read_refs(sidecar: str, version: str, first: int, count: int) -> list[SampleRef]:
    """Rows first .. first + count - 1 of a sidecar, fewer where it ends. `version` must change when the file does."""
    refs: list[SampleRef] = []
    groups = range(first // ROWS_PER_GROUP, (first + count - 1) // ROWS_PER_GROUP + 1)
    for group in range(groups.start, min(groups.stop, _footer(sidecar, version)[1].num_row_groups)):
        start = max(first - group * ROWS_PER_GROUP, 0)
        rows = _row_group(sidecar, version, group).slice(start, count - len(refs)).to_pylist()
        refs += [SampleRef(**{**row, "pair": PairItems.from_row(row.get("pair"))}) for row in rows]
    return refs


def read_ids(sidecar: str) -> list[str]:
    """The ids of all rows of a sidecar."""
    return pq.read_table(pa.BufferReader(storage.read_bytes(sidecar)), columns=["id"]).column("id").to_pylist()


@lru_cache(maxsize=128)
def _row_group(sidecar: str, version: str, group: int) -> pa.Table:
    size, footer = _footer(sidecar, version)
    file = pq.ParquetFile(RangedFile(sidecar, size), metadata=footer, pre_buffer=True)
    return file.read_row_group(group, columns=[name for name in SCHEMA.names if name != "key"])


@lru_cache(maxsize=1024)
def _footer(sidecar: str, version: str) -> tuple[int, pq.FileMetaData]:
    """The file's size, so that it need not be asked for again, and its metadata."""
    file = RangedFile(sidecar)
    return file.size, pq.ParquetFile(file).metadata


def sidecar_uri(index_uri: str, shard: str) -> str:
    """The sidecar of the shard at this path below the data set."""
    return storage.join(index_uri, f"{shard}.parquet")


def parquet_bytes(table: pa.Table, facts: dict[str, Any] | None = None) -> bytes:
    """`table` as a Parquet file, with `facts` as JSON under the key "vladva" of its metadata."""
    body = io.BytesIO()
    metadata = {b"vladva": json.dumps(facts).encode()} if facts else {}
    pq.write_table(table.replace_schema_metadata(metadata), body, row_group_size=ROWS_PER_GROUP)
    return body.getvalue()
