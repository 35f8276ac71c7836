"""Benchmarks in the forms and sizes they are published in, made of few scenes and captions over and over.

An image or caption that repeats is embedded once, so a full-size benchmark costs little here.
"""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SUGAR_CREPE_PP = {  # as Hugging Face names its configurations
    "swap_object": 245,
    "swap_atribute": 666,
    "replace_object": 1652,
    "replace_attribute": 788,
    "replace_relation": 1406,
}


def write_benchmarks(folder: Path, pictures: list[bytes], captions: list[str]) -> None:
    """Flickr30K (Karpathy's file, images in a tar), SugarCrepe++ and Winoground (both Parquet)."""
    images = [
        {
            "filename": f"{n}.jpg",
            "split": "test",
            "sentences": [{"raw": captions[(n + k) % len(captions)]} for k in range(5)],
        }
        for n in range(1000)
    ]
    (folder / "flickr30k").mkdir(parents=True)
    (folder / "flickr30k/dataset_flickr30k.json").write_text(json.dumps({"images": images, "dataset": "flickr30k"}))
    write_tar(folder / "flickr30k/images/000.tar", [f"{n}.jpg" for n in range(1000)], pictures)

    names = [f"{n:012}.jpg" for n in range(1542)]
    write_tar(folder / "coco/val2017/000.tar", names, pictures)
    (folder / "sugar_crepe_pp").mkdir()
    row = 0
    for subset, count in SUGAR_CREPE_PP.items():
        rows = [
            {
                "id": n,
                "filename": names[(row + n) % 1542],
                "caption": captions[n % len(captions)],
                "caption2": captions[(n + 1) % len(captions)],
                "negative_caption": captions[(n + 2) % len(captions)],
            }
            for n in range(count)
        ]
        row += count
        pq.write_table(pa.Table.from_pylist(rows), folder / f"sugar_crepe_pp/{subset}.parquet")

    rows = [
        {
            "id": n,
            "caption_0": captions[n % len(captions)],
            "caption_1": captions[(n + 1) % len(captions)],
            "image_0": {"bytes": pictures[n % len(pictures)], "path": None},
            "image_1": {"bytes": pictures[(n + 1) % len(pictures)], "path": None},
            "collapsed_tag": "Object",
        }
        for n in range(400)
    ]
    (folder / "winoground/data").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / "winoground/data/test-00000-of-00001.parquet")


def write_tar(path: Path, names: list[str], pictures: list[bytes]) -> None:
    """Images of these names, over and over."""
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for number, name in enumerate(names):
            info = tarfile.TarInfo(name)
            info.size = len(pictures[number % len(pictures)])
            tar.addfile(info, io.BytesIO(pictures[number % len(pictures)]))
