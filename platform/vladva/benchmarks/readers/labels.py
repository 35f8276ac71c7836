"""Labelled images -> the images and their classes.

| form | looks like |
|---|---|
| class folders | `<folder>/<WordNet id>/<name>.JPEG`; classes are the folders, sorted |
| WebDataset | tar members `KEY.jpg` and `KEY.cls`, the latter holding the class number |
| Parquet | columns `image` (bytes or {bytes, path}) and `label` |
"""

import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow.parquet as pq

from vladva.benchmarks.readers.images import READ_AHEAD, find_images, parquet_images, whole_members
from vladva.core.storage import absolute, join, list_files, open_storage, open_stream
from vladva.data.image_refs import ImageRef

CLASS = re.compile(r"\.cls$")


class Labelled(NamedTuple):
    """Images and their classes, and the number of class folders (0 where the form has none)."""

    images: list[ImageRef]
    labels: list[int]
    num_folders: int


def read_labelled(data_uri: str, folders: Sequence[str], title: str) -> Labelled:
    """Read any of the forms above from the first of `folders` that has one; FileNotFoundError when none does."""
    for folder in folders:
        base = join(absolute(data_uri), folder)
        parquet = [join(folder, uri[len(base) :]) for uri in list_files(base, ".parquet")]
        if parquet:
            return _parquet(data_uri, parquet)
    images = find_images(data_uri, folders)
    if not images:
        raise FileNotFoundError(f"{title}: no images under {data_uri}; looked in {', '.join(folders)}")
    tars = sorted({ref.uri for ref in images if ref.uri.endswith(".tar")})
    return _webdataset(images, tars, title) if tars else _class_folders(images, title)


def _class_folders(images: list[ImageRef], title: str) -> Labelled:
    flat = [ref.name for ref in images if "/" not in ref.name]
    if flat:
        raise ValueError(
            f"{title}: {flat[0]} lies in no class folder; sort the images into one folder per WordNet id (the ids in "
            "ILSVRC2012_validation_ground_truth.txt are in another order than the class names)"
        )
    folders = [PurePosixPath(ref.name).parent.name for ref in images]
    classes = sorted(set(folders))
    number = {name: index for index, name in enumerate(classes)}
    return Labelled(images, [number[folder] for folder in folders], len(classes))


def _webdataset(images: list[ImageRef], tars: list[str], title: str) -> Labelled:
    labels: dict[tuple[str, str], int] = {}  # (tar, key) -> class
    for uri in tars:
        with open_stream(uri, READ_AHEAD) as file:
            for member in whole_members(file, uri, CLASS):
                file.seek(member.offset)
                content = file.read(member.length)
                labels[uri, member.name.removesuffix(".cls")] = _class_number(content, uri, member.name)
    keys = [(ref.uri, str(PurePosixPath(ref.name).with_suffix(""))) for ref in images]
    missing = [ref.name for ref, key in zip(images, keys, strict=True) if key not in labels]
    if missing:
        raise ValueError(f"{title}: {len(missing)} images have no .cls member, the first is {missing[0]}")
    return Labelled(images, [labels[key] for key in keys], 0)


def _class_number(content: bytes, uri: str, member: str) -> int:
    try:
        return int(content)
    except ValueError:
        raise ValueError(f"{uri}#{member}: expected the number of a class, found {content[:40]!r}") from None


def _parquet(data_uri: str, paths: list[str]) -> Labelled:
    images: list[ImageRef] = []
    labels: list[int] = []
    for path in paths:
        filesystem, inside = open_storage(join(data_uri, path))
        if "label" not in (names := pq.read_schema(inside, filesystem=filesystem).names):
            raise ValueError(f"{path}: expected a column `label` of class numbers, found {names}")
        found = pq.read_table(inside, columns=["label"], filesystem=filesystem)["label"].to_pylist()
        if not all(isinstance(label, int) for label in found):
            row = next(row for row, label in enumerate(found) if not isinstance(label, int))
            raise ValueError(f"{path}, row {row}: expected the number of a class, found {found[row]!r}")
        labels += found
        images += parquet_images(data_uri, path, "image", [f"{path}/{row}" for row in range(len(found))])
    return Labelled(images, labels, 0)
