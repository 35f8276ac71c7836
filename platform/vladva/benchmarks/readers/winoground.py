"""Winoground's annotations -> examples: Parquet with the images inside, or the older JSON lines beside PNG files."""

import io
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from vladva.benchmarks.readers.files import numbered_lines, parse_json

WINOGROUND_IMAGES = ("image_0", "image_1")


class WinogroundExample(NamedTuple):
    """Two captions and the two images they belong to, in that order."""

    id: int
    captions: tuple[str, str]
    images: tuple[str, str]  # file names; in Parquet, made up from the id
    tag: str


TEXT_FIELDS = ("caption_0", "caption_1", "collapsed_tag")


def read_examples(path: str, data: bytes) -> list[WinogroundExample]:
    """Read either form. The images of a Parquet file are found by row, in its columns `image_0` and `image_1`.

    Raises ValueError naming the line or row that is not what it should be.
    """
    if path.endswith(".parquet"):
        names = pq.read_schema(io.BytesIO(data)).names
        columns = [name for name in ("id", *TEXT_FIELDS) if name in names]
        rows = pq.read_table(io.BytesIO(data), columns=columns).to_pylist()
        return [_to_example(f"{path}, row {number}", row, None) for number, row in enumerate(rows)]
    examples = []
    for number, line in numbered_lines(path, data):
        if line.strip():
            row = parse_json(f"{path}, line {number}", line.encode())
            examples.append(_to_example(f"{path}, line {number}", row, WINOGROUND_IMAGES))
    return examples


def _to_example(location: str, row: Any, image_fields: tuple[str, str] | None) -> WinogroundExample:
    found = row if isinstance(row, dict) else {}
    wanted = (*TEXT_FIELDS, *(image_fields or ()))
    absent = [name for name in wanted if not isinstance(found.get(name), str)]
    if absent or "id" not in found:
        raise ValueError(f"{location}: has no {', '.join(absent or ['id'])}")
    made_up = (f"ex_{found['id']}_img_0", f"ex_{found['id']}_img_1")
    first, second = (found[name] for name in image_fields) if image_fields else made_up
    captions = (found["caption_0"], found["caption_1"])
    return WinogroundExample(found["id"], captions, (f"{first}.png", f"{second}.png"), found["collapsed_tag"])
