"""SugarCrepe's and SugarCrepe++'s annotations -> rows.

SugarCrepe: `{"0": {"filename", "caption", "negative_caption"}, ..}`, a dict whose keys may have gaps (swap_obj has no
"108"). SugarCrepe++: a list of `{"id", "filename", "caption", "caption2", "negative_caption"}`, or Parquet of the same.
"""

import io
from typing import NamedTuple

import pyarrow.parquet as pq

from vladva.benchmarks.readers.files import parse_json


class Row(NamedTuple):
    """An image, its true caption(s) and one false caption, as written."""

    key: str
    image: str
    caption: str
    caption2: str  # a second true caption in other words; empty where the benchmark has none
    negative: str


def read_rows(path: str, data: bytes) -> list[Row]:
    """Read one subset's file, in either benchmark's form. Raises ValueError naming the row that lacks a field."""
    if path.endswith(".parquet"):
        keyed = [(str(row["id"]), row) for row in pq.read_table(io.BytesIO(data)).to_pylist()]
    else:
        content = parse_json(path, data)
        keyed = list(content.items()) if isinstance(content, dict) else [(str(row["id"]), row) for row in content]
    for key, row in keyed:
        absent = {"filename", "caption", "negative_caption"} - row.keys()
        if absent:
            raise ValueError(f"{path}: row {key} has no {', '.join(sorted(absent))}")
    return [
        Row(key, row["filename"], row["caption"], row.get("caption2", ""), row["negative_caption"])
        for key, row in keyed
    ]
