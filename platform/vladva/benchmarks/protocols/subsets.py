"""Benchmarks made of several files of one form (SugarCrepe, SugarCrepe++): declared, read and checked file by file."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from vladva.benchmarks.benchmark import check_count
from vladva.benchmarks.readers.files import check_hash, read_first
from vladva.benchmarks.readers.sugar_crepe import CaptionChoiceRow, read_choice_rows


class Subset(NamedTuple):
    """One file of a benchmark, and what must be in it."""

    metric: str
    files: tuple[str, ...]  # names it goes by, without folder
    editions: Mapping[int, str | None] | None = None  # rows -> how sha256 begins (None: unknown); None: anything
    num_images: int | None = None


class Subsets(NamedTuple):
    """The files of a benchmark as read."""

    rows: dict[str, list[CaptionChoiceRow]]  # by metric
    counts: dict[str, int]
    files: dict[str, str]


def read_subsets(data_uri: str, folders: Sequence[str], subsets: Sequence[Subset], title: str) -> Subsets:
    """Read every subset from the first of `folders` that has it. Raises ValueError for wrong counts or contents."""
    read = Subsets({}, {}, {})
    for subset in subsets:
        file = read_first(data_uri, [f"{folder}/{name}" for folder in folders for name in subset.files], title)
        rows = read_choice_rows(file.path, file.data)
        editions = subset.editions or {len(rows): None}
        check_count(title, f"rows in {file.path}", list(editions), len(rows))
        check_count(title, f"distinct images in {file.path}", subset.num_images, len({row.image for row in rows}))
        if file.path.endswith(".json"):
            check_hash(title, file, editions[len(rows)])
        read.rows[subset.metric] = rows
        read.counts[subset.metric] = len(rows)
        read.files[file.path] = file.sha256
    return read
