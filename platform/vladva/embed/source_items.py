"""The entries of a source -> items to embed, each with an id of its own, and remarks on what is not embedded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.images import IMAGE
from vladva.core.text import clean_captions
from vladva.data.caption_files import read_caption_files
from vladva.data.columns import ID_COLUMNS
from vladva.data.image_refs import fetch_images
from vladva.data.source import Entry, LeftOut, Rejected, Source

REJECTED = "rejected"  # the kind of an item that stands for what cannot be delivered
ROWS_PER_READ = 256
WHOLE_FILE = -1  # length of an image whose size is not known
LISTED_BY_NAME = ("folder", "class_folders")  # formats whose entries are cheap to list: no file is opened


def source_items(kinds: Sequence[str], source: Source) -> Iterator[list[dict[str, Any]]]:
    """The items of a part of a source, some at a time. Images in Parquet come along, others are read later."""
    entries = source.entries()
    seen: set[str] = set()
    while found := list(islice(entries, ROWS_PER_READ)):
        items = [
            _rejected(each.source_location, each.reason, each.detail) for each in found if isinstance(each, Rejected)
        ]
        good = [each for each in found if isinstance(each, Entry)]
        held = [entry for entry in good if entry.column and "image" in kinds]
        refs = [entry.image_ref(source.images_uri) for entry in held]
        bodies = fetch_images(refs, folder_uri=source.images_uri)
        images = dict(zip([entry.row_id for entry in held], bodies, strict=True))
        for entry in good:
            items += _entry_items(kinds, source, entry, images.get(entry.row_id), seen)
        yield items


def _rejected(name: str, reason: str, detail: str = "") -> dict[str, Any]:
    return {"id": name, "kind": REJECTED, "text": f"{reason}: {detail}" if detail else reason}


def _entry_items(
    kinds: Sequence[str], source: Source, entry: Entry, image: bytes | InvalidSampleError | None, seen: set[str]
) -> list[dict[str, Any]]:
    """The items of an entry; its image only where the image is not among those `seen`, to which it is added."""
    captions: list[str] = []
    cleaned: Counter[str] = Counter()
    items = []
    if source.format != "class_folders":  # their names tell training which images belong together, nothing more
        try:
            written = [*read_caption_files(source.images_uri, entry), *entry.captions]
            captions = clean_captions(written, cleaned)
        except InvalidSampleError as problem:
            items.append(_rejected(f"{entry.id}, captions", problem.reason, problem.detail))
    row_name = item_id(source, entry)
    # Rows of a table may name one image several times: it is one item, and each row's captions are their own.
    place: dict[str, Any] = {"id": entry.file if entry.row_id and not entry.column and entry.file else row_name}
    if entry.file:
        place |= _place(source, entry)
    if isinstance(image, InvalidSampleError):
        items.append(_rejected(place["id"], image.reason, image.detail))
    elif "image" in kinds and entry.file and place["id"] not in seen:
        seen.add(place["id"])
        items += sample_items(place, captions, ["image"], image)
    if "text" in kinds:
        texts = sample_items(place | {"id": row_name}, captions, ["text"])
        if texts and cleaned:
            texts[0]["cleaned"] = cleaned.total()
        items += texts
    return items


def _place(source: Source, entry: Entry) -> dict[str, Any]:
    if entry.column:  # a column of another name than the usual must be told
        (file,) = source.files
        shard = f"{file}#{entry.column}" if source.options.image_column else file
        return {"shard": shard, "offset": entry.offset, "length": 0}
    file = storage.resolve(source.images_uri, entry.file) if source.options.images else entry.file
    return {"shard": file, "offset": 0, "length": max(entry.length, WHOLE_FILE)}


def sample_items(
    place: dict[str, Any], captions: Sequence[str], kinds: Sequence[str], image: bytes | None = None
) -> list[dict[str, Any]]:
    """The items of a sample: its image, and each caption."""
    items = []
    if "image" in kinds:
        items.append({**place, "kind": "image", "caption": captions[0] if captions else None, "image": image})
    if "text" in kinds:
        name = place["id"]
        items += [{**place, "id": f"{name}#{i}", "kind": "text", "text": text} for i, text in enumerate(captions)]
    return items


# --- ids --------------------------------------------------------------------------------------------------------------


def item_id(source: Source, entry: Entry) -> str:
    """FILE#ID for a row of a Parquet file with a column of ids; otherwise what is unique in any source, FILE#ROW say.

    Where ids of a file repeat or are null, the row is added: a row is never taken for another.
    """
    if not entry.row_id or source.format != "parquet":
        return entry.row_id or entry.id
    (file,) = source.files
    row = int(entry.row_id.rpartition("#")[2])
    ids, are_unique = _ids(storage.join(source.uri, file), source.options.id_column)
    if not ids or ids[row] is None:
        return entry.row_id
    return f"{file}#{ids[row]}" if are_unique else f"{file}#{ids[row]}@{row}"


@lru_cache(maxsize=4)
def _ids(uri: str, column: str) -> tuple[list[Any], bool]:
    """The ids of all rows of a file (none where there is no column of them), and whether they tell rows apart."""
    table = pq.ParquetFile(storage.RangedFile(uri))
    known = [column] if column else ID_COLUMNS
    name = next((name for name in known if name in table.schema_arrow.names), None)
    if name is None:
        return [], True
    ids = table.read([name])[name]
    return ids.to_pylist(), ids.null_count == 0 and pc.count_distinct(ids).as_py() == len(ids)


# --- before anything is read ------------------------------------------------------------------------------------------


def count_items(source: Source, kinds: Sequence[str]) -> int:
    """How many items there are: counted for tables in text, estimated from the first part for Parquet and folders."""
    if source.format not in ("parquet", *LISTED_BY_NAME):
        return _num_items(source, kinds)
    total, first = 0, None
    for part in source.split():
        total += _num_rows(part)
        first = part if first is None and total else first
    return round(total * _num_items(first, kinds) / _num_rows(first)) if first else 0


def _num_items(source: Source, kinds: Sequence[str]) -> int:
    """The items of all entries, whose images are not read for it."""
    seen: set[str] = set()
    return sum(
        len(_entry_items(kinds, source, found, None, seen)) if isinstance(found, Entry) else isinstance(found, Rejected)
        for found in source.entries()
    )


def _num_rows(part: Source) -> int:
    """Rows of a row group, or images of a folder; none of a file that is no Parquet."""
    if part.format in LISTED_BY_NAME:
        return sum(1 for name in part.files if IMAGE.search(name))
    if part.row_group < 0:
        return 0
    return _footer(storage.join(part.uri, part.files[0])).row_group(part.row_group).num_rows


@lru_cache(maxsize=4)
def _footer(uri: str) -> pq.FileMetaData:
    return pq.ParquetFile(storage.RangedFile(uri)).metadata


def remarks(source: Source, kinds: Sequence[str]) -> list[str]:
    """What of a source is not embedded, for the user."""
    by_path = source.format not in ("webdataset", *LISTED_BY_NAME)
    images = {storage.join(source.uri, name) for name in source.others if IMAGE.search(name)} if by_path else set()
    counts = Counter(found.reason for found in source.unused_files(images))
    if source.format in LISTED_BY_NAME:
        counts.update(found.reason for found in source.entries() if isinstance(found, LeftOut))
    told = [f"not embedded: {count:,} x {reason}" for reason, count in counts.most_common()]
    first = next((found for found in source.entries() if isinstance(found, Entry)), None) if by_path else None
    if first is not None and not first.file and "image" in kinds:
        told.append(f"{first.source_location.split(',')[0]} has no column of images: only its texts are embedded")
    if source.format == "class_folders" and "text" in kinds:
        told.append("no image has a text beside it: only images are embedded (names of folders are no captions here)")
    return told
