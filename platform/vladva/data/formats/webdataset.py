"""WebDataset tars. They are rewritten only to join captions: then their scan says what is in them, and where."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow.parquet as pq

from vladva.core import storage
from vladva.data.source import Entry, FileSet, LeftOut, Rejected, Source

TITLE = "tar shards as img2dataset writes them: KEY.jpg with KEY.txt or KEY.json"
PRIORITY = 0
OPTIONS: tuple[str, ...] = ()
SAMPLES_AT_ONCE = 1000


def match(files: FileSet) -> list[str]:
    """Tars; those that img2dataset lists in Parquet files beside them are not another source."""
    for name in files.with_suffix(".tar.gz", ".tgz"):
        raise ValueError(_compressed(name))
    tars = files.with_suffix(".tar")
    if tars and files.head(tars[0], 2) == b"\x1f\x8b":  # of the others the scan tells
        raise ValueError(_compressed(tars[0]))
    return tars


def split(source: Source) -> Iterator[Source]:
    """The whole: shards are read by their index elsewhere."""
    yield source


def entries(source: Source) -> Iterator[Entry | Rejected | LeftOut]:
    """The samples that a scan finds, and its quarantine table. Of their other members nothing is taken along."""
    from vladva.data.scan import scan
    from vladva.data.shard_index import ShardIndex

    index_uri = storage.join(source.work_uri, "source")
    scan(source.uri, no_tokens, index_uri, max_bad_fraction=1.0)
    for row in _quarantined(storage.join(index_uri, "quarantine.parquet")):
        yield Rejected(row["id"], row["id"], row["reason"], row["detail"])
    index = ShardIndex.open(source.uri, index_uri)
    for first in range(0, index.num_samples, SAMPLES_AT_ONCE):
        for ref in index.samples(first, min(SAMPLES_AT_ONCE, index.num_samples - first)):
            if ref.width == 0:
                yield LeftOut("text alone")
            elif ref.pair is not None:
                detail = "captions are joined to images alone, and this sample has a query or a positive of its own"
                yield Rejected(ref.id, ref.id, "not an image with captions", detail)
            else:
                yield Entry(
                    id=ref.id,
                    source_location=ref.id,
                    file=ref.shard,
                    captions=ref.captions,
                    offset=ref.offset,
                    length=ref.length,
                    hard_negatives=ref.negatives,
                )


def _quarantined(uri: str) -> Iterator[dict[str, str]]:
    """The rows of a Parquet file, in little memory."""
    for batch in pq.ParquetFile(storage.RangedFile(uri)).iter_batches(SAMPLES_AT_ONCE):
        yield from batch.to_pylist()


def no_tokens(texts: list[str]) -> list[int]:
    """Stands in for a tokenizer: the captions are counted when the new shards are scanned."""
    return [0] * len(texts)


def _compressed(name: str) -> str:
    fix = f"unpack it with `gunzip {name}`" + (" and give it the ending .tar" if name.endswith(".tgz") else "")
    return f"{name} is compressed with gzip, and samples inside it cannot be read by position: {fix}"
