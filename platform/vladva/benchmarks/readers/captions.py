"""Captioned images, from every form their annotations are published in.

| form | for instance | read by |
|---|---|---|
| Karpathy: `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}` | `dataset_coco.json` | `data/formats/karpathy.py` |
| COCO: `{"images": [{"id", "file_name"}], "annotations": [{"image_id", ..}]}` | `nocaps_val_4500_captions.json` | `data/formats/coco.py` |
| BLIP: `[{"image", "caption": [..]}]` | `coco_karpathy_test.json` | `data/formats/table.py` |
| CSV: columns `filename` and `raw`, a JSON list of captions | `test_1k_flickr.csv` | `data/formats/table.py` |
| Parquet: columns `image` and `text` or the like, a list | `test-00000-of-00004.parquet` | `data/formats/parquet.py` |
| CLIP benchmark: a header line, then `name.jpg,caption` without quotes | `flickr30k_test_karpathy.txt` | here |

A benchmark is whole or it is none: what the other jobs would count as unusable is an error here, which names it.
"""  # noqa: E501

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from hashlib import sha256
from typing import NamedTuple

from vladva.benchmarks.readers.files import numbered_lines
from vladva.benchmarks.readers.images import parquet_images
from vladva.core.storage import absolute, file_info, join, list_files, read_bytes
from vladva.data.image_refs import ImageRef
from vladva.data.source import Entry, FileSet, Rejected, Source, SourceOptions, find_format

TEXT_FORMATS = ("karpathy", "coco", "table")  # of text files


class CaptionedImage(NamedTuple):
    """An image's name and its captions, as written, and the group that it belongs to where there are any."""

    name: str
    captions: tuple[str, ...]
    group: str = ""


class CaptionTables(NamedTuple):
    """Captioned images from Parquet files that hold both."""

    rows: list[CaptionedImage]
    images: list[ImageRef]
    sha256: str  # of the captions, as JSON


def read_caption_tables(data_uri: str, patterns: Sequence[str]) -> CaptionTables | None:
    """Rows of all files that match the first of `patterns` (relative to `data_uri`) to match any; None where none does.

    Images are called by file and row. Raises ValueError where there is no column of captions.
    """
    root = absolute(data_uri)
    for pattern in patterns:
        files = [uri[len(root) + 1 :] for uri in list_files(join(root, pattern.rpartition("/")[0]), ".parquet")]
        paths = [path for path in files if fnmatch(path, pattern)]
        if paths:
            rows: list[CaptionedImage] = []
            images: list[ImageRef] = []
            for path in paths:
                entries = list(_usable(_source(root, path, "parquet", SourceOptions())))
                if entries and not any(entry.captions for entry in entries):
                    raise ValueError(f"{path}: holds no captions in a column of a known name")
                names = [f"{path}/{row}" for row in range(len(entries))]
                rows += [CaptionedImage(name, tuple(of.captions)) for name, of in zip(names, entries, strict=True)]
                images += parquet_images(data_uri, path, entries[0].column if entries else "image", names)
            digest = sha256(json.dumps([row.captions for row in rows]).encode()).hexdigest()
            return CaptionTables(rows, images, digest)
    return None


def read_captioned_images(data_uri: str, path: str, *, split: str = "test") -> list[CaptionedImage]:
    """Read the annotations at `path` below `data_uri`. `split` is what is taken of a Karpathy file.

    Images are in the order in which they are first named. Raises ValueError for a file of another form, and for one
    of which anything cannot be used, naming file and line.
    """
    root = absolute(data_uri)
    if path.endswith(".txt"):
        return _clip_benchmark_lines(path, read_bytes(join(root, path)))
    folder, _, file = path.rpartition("/")
    files = FileSet(join(root, folder) if folder else root, {file: file_info(join(root, path))})
    name = next((name for name in TEXT_FORMATS if find_format(name).match(files)), "")
    if not name:
        raise ValueError(
            f"{path}: holds no captions; expected a Karpathy, COCO-captions or BLIP file (a list of images without "
            "captions, such as nocaps_val_image_info.json, will not do)"
        )
    captions: dict[str, list[str]] = {}
    groups: dict[str, str] = {}
    for entry in _usable(_source(root, path, name, SourceOptions(splits=(split,) if name == "karpathy" else ()))):
        captions.setdefault(entry.file, []).extend(entry.captions)
        groups[entry.file] = entry.group
    if captions and not any(captions.values()):
        raise ValueError(f"{path}: holds no captions, of none of its {len(captions)} images")
    return [CaptionedImage(image, tuple(texts), groups[image]) for image, texts in captions.items()]


def _source(root: str, path: str, name: str, options: SourceOptions) -> Source:
    """One file as a source; entries name it as it is called in the benchmark's folder."""
    return Source(root, name, (path,), (), options)


def _usable(source: Source) -> Iterator[Entry]:
    for found in source.entries():
        if isinstance(found, Rejected):
            raise ValueError(
                f"{found.source_location}: {found.reason}; {found.detail or 'expected a path and captions'}"
            )
        if isinstance(found, Entry):
            yield found


def _clip_benchmark_lines(path: str, data: bytes) -> list[CaptionedImage]:
    """Lines of `name.jpg,caption`, a caption each, after a header."""
    captions: dict[str, list[str]] = {}
    for number, line in list(numbered_lines(path, data))[1:]:
        if line.strip():
            name, comma, caption = line.partition(",")
            if not comma or not name.strip():
                raise ValueError(
                    f"{path}, line {number}: expected an image's name, a comma and a caption, found {line!r}"
                )
            captions.setdefault(name.strip(), []).append(caption)
    return [CaptionedImage(name, tuple(texts)) for name, texts in captions.items()]
