"""Corpora: shards, tables, folders of images or a text file -> items to embed.

Every corpus gives a Ray data set of the same columns: a row is an image or a text, with where its image is.

    id, kind        "<file relative to the corpus>#<key>" and "image" or "text"; an image's i-th caption: "<id>#<i>"
    text            the text; null for images
    caption         the first caption of an image; null for texts
    shard           file that holds the image, relative to the corpus; null where there is none
    offset, length  the image's bytes in that file; in Parquet: row, and 0; of a whole file of unknown size: 0, and -1
    crc32           checksum of the bytes, where the scan of the shards has left one
    image           bytes, where they came along; otherwise `read_images` fetches them, for those items that need it

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
from vladva.core.text import clean_text, text_lines
from vladva.data.columns import IMAGE_COLUMNS, choose_image_column
from vladva.data.image_refs import ImageRef, fetch_images
from vladva.data.source import SourceOptions, open_source
from vladva.embed.source_items import REJECTED, ROWS_PER_READ, count_items, remarks, sample_items, source_items

if TYPE_CHECKING:
    import ray.data

    from vladva.data.shard_index import ShardIndex
    from vladva.data.sidecar import CountTokens

PLACE = ("shard", "offset", "length", "crc32")

ITEM = pa.schema(
    [
        *[(name, pa.string()) for name in ("id", "kind", "text", "caption", PLACE[0])],
        *[(name, pa.int64()) for name in PLACE[1:]],
        ("image", pa.binary()),
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
    read = partial(source_items, tuple(kinds))
    return Corpus(source.uri, _items(pieces, read), count_items(source, kinds), told)


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
    from vladva.data.shard_index import ShardIndex

    index_is_there = storage.exists(storage.join(uri, "_index", "manifest.json"))
    if count_tokens and not (index_is_there and set(ShardIndex.open(uri).shards) == shards):
        scan(uri, count_tokens)
    index = ShardIndex.open(uri)
    total = index.num_samples
    pieces = [(first, min(ROWS_PER_READ, total - first)) for first in range(0, total, ROWS_PER_READ)]
    read = partial(_shard_items, index, tuple(kinds))
    per_sample = len(next(read(*pieces[0]))) / pieces[0][1]
    return Corpus(uri, _items(pieces, read), round(total * per_sample), told)


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
    rows = text_items(uri)
    pieces = [([rows[i : i + 16 * ROWS_PER_READ]],) for i in range(0, len(rows), 16 * ROWS_PER_READ)]
    return Corpus(folder, _items(pieces, iter), len(rows))


def text_items(uri: str) -> list[dict[str, str]]:
    """One text a line; empty lines are left out, and keep their number; those that are no UTF-8 are rejected."""
    name = uri.rpartition("/")[2]
    rows = []
    for number, line in enumerate(text_lines(storage.read_bytes(uri))):
        kind, text = (REJECTED, str(line)) if isinstance(line, InvalidSampleError) else ("text", clean_text(line))
        if text:
            rows.append({"id": f"{name}#{number}", "kind": kind, "text": text})
    return rows


# --- Ray --------------------------------------------------------------------------------------------------------------


def _items(pieces: list[Any], read: Callable[..., Iterator[list[dict[str, Any]]]]) -> ray.data.Dataset:
    """The items of each piece, read where they are needed."""
    import ray.data

    if not pieces:
        return ray.data.from_arrow(ITEM.empty_table())
    blocks = ray.data.range(len(pieces), override_num_blocks=len(pieces))
    return blocks.map_batches(
        _read_piece,  # type: ignore[arg-type]  # Ray's signature forgets keyword arguments
        batch_size=1,
        fn_kwargs={"pieces": ray.put(pieces), "read": read},
        batch_format="pyarrow",
    )


def _read_piece(
    number: pa.Table, *, pieces: Any, read: Callable[..., Iterator[list[dict[str, Any]]]]
) -> Iterator[pa.Table]:
    import ray

    for items in read(*ray.get(pieces)[number["id"][0].as_py()]):
        yield pa.Table.from_pylist(items, ITEM)
