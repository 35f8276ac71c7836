"""Corpora: shards, Parquet files, a folder of images or a text file -> items to embed.

Every corpus gives a Ray data set of the same columns: a row is an image or a text, with where its image lies.

    id, kind        "<file relative to the corpus>#<key>" and "image" or "text"; an image's i-th caption: "<id>#<i>"
    text            the text; null for images
    caption         the first caption of an image; null for texts
    shard           file that holds the image, relative to the corpus; null where there is none
    offset, length  the image's bytes in that file (in Parquet: row, and 0)
    crc32           checksum of the bytes, where the scan of the shards has left one
    image           bytes, where they came along; otherwise `read_images` fetches them, for those items that need it
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.images import IMAGE
from vladva.core.storage import ByteRange
from vladva.data.image_refs import read_cells

if TYPE_CHECKING:
    import ray.data

    from vladva.data.shard_index import ShardIndex
    from vladva.data.sidecar import CountTokens

KINDS = ("image", "text")
IMAGE_COLUMNS = ("image", "jpg", "png", "img")
CAPTION_COLUMNS = ("captions", "caption", "text", "txt")
ID_COLUMNS = ("id", "key", "__key__")
ROWS_PER_READ = 256
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
    """Items, how many they are (from captions per image in the first file), and how to read images left behind."""

    uri: str
    items: ray.data.Dataset
    num_items: int

    @property
    def read_images(self) -> Callable[[pa.Table], list[bytes]]:
        """Gives the bytes of items whose `image` is null, wherever it is called."""
        return partial(_read_images, self.uri)


def open_corpus(uri: str, kinds: Sequence[str] = KINDS, *, count_tokens: CountTokens | None = None) -> Corpus:
    """The corpus at `uri`. Shards that have not been scanned are, which takes a `count_tokens` and a Ray cluster.

    Raises ValueError where it holds nothing to embed.
    """
    if unknown := set(kinds) - set(KINDS):
        raise ValueError(f"kinds: {', '.join(sorted(unknown))} is unknown; use image, text or both")
    uri = storage.absolute(uri)
    if not storage.exists(uri):
        raise FileNotFoundError(f"{uri}: no such file or folder")
    if uri.endswith((".txt", ".parquet")):
        folder, _, name = uri.rpartition("/")
        return (_text_file if name.endswith(".txt") else _parquet)(folder, {name: 0}, kinds)
    infos = {info.uri.removeprefix(uri + "/"): info.size for info in storage.list_infos(uri)}
    files = {file: size for file, size in infos.items() if not re.search(r"(^|/)[._]", file)}
    if shards := {file for file in files if file.endswith(".tar")}:
        return _shards(uri, shards, kinds, count_tokens)
    if parquet := {file: size for file, size in files.items() if file.endswith(".parquet")}:
        return _parquet(uri, parquet, kinds)
    if any(IMAGE.search(file) for file in files):
        return _folder(uri, files, kinds)
    raise ValueError(f"{uri} holds no .tar shards, no .parquet files and no images; a text file must end in .txt")


def _read_images(uri: str, items: pa.Table) -> list[bytes]:
    return read_item_images(uri, items.select(list(PLACE)).to_pylist())


def read_item_images(uri: str, places: list[dict[str, Any]]) -> list[bytes]:
    """The images of a corpus at the given places (shard, offset, length, crc32).

    Raises OSError where one cannot be read, ValueError where another has taken its place.
    """
    away = [place for place in places if not place["shard"].endswith(".parquet")]
    ranges = [ByteRange(storage.join(uri, place["shard"]), place["offset"], place["length"]) for place in away]
    bodies = storage.read_ranges(ranges)
    for place, body in zip(away, bodies, strict=True):
        if place["crc32"] is not None and zlib.crc32(body) != place["crc32"]:
            raise ValueError(f"{place['shard']} has changed since it was scanned")
    rest = iter(bodies)
    return [
        _parquet_image(uri, place["shard"], place["offset"]) if place["shard"].endswith(".parquet") else next(rest)
        for place in places
    ]


# --- the kinds of corpora --------------------------------------------------------------------------------------------


def _shards(uri: str, shards: set[str], kinds: Sequence[str], count_tokens: CountTokens | None) -> Corpus:
    """WebDataset shards, by their index: only images are read from the shards themselves."""
    from vladva.data.scan import scan
    from vladva.data.shard_index import ShardIndex

    index_is_there = storage.exists(storage.join(uri, "_index", "manifest.json"))
    if count_tokens and not (index_is_there and set(ShardIndex.open(uri).shards) == shards):
        scan(uri, count_tokens)
    index = ShardIndex.open(uri)
    total = index.num_samples
    pieces = [(first, min(ROWS_PER_READ, total - first)) for first in range(0, total, ROWS_PER_READ)]
    per_sample = len(_shard_items(index, kinds, *pieces[0])) / pieces[0][1]
    return Corpus(uri, _items(pieces, partial(_shard_items, index, tuple(kinds))), round(total * per_sample))


def _shard_items(index: ShardIndex, kinds: Sequence[str], first: int, count: int) -> list[dict[str, Any]]:
    items = []
    for ref in index.samples(first, count):
        place = {name: getattr(ref, name) for name in ("id", "shard", "offset", "length", "crc32")}
        items += _sample_items(place, ref.captions, kinds)
    return items


def _folder(uri: str, files: dict[str, int], kinds: Sequence[str]) -> Corpus:
    """A folder of images; KEY.txt beside KEY.jpg holds its captions, one a line."""
    images = [(file, size, _beside(file) in files) for file, size in files.items() if IMAGE.search(file)]
    pieces = [(images[first : first + ROWS_PER_READ],) for first in range(0, len(images), ROWS_PER_READ)]
    per_image = len(_folder_items(uri, kinds, *pieces[0])) / len(pieces[0][0])
    return Corpus(uri, _items(pieces, partial(_folder_items, uri, tuple(kinds))), round(len(images) * per_image))


def _folder_items(uri: str, kinds: Sequence[str], images: list[tuple[str, int, bool]]) -> list[dict[str, Any]]:
    items = []
    for file, size, captioned in images:
        captions = [text for _, text in _lines(uri, _beside(file))] if captioned else []
        items += _sample_items({"id": file, "shard": file, "offset": 0, "length": size}, captions, kinds)
    return items


def _beside(image: str) -> str:
    return re.sub(r"\.\w+$", ".txt", image)


def _parquet(uri: str, files: dict[str, int], kinds: Sequence[str]) -> Corpus:
    """Parquet with images (bytes, or Hugging Face's {bytes, path}) and/or captions, in columns of the usual names."""
    tables = [_open_parquet(storage.join(uri, file)) for file in files]
    image, captions = _columns(next(iter(files)), tables[0].schema_arrow.names)
    pieces = [(file, i) for file, table in zip(files, tables, strict=True) for i in range(table.num_row_groups)]
    per_row = float("image" in kinds and image is not None)
    if "text" in kinds and captions:
        per_row += _captions_per_row(tables[0], captions)
    num_items = round(sum(table.metadata.num_rows for table in tables) * per_row)
    return Corpus(uri, _items(pieces, partial(_parquet_items, uri, tuple(kinds))), num_items)


def _parquet_items(uri: str, kinds: Sequence[str], file: str, group: int) -> list[dict[str, Any]]:
    table = _open_parquet(storage.join(uri, file))
    image, captions = _columns(file, table.schema_arrow.names)
    name = next((name for name in ID_COLUMNS if name in table.schema_arrow.names), None)
    first = sum(table.metadata.row_group(i).num_rows for i in range(group))
    wanted = [column for column in (name, captions, image if "image" in kinds else None) if column]
    items: list[dict[str, Any]] = []
    for number, row in enumerate(table.read_row_group(group, wanted).to_pylist(), start=first):
        sample = {"id": f"{file}#{row[name] if name else number}", "shard": file if image else None}
        sample |= {"offset": number, "length": 0} if image else {}
        texts = _texts(row[captions]) if captions else []
        data = _image_bytes(row[image]) if image and "image" in kinds else None
        items += _sample_items(sample, texts, kinds if image else ["text"], data)
    return items


def _parquet_image(uri: str, file: str, number: int) -> bytes:
    image, _ = _columns(file, _open_parquet(storage.join(uri, file)).schema_arrow.names)
    for data, _ in read_cells(storage.join(uri, file), image, [number]):
        if isinstance(data, InvalidSampleError):
            raise OSError(f"{file}, row {number}: {data.reason} {data.detail}")
        return data or b""
    raise OSError(f"{file} has no row {number}")


def _text_file(uri: str, files: dict[str, int], kinds: Sequence[str]) -> Corpus:
    """One text a line; empty lines are left out, and keep their number."""
    (name,) = files
    if "text" not in kinds:
        raise ValueError(f"{name} holds texts, and kinds asks for {', '.join(kinds)} only")
    rows = [{"id": f"{name}#{number}", "kind": "text", "text": text} for number, text in _lines(uri, name)]
    pieces = [(rows[i : i + 16 * ROWS_PER_READ],) for i in range(0, len(rows), 16 * ROWS_PER_READ)]
    return Corpus(uri, _items(pieces, list), len(rows))


# --- what they share -------------------------------------------------------------------------------------------------


def _items(pieces: list[tuple[Any, ...]], read: Callable[..., list[dict[str, Any]]]) -> ray.data.Dataset:
    """One block of items per piece, read where it is needed."""
    import ray.data

    if not pieces:
        return ray.data.from_arrow(ITEM.empty_table())
    blocks = ray.data.range(len(pieces), override_num_blocks=len(pieces))
    return blocks.map_batches(
        _read_piece, batch_size=1, fn_kwargs={"pieces": ray.put(pieces), "read": read}, batch_format="pyarrow"
    )


def _read_piece(number: pa.Table, *, pieces: Any, read: Callable[..., list[dict[str, Any]]]) -> pa.Table:
    import ray

    return pa.Table.from_pylist(read(*ray.get(pieces)[number["id"][0].as_py()]), ITEM)


def _sample_items(
    place: dict[str, Any], captions: list[str], kinds: Sequence[str], image: bytes | None = None
) -> list[dict[str, Any]]:
    """The items of a sample: its image, and each caption."""
    items = []
    if "image" in kinds:
        items.append({**place, "kind": "image", "caption": captions[0] if captions else None, "image": image})
    if "text" in kinds:
        sample = place["id"]
        items += [{**place, "id": f"{sample}#{i}", "kind": "text", "text": text} for i, text in enumerate(captions)]
    return items


def _columns(file: str, names: Sequence[str]) -> tuple[str | None, str | None]:
    """The columns with images and with captions."""
    image = next((name for name in IMAGE_COLUMNS if name in names), None)
    captions = next((name for name in CAPTION_COLUMNS if name in names), None)
    if not image and not captions:
        known = ", ".join(IMAGE_COLUMNS + CAPTION_COLUMNS)
        raise ValueError(f"{file} has the columns {', '.join(names)}; one of {known} is needed")
    return image, captions


def _captions_per_row(table: Any, column: str) -> float:
    values = table.read([column])[column].to_pylist()
    return sum(len(_texts(value)) for value in values) / max(1, len(values))


def _texts(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or [])


def _image_bytes(value: bytes | dict[str, Any] | None) -> bytes:
    return (value["bytes"] if isinstance(value, dict) else value) or b""


def _lines(uri: str, file: str) -> list[tuple[int, str]]:
    lines = storage.read_bytes(storage.join(uri, file)).decode().splitlines()
    return [(number, line.strip()) for number, line in enumerate(lines) if line.strip()]


def _open_parquet(uri: str) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetFile(storage.RangedFile(uri))
