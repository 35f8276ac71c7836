"""Winoground's annotations -> examples: Parquet with the images inside, or the older JSON lines beside PNG files."""

import io
import json
from typing import NamedTuple

import pyarrow.parquet as pq

IMAGE_COLUMNS = ("image_0", "image_1")


class Example(NamedTuple):
    """Two captions and the two images they belong to, in that order."""

    id: int
    captions: tuple[str, str]
    images: tuple[str, str]  # file names; in Parquet, made up from the id
    tag: str


def read_examples(path: str, data: bytes) -> list[Example]:
    """Read either form. The images of a Parquet file are found by row, in its columns `image_0` and `image_1`."""
    if path.endswith(".parquet"):
        rows = pq.read_table(io.BytesIO(data), columns=["id", "caption_0", "caption_1", "collapsed_tag"]).to_pylist()
        stems = [(f"ex_{row['id']}_img_0", f"ex_{row['id']}_img_1") for row in rows]
    else:
        rows = [json.loads(line) for line in data.decode("utf-8").splitlines() if line]
        stems = [(row["image_0"], row["image_1"]) for row in rows]
    return [
        Example(row["id"], (row["caption_0"], row["caption_1"]), (f"{a}.png", f"{b}.png"), row["collapsed_tag"])
        for row, (a, b) in zip(rows, stems, strict=True)
    ]
