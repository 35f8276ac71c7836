"""The same five images with two captions each, in every form that a source can have."""

from __future__ import annotations

import csv
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from vladva.data.source import SourceOptions


def image(kind: str, seed: int) -> bytes:
    """An image of noise, as a file."""
    body = io.BytesIO()
    Image.frombytes("RGB", (12, 8), Random(seed).randbytes(12 * 8 * 3)).save(body, kind)
    return body.getvalue()


KINDS = {"a.jpg": "JPEG", "b.png": "PNG", "c.jpeg": "JPEG", "d.webp": "WEBP", "e.PNG": "PNG"}
IMAGES = {name: image(kind, seed) for seed, (name, kind) in enumerate(KINDS.items())}
CAPTIONS = {name: [f"the first of {name}", f"another, with a comma; of {name} \N{SNOWMAN}"] for name in IMAGES}
ROWS = [(name, text) for which in (0, 1) for name in IMAGES for text in [CAPTIONS[name][which]]]  # not neighbours


def write_images(folder: Path) -> None:
    (folder / "images").mkdir(parents=True)
    for name, data in IMAGES.items():
        (folder / "images" / name).write_bytes(data)


def webdataset(folder: Path) -> None:
    for shard, names in enumerate((["a.jpg", "b.png"], ["c.jpeg", "d.webp", "e.PNG"])):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for name in names:
                stem, ending = name.split(".")
                about = json.dumps({"caption": CAPTIONS[name][0], "url": "http://127.0.0.1/", "width": 12})
                contents = {ending: IMAGES[name], "json": about.encode(), "txt": CAPTIONS[name][1].encode()}
                for member, data in contents.items():
                    header = tarfile.TarInfo(f"{stem}.{member}")
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
        (folder / f"{shard:05d}_stats.json").write_text('{"images": 3}')  # as img2dataset leaves it there
        pq.write_table(pa.table({"url": ["http://127.0.0.1/"]}), folder / f"{shard:05d}.parquet")


def parquet_bytes(folder: Path) -> None:
    table = pa.table({"jpg": list(IMAGES.values()), "captions": list(CAPTIONS.values())})
    pq.write_table(table.slice(0, 2), folder / "0.parquet")
    pq.write_table(table.slice(2), folder / "1.parquet", row_group_size=2)


def parquet_struct(folder: Path) -> None:
    write_images(folder)  # Hugging Face keeps bytes, or the path to them
    cells = [{"bytes": data if name < "d" else None, "path": f"images/{name}"} for name, data in IMAGES.items()]
    short, long = zip(*CAPTIONS.values(), strict=True)
    pq.write_table(pa.table({"image": cells, "caption": short, "long": long}), folder / "x.parquet")


def parquet_paths(folder: Path) -> None:
    write_images(folder)
    paths, texts = zip(*ROWS, strict=True)
    table = pa.table({"file_name": [f"images/{path}" for path in paths], "text": texts})
    pq.write_table(table, folder / "x.parquet", row_group_size=3)


def karpathy(folder: Path) -> None:
    write_images(folder / "coco")
    images = [
        {"filepath": "images", "filename": name, "split": split, "sentids": [1], "cocoid": number, "imgid": number}
        | {"sentences": [{"raw": text, "tokens": []} for text in CAPTIONS.get(name, ["held out"])]}
        for number, (name, split) in enumerate([*((name, "train") for name in IMAGES), ("other.jpg", "test")])
    ]
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


def coco(folder: Path) -> None:
    write_images(folder)
    ids = {name: 7 * number for number, name in enumerate(IMAGES)}
    notes = [{"image_id": ids[name], "id": number, "caption": text} for number, (name, text) in enumerate(ROWS)]
    images = [{"id": number, "file_name": name, "width": 12} for name, number in ids.items()]
    content = {"info": {"year": 2017}, "images": images, "annotations": notes}
    (folder / "instances_train2017.json").write_text(
        json.dumps(content | {"annotations": [{"image_id": 0, "bbox": []}]})
    )
    (folder / "captions_train2017.json").write_text(json.dumps(content))


def table(folder: Path, delimiter: str = ",", ending: str = "csv") -> None:
    write_images(folder)
    with (folder / f"pairs.{ending}").open("w", newline="", encoding="utf-8-sig") as file:
        rows = csv.writer(file, delimiter=delimiter)
        rows.writerow(["number", "filename", "caption"])
        rows.writerows([number, f"images/{name}", text] for number, (name, text) in enumerate(ROWS))


def table_of_lists(folder: Path) -> None:
    write_images(folder)
    with (folder / "pairs.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "raw"], *([f"images/{n}", json.dumps(c)] for n, c in CAPTIONS.items())])


def folder_of_texts(folder: Path) -> None:
    write_images(folder)
    for name, captions in CAPTIONS.items():
        (folder / "images" / name).with_suffix(".txt").write_text("\n".join(captions) + "\n")


def image_folder(folder: Path) -> None:
    """Hugging Face's ImageFolder, with splits."""
    write_images(folder / "train")
    rows = [{"file_name": f"images/{name}", "text": texts} for name, texts in CAPTIONS.items()]
    (folder / "train/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def json_lines(folder: Path) -> None:
    write_images(folder)
    rows = [json.dumps({"file_name": f"images/{name}", "text": text}) for name, text in ROWS]
    (folder / "pairs.jsonl").write_text("\n".join(rows))


def json_list(folder: Path) -> None:
    write_images(folder)
    rows = [{"image": f"images/{name}", "caption": texts} for name, texts in CAPTIONS.items()]
    (folder / "annotations.json").write_text(json.dumps(rows))


def unquoted_tsv(folder: Path) -> None:
    write_images(folder)
    lines = ["path\tcaption", *(f"images/{name}\t{text}" for name, text in ROWS)]
    (folder / "pairs.tsv").write_text("\n".join(lines))


VARIANTS: dict[str, tuple[str, Callable[[Path], None], dict[str, Any]]] = {
    "webdataset": ("webdataset", webdataset, {}),
    "parquet, bytes": ("parquet", parquet_bytes, {}),
    "parquet, structs": ("parquet", parquet_struct, {"caption_columns": ("caption", "long")}),
    "parquet, paths": ("parquet", parquet_paths, {}),
    "karpathy": ("karpathy", karpathy, {"images": "coco", "splits": ("train",)}),
    "coco": ("coco", coco, {"images": "images"}),
    "csv": ("table", table, {}),
    "tsv": ("table", lambda folder: table(folder, "\t", "TSV"), {}),
    "csv, lists": ("table", table_of_lists, {}),
    "tsv, unquoted": ("table", unquoted_tsv, {}),
    "json lines": ("table", json_lines, {}),
    "json list": ("table", json_list, {}),
    "image folder": ("image_folder", image_folder, {}),
    "folder, texts": ("folder", folder_of_texts, {}),
}


def write_variant(variant: str, folder: Path) -> SourceOptions:
    """Write the five images in this form; the options that it takes."""
    _, write, options = VARIANTS[variant]
    folder.mkdir()
    write(folder)
    return SourceOptions(**options | ({"images": str(folder / options["images"])} if "images" in options else {}))
