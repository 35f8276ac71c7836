"""Captioned images, from every form their annotations are published in.

| form | for instance | looks like |
|---|---|---|
| Karpathy | `dataset_coco.json` | `{"images": [{"filename", "split", "sentences": [{"raw"}]}]}` |
| COCO | `nocaps_val_4500_captions.json` | `{"images": [{"id", "file_name"}], "annotations": [{"image_id", ..}]}` |
| BLIP | `coco_karpathy_test.json` | `[{"image", "caption": [..]}]` |
| CLIP benchmark | `flickr30k_test_karpathy.txt` | a header line, then `name.jpg,caption` |
| CSV | `test_1k_flickr.csv` | columns `filename` and `raw`, a JSON list of captions |
| Parquet | `test-00000-of-00004.parquet` | columns `image` and `text` or `annotations_captions`, a list |
"""

import csv
import io
import json
from collections.abc import Sequence
from fnmatch import fnmatch
from hashlib import sha256
from typing import NamedTuple

import pyarrow.parquet as pq

from vladva.benchmarks.readers.files import parse_json
from vladva.benchmarks.readers.images import parquet_images
from vladva.core.storage import absolute, join, list_files, open_storage
from vladva.data.image_refs import ImageRef

CAPTION_COLUMNS = ("text", "annotations_captions", "captions", "caption")


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
                captions = _caption_column(data_uri, path)
                names = [f"{path}/{row}" for row in range(len(captions))]
                rows += [CaptionedImage(name, _as_tuple(of)) for name, of in zip(names, captions, strict=True)]
                images += parquet_images(data_uri, path, "image", names)
            digest = sha256(json.dumps([row.captions for row in rows]).encode()).hexdigest()
            return CaptionTables(rows, images, digest)
    return None


def _caption_column(data_uri: str, path: str) -> list[str | list[str]]:
    filesystem, inside = open_storage(join(data_uri, path))
    columns = pq.read_schema(inside, filesystem=filesystem).names
    column = next((name for name in CAPTION_COLUMNS if name in columns), None)
    if column is None:
        expected = ", ".join(CAPTION_COLUMNS)
        raise ValueError(f"{path}: holds no captions; expected one of the columns {expected}, found {columns}")
    return pq.read_table(inside, columns=[column], filesystem=filesystem)[column].to_pylist()


def read_captions(path: str, data: bytes, *, split: str = "test") -> list[CaptionedImage]:
    """Read annotations of any of the forms above. `split` is what is taken of a Karpathy file."""
    if path.endswith(".txt"):
        return _clip_benchmark_lines(data.decode("utf-8"))
    if path.endswith(".csv"):
        table = csv.DictReader(io.StringIO(data.decode("utf-8"), newline=""))
        return [CaptionedImage(row["filename"], tuple(json.loads(row["raw"]))) for row in table]
    content = parse_json(path, data)
    if isinstance(content, list):
        return _blip_list(path, content)
    if "annotations" in content:
        return _coco_captions(content)
    if content.get("images") and "sentences" in content["images"][0]:
        return _karpathy(content, split)
    raise ValueError(
        f"{path}: holds no captions; expected a Karpathy, COCO-captions or BLIP file, found the keys "
        f"{sorted(content)} (a list of images without captions, such as nocaps_val_image_info.json, will not do)"
    )


def _karpathy(content: dict, split: str) -> list[CaptionedImage]:
    # `filepath` is there for COCO only. `raw` and not `tokens`: the published numbers are on the captions as written.
    return [
        CaptionedImage(
            "/".join(part for part in (image.get("filepath"), image["filename"]) if part),
            tuple(sentence["raw"] for sentence in image["sentences"]),
        )
        for image in content["images"]
        if image["split"] == split
    ]


def _coco_captions(content: dict) -> list[CaptionedImage]:
    captions: dict[int, list[str]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:  # neither grouped nor sorted; ids start at 0
        captions[annotation["image_id"]].append(annotation["caption"])
    return [
        CaptionedImage(image["file_name"], tuple(captions[image["id"]]), image.get("domain", ""))
        for image in content["images"]
    ]


def _blip_list(path: str, content: list[dict]) -> list[CaptionedImage]:
    if any("caption" not in row for row in content):
        raise ValueError(f"{path}: rows without `caption`; the caption-less nocaps_val.json of BLIP will not do")
    return [CaptionedImage(row["image"], _as_tuple(row["caption"])) for row in content]


def _as_tuple(caption: str | list[str]) -> tuple[str, ...]:
    return (caption,) if isinstance(caption, str) else tuple(caption)


def _clip_benchmark_lines(text: str) -> list[CaptionedImage]:
    captions: dict[str, list[str]] = {}
    for line in text.splitlines()[1:]:
        name, caption = line.split(",", 1)  # captions have commas of their own
        captions.setdefault(name, []).append(caption)
    return [CaptionedImage(name, tuple(lines)) for name, lines in captions.items()]
