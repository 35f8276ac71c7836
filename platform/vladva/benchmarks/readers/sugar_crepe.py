"""SugarCrepe's and SugarCrepe++'s annotations -> rows.

SugarCrepe: `{"0": {"filename", "caption", "negative_caption"}, ..}`, a dict whose keys may have gaps (swap_obj has no
"108"). SugarCrepe++: a list of `{"id", "filename", "caption", "caption2", "negative_caption"}`, or Parquet of the same.
"""

import io
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from vladva.benchmarks.readers.files import parse_json


class CaptionChoiceRow(NamedTuple):
    """An image, its true caption(s) and one false caption, as written."""

    key: str
    image: str
    caption: str
    caption2: str  # a second true caption in other words; empty where the benchmark has none
    negative: str


CHOICE_FIELDS = ("filename", "caption", "negative_caption")


def read_choice_rows(path: str, data: bytes) -> list[CaptionChoiceRow]:
    """Read one subset's file, in either benchmark's form. Raises ValueError naming the row that lacks a field."""
    content = pq.read_table(io.BytesIO(data)).to_pylist() if path.endswith(".parquet") else parse_json(path, data)
    if not isinstance(content, (dict, list)):
        raise ValueError(f"{path}: expected a dict or a list of rows, found {type(content).__name__}")
    numbered = content.items() if isinstance(content, dict) else enumerate(content)
    return [_to_row(path, str(number), row, is_list=isinstance(content, list)) for number, row in numbered]


def _to_row(path: str, number: str, row: Any, *, is_list: bool) -> CaptionChoiceRow:
    """In a list a row has its key in `id`, elsewhere it is known by its number."""
    found = row if isinstance(row, dict) else {}
    key = str(found.get("id", number)) if is_list else number
    absent = {name for name in CHOICE_FIELDS if not isinstance(found.get(name), str)}
    if absent:
        raise ValueError(f"{path}: row {key} has no {', '.join(sorted(absent))}")
    second = found.get("caption2") or ""
    return CaptionChoiceRow(key, found["filename"], found["caption"], second, found["negative_caption"])
