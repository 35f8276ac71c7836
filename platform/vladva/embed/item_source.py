"""Item source: the pieces of a corpus -> a Ray data set of its items, each piece read where it is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import Datasource, ReadTask
from ray.data.block import BlockMetadata

from vladva.core.ray_tasks import FEEDER_CPUS, cluster_cpus

MAX_TASKS = 512  # that read, at least: what Ray knows of each is in the driver's memory, so there are not more


class ItemSource(Datasource):
    """Read tasks for the pieces of a corpus, several pieces each where there are many."""

    def __init__(
        self, pieces: Sequence[tuple[Any, ...]], read: Callable[..., Iterator[list[dict[str, Any]]]], schema: pa.Schema
    ) -> None:
        super().__init__()
        self.pieces, self.read, self.schema = pieces, read, schema

    def estimate_inmemory_data_size(self) -> None:
        """Nobody knows."""

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """A task for each run of pieces."""
        tasks = max(MAX_TASKS, 4 * cluster_cpus())
        each = -(-len(self.pieces) // tasks)
        metadata = BlockMetadata(num_rows=None, size_bytes=None, exec_stats=None)
        return [
            ReadTask(partial(_read, self.pieces[first : first + each], self.read, self.schema), metadata, self.schema)
            for first in range(0, len(self.pieces), each)
        ]


def _read(
    pieces: Sequence[tuple[Any, ...]], read: Callable[..., Iterator[list[dict[str, Any]]]], schema: pa.Schema
) -> Iterator[pa.Table]:
    for piece in pieces:
        for items in read(*piece):
            yield pa.Table.from_pylist(items, schema)


def item_dataset(
    pieces: Sequence[tuple[Any, ...]], read: Callable[..., Iterator[list[dict[str, Any]]]], schema: pa.Schema
) -> ray.data.Dataset:
    """The items of each piece, as `read(*piece)` gives them, some at a time."""
    if not pieces:
        return ray.data.from_arrow(schema.empty_table())
    source = ItemSource(pieces, read, schema)
    # Half of the CPUs: the others make batches of what is read.
    tasks = len(source.get_read_tasks(0))  # told, or Ray would cut what they read into two hundred
    return ray.data.read_datasource(
        source, num_cpus=FEEDER_CPUS, concurrency=max(1, cluster_cpus() // 2), override_num_blocks=tasks
    )
