"""Labelled images -> the images and their classes.

| form | looks like |
|---|---|
| class folders | `<folder>/<WordNet id>/<name>.JPEG`; classes are the folders, sorted |
| WebDataset | tar members `KEY.jpg` and `KEY.cls`, the latter holding the class number |
| Parquet | columns `image` (bytes or {bytes, path}) and `label` |
"""

import io
import tarfile
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

import pyarrow.parquet as pq

from vladva.benchmarks.readers.images import READ_AHEAD, find_images, parquet_images
from vladva.core.storage import RangedFile, absolute, join, list_files, open_storage
from vladva.data.image_refs import ImageRef


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
    tars = sorted({ref.uri for ref in images.values() if ref.uri.endswith(".tar")})
    return _webdataset(images, tars, title) if tars else _class_folders(images, title)


def _class_folders(images: dict[str, ImageRef], title: str) -> Labelled:
    flat = [name for name in images if "/" not in name]
    if flat:
        raise ValueError(
            f"{title}: {flat[0]} lies in no class folder; sort the images into one folder per WordNet id (the ids in "
            "ILSVRC2012_validation_ground_truth.txt are in another order than the class names)"
        )
    classes = sorted({PurePosixPath(name).parent.name for name in images})
    number = {name: index for index, name in enumerate(classes)}
    labels = [number[PurePosixPath(name).parent.name] for name in images]
    return Labelled(list(images.values()), labels, len(classes))


def _webdataset(images: dict[str, ImageRef], tars: list[str], title: str) -> Labelled:
    labels: dict[str, int] = {}
    for uri in tars:
        with io.BufferedReader(RangedFile(uri), READ_AHEAD) as file, tarfile.open(fileobj=file) as tar:
            for member in tar:
                if member.name.endswith(".cls"):
                    content = tar.extractfile(member)
                    assert content is not None, "a .cls member is a plain file"
                    labels[member.name.removesuffix(".cls")] = int(content.read())
    missing = [name for name in images if str(PurePosixPath(name).with_suffix("")) not in labels]
    if missing:
        raise ValueError(f"{title}: {len(missing)} images have no .cls member, the first is {missing[0]}")
    return Labelled(list(images.values()), [labels[str(PurePosixPath(name).with_suffix(""))] for name in images], 0)


def _parquet(data_uri: str, paths: list[str]) -> Labelled:
    images: list[ImageRef] = []
    labels: list[int] = []
    for path in paths:
        filesystem, inside = open_storage(join(data_uri, path))
        found = pq.read_table(inside, columns=["label"], filesystem=filesystem)["label"]
        labels += found.to_pylist()
        images += parquet_images(data_uri, path, "image", [f"{path}/{row}" for row in range(len(found))])
    return Labelled(images, labels, 0)
