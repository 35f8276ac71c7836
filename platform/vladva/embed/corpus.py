"""Corpora: shards, tables, folders of images or a text file -> items to embed.

Every corpus gives a Ray data set of the same columns: a row is an image or a text, with where its image is.

    id, kind        "<file relative to the corpus>#<key>" and "image" or "text"; an image's i-th caption: "<id>#<i>"
    text            the text; null for images
    caption         the first caption of an image; null for texts
    shard           file that holds the image, relative to the corpus; null where there is none
    offset, length  the image's bytes in that file; in Parquet: row, and 0; of a whole file of unknown size: 0, and -1
    crc32           checksum of the bytes, where the scan of the shards has left one
    image           bytes, where they came along; otherwise `read_images` fetches them, for those items that need it
    cleaned         captions of the sample that lost more than space around them, on the first of its texts

What is named in a source and cannot be delivered is an item too, of the kind "rejected": its `text` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.ray_tasks import collect, submit
from vladva.core.text import UTF_16, clean_text, lost_more_than_space, text_lines
from vladva.data.columns import IMAGE_COLUMNS, choose_image_column
from vladva.data.image_refs import ImageRef, fetch_images
from vladva.data.source import SourceOptions, open_source
from vladva.embed.item_source import item_dataset
from vladva.embed.source_items import REJECTED, ROWS_PER_READ, count_items, remarks, sample_items, source_items

if TYPE_CHECKING:
    import ray.data

    from vladva.data.shard_index import ShardIndex
    from vladva.data.sidecar import CountTokens

TEXT_BLOCK = 1 << 20  # bytes of a text file that are read together
PLACE = ("shard", "offset", "length", "crc32")

ITEM = pa.schema(
    [
        *[(name, pa.string()) for name in ("id", "kind", "text", "caption", PLACE[0])],
        *[(name, pa.int64()) for name in PLACE[1:]],
        ("image", pa.binary()),
        ("cleaned", pa.int64()),
    ]
)


@dataclass(frozen=True)
class Corpus:
    """Items, about how many they are, how to read images left behind, and what to tell the user."""

    uri: str
    items: ray.data.Dataset
    num_items: int  # of big Parquet files and folders an estimate, from the first rows
    remarks: list[str] = field(default_factory=list)  # what of the source is not embedded, and by which rule

    @property
    def read_images(self) -> Callable[[pa.Table], list[bytes]]:
        """Gives the bytes of items whose `image` is null, wherever it is called."""
        return partial(_read_images, self.uri)


def open_corpus(
    uri: str,
    kinds: Sequence[str] = ("image", "text"),
    options: SourceOptions | None = None,
    *,
    count_tokens: CountTokens | None = None,
) -> Corpus:
    """The corpus at `uri`. Shards that have not been scanned are, which takes a `count_tokens` and a Ray cluster.

    Anything that `data/formats/` reads is a corpus, and a text file (.txt) with a text a line. Raises ValueError where
    there is nothing to embed, FileNotFoundError.
    """
    if unknown := set(kinds) - {"image", "text"}:
        raise ValueError(f"kinds: {', '.join(sorted(unknown))} is unknown; use image, text or both")
    uri = storage.absolute(uri)
    if uri.endswith(".txt"):
        if not storage.exists(uri):
            raise FileNotFoundError(f"{uri}: no such file or folder")
        return _text_file(uri, kinds)
    source = open_source(uri, options or SourceOptions(), needs_images=set(kinds) == {"image"})
    told = remarks(source, kinds)
    if source.format == "webdataset":
        return _shards(source.uri, set(source.files), kinds, count_tokens, told)
    pieces = [(part,) for part in source.split()]
    items = item_dataset(pieces, partial(source_items, tuple(kinds)), ITEM)
    return Corpus(source.uri, items, count_items(source, kinds), told)


def _read_images(uri: str, items: pa.Table) -> list[bytes]:
    return read_item_images(uri, items.select(list(PLACE)).to_pylist())


def read_item_images(uri: str, places: list[dict[str, Any]]) -> list[bytes]:
    """The images of a corpus at the given places (shard, offset, length, crc32).

    Raises OSError where one cannot be read, ValueError where another has taken its place.
    """
    images: list[bytes] = []
    for place, data in zip(
        places, fetch_images([_to_ref(uri, place) for place in places], folder_uri=uri), strict=True
    ):
        if isinstance(data, InvalidSampleError):
            told = f"{place['shard']}: {data.reason}: {data.detail}"
            raise ValueError(told) if data.reason == "changed file" else OSError(told)
        images.append(data)
    return images


def _to_ref(uri: str, place: dict[str, Any]) -> ImageRef:
    shard = place["shard"]
    file, _, column = shard.partition(".parquet#")
    if column or shard.endswith(".parquet"):
        table = storage.join(uri, f"{file}.parquet" if column else shard)
        return ImageRef(shard, shard, table, place["offset"], column=column or _image_column(table))
    return ImageRef(shard, shard, storage.resolve(uri, shard), place["offset"], place["length"], crc32=place["crc32"])


def _image_column(file: str) -> str:
    import pyarrow.parquet as pq

    names = pq.ParquetFile(storage.RangedFile(file)).schema_arrow.names
    return choose_image_column(IMAGE_COLUMNS, "", names, file)


# --- corpora that are no source of data/formats -----------------------------------------------------------------------


def _shards(
    uri: str, shards: set[str], kinds: Sequence[str], count_tokens: CountTokens | None, told: list[str]
) -> Corpus:
    """WebDataset shards, by their index: only images are read from the shards themselves."""
    from vladva.data.scan import scan
    from vladva.data.shard_index import ShardIndex, quarantine_uri, read_manifest

    index_is_there = storage.exists(storage.join(uri, "_index", "manifest.json"))
    if count_tokens and not (index_is_there and set(ShardIndex.open(uri).shards) == shards):
        scan(uri, count_tokens)
    index = ShardIndex.open(uri)
    total = index.num_samples
    pieces = [(first, min(ROWS_PER_READ, total - first)) for first in range(0, total, ROWS_PER_READ)]
    read = partial(_shard_items, index, tuple(kinds))
    per_sample = len(next(read(*pieces[0]))) / pieces[0][1]
    manifest = read_manifest(index.index_uri) or {}
    bad = [f"not embedded: {count:,} x {reason}" for reason, count in manifest.get("reasons", {}).items()]
    if bad:
        bad.append(f"the samples that are not embedded: {quarantine_uri(index.index_uri)}")
    notes = [f"in the shards: {count:,} x {note}" for note, count in manifest.get("notes", {}).items()]
    return Corpus(uri, item_dataset(pieces, read, ITEM), round(total * per_sample), [*told, *bad, *notes])


def _shard_items(index: ShardIndex, kinds: Sequence[str], first: int, count: int) -> Iterator[list[dict[str, Any]]]:
    items = []
    for ref in index.samples(first, count):
        place = {name: getattr(ref, name) for name in ("id", "shard", "offset", "length", "crc32")}
        items += sample_items(place, ref.captions, kinds)
    yield items


def _text_file(uri: str, kinds: Sequence[str]) -> Corpus:
    folder, _, name = uri.rpartition("/")
    if "text" not in kinds:
        raise ValueError(f"{name} holds texts, and kinds asks for {', '.join(kinds)} only")
    size = storage.file_info(uri).size
    step = size if _block(uri, 0, min(2, size)).startswith(UTF_16) else TEXT_BLOCK
    blocks = [(first, min(step, size - first)) for first in range(0, size, max(1, step))]
    at_once = max(64, -(-len(blocks) // 512))
    tasks = [submit(_count_lines, uri, blocks[i : i + at_once]) for i in range(0, len(blocks), at_once)]
    counted = [counts for task in collect(tasks) for counts in task]
    pieces, number = [], 0
    for (first, length), (lines, _) in zip(blocks, counted, strict=True):
        pieces.append((first, length, number))
        number += lines
    return Corpus(folder, item_dataset(pieces, partial(_some_items, uri), ITEM), sum(texts for _, texts in counted))


def _count_lines(uri: str, blocks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """How many lines begin in each block of a file, and how many of them are items."""
    counts = []
    for first, length in blocks:
        lines = _lines(uri, first, length)
        counts.append((len(lines), sum(_item(line) is not None for line in lines)))
    return counts


def _some_items(uri: str, first: int, length: int, number: int) -> Iterator[list[dict[str, Any]]]:
    items = text_items(uri, first, length, number)
    for start in range(0, len(items), 16 * ROWS_PER_READ):
        yield items[start : start + 16 * ROWS_PER_READ]


def text_items(uri: str, first: int = 0, length: int | None = None, number: int = 0) -> list[dict[str, Any]]:
    """The items of the lines that begin in a block of a file (by default all of it), before which `number` lines are.

    Empty lines are left out, and keep their number; those that are no UTF-8 are rejected.
    """
    name = uri.rpartition("/")[2]
    length = storage.file_info(uri).size if length is None else length
    items: list[dict[str, Any]] = []
    for place, line in enumerate(_lines(uri, first, length), start=number):
        if found := _item(line):
            kind, text = found
            cleaned = {"cleaned": 1} if isinstance(line, str) and lost_more_than_space(line, text) else {}
            items.append({"id": f"{name}#{place}", "kind": kind, "text": text, **cleaned})
    return items


def _item(line: str | InvalidSampleError) -> tuple[str, str] | None:
    """Kind and text of a line's item; None for an empty line."""
    if isinstance(line, InvalidSampleError):
        return REJECTED, str(line)
    text = clean_text(line)
    return ("text", text) if text else None


def _lines(uri: str, first: int, length: int) -> list[str | InvalidSampleError]:
    """The lines that begin in a block of a file."""
    data = _block(uri, first, length)
    lines = text_lines(data)
    return lines[:-1] if lines and not lines[-1] else lines  # what follows the last line's end is no line


def _block(uri: str, first: int, length: int) -> bytes:
    """A block of a file, from the first line feed before which nothing of it is, to the end of its last line."""
    file = storage.open_stream(uri, TEXT_BLOCK)
    file.seek(max(0, first - 1))
    if first > 0:
        file.readline()  # ends a line that began before the block, or is the end of one
    begin = file.tell()
    data = file.read(max(0, first + length - begin))
    return data if not data or data.endswith(b"\n") else data + file.readline()
