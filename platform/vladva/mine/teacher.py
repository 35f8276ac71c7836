"""Teacher: which captions say the same, by a model that is not the one being trained.

    short captions --embed/pipeline.py--> RUN/teacher/N/table --dealt by shard--> RUN/teacher/N/SHARD.parquet

A caption that is true of another image as well is taught to be false of it, unless somebody knows better. The teacher's
vectors are made once, before the first step, and read with the samples: it costs a step next to nothing, the same pairs
are left out for any number of workers and in every attempt, and any model can be the teacher, also one that is no LVLM.
Both parts go on where they were interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vladva.config import RunConfig
from vladva.core import storage
from vladva.core.devices import gpus_for
from vladva.core.ray_tasks import collect, scatter, submit
from vladva.data.sample_vectors import VectorsManifest, complete_vectors, find_vectors, teacher_uri, write_vectors
from vladva.data.shard_index import ShardIndex
from vladva.embed.corpus import ITEM
from vladva.embed.item_source import item_dataset
from vladva.embed.pipeline import encode
from vladva.embed.source_items import ROWS_PER_READ
from vladva.embed.stored_vectors import SCALE, as_float32
from vladva.embed.table import embedding_matrix, open_table, read_rows

if TYPE_CHECKING:
    from vladva.train.preflight import Tell

SAMPLES_PER_TASK = 50_000  # whose vectors one task writes


def teach(config: RunConfig, tell: Tell) -> None:
    """Make the vectors that a run's false negatives are found by, or go on with them; needs a Ray cluster.

    Nothing is done for a run that asks for none, nor where they are there. The data sets must have been scanned.
    """
    if config.loss.false_negatives_above is None:
        return
    model = config.loss.teacher or config.model.checkpoint
    for source, data_uri in enumerate(config.data.uris):
        index, uri = ShardIndex.open(data_uri), teacher_uri(config, source)
        if find_vectors(uri) is None:
            tell(f"{data_uri}: {model} embeds the short captions, to tell false negatives")
            align(embed_captions(config, model, index, storage.join(uri, "table")), index, uri)


def embed_captions(config: RunConfig, model: str, index: ShardIndex, table_uri: str) -> str:
    """Embed the short captions of a data set into the table at `table_uri`; returns that."""
    pieces = [
        (first, min(ROWS_PER_READ, index.num_samples - first)) for first in range(0, index.num_samples, ROWS_PER_READ)
    ]
    items = item_dataset(pieces, partial(_short_captions, index, config.data.short_below), ITEM)
    encode(
        items,
        model,
        table_uri,
        adapter=bool(config.loss.teacher),
        actors=config.cluster.workers,
        dtype=config.model.dtype,
        gpus_per_actor=gpus_for(None if config.cluster.gpus_per_worker else 0),
        corpus=index.data_uri,
        stored_as="float16",
    )
    return table_uri


def _short_captions(index: ShardIndex, short_below: int, first: int, count: int) -> Iterator[list[dict[str, Any]]]:
    """The items of the captions that are contrasted."""
    yield [
        {"id": f"{ref.id}#{i}", "kind": "text", "text": text, "shard": ref.shard}
        for ref in index.samples(first, count)
        for i, (text, tokens) in enumerate(zip(ref.captions, ref.caption_tokens, strict=True))
        if tokens < short_below
    ]


# --- in the order of the samples --------------------------------------------------------------------------------------


def align(table_uri: str, index: ShardIndex, uri: str) -> None:
    """Write the vectors of an embeddings table of captions in the order of the samples.

    Each file of the table is dealt to the tasks that write the shards; no process holds more than its part.
    """
    manifest = open_table(table_uri)
    groups = _groups(index)
    files = [storage.join(table_uri, file) for file in manifest.files]
    dealt = [scatter(_deal, len(groups), file, groups) for file in files]
    collect([submit(_write, index, uri, group, *(parts[g] for parts in dealt)) for g, group in enumerate(groups)])
    complete_vectors(uri, VectorsManifest(index.fingerprint, manifest.fingerprint, manifest.dimension))


def _groups(index: ShardIndex) -> list[list[str]]:
    """The shards that each task writes: neighbours, of about SAMPLES_PER_TASK samples."""
    groups: list[list[str]] = []
    for shard, end in zip(index.shards, index.ends, strict=True):
        if end // SAMPLES_PER_TASK >= len(groups):
            groups.append([])
        groups[-1].append(shard)
    return groups


def _deal(file: str, groups: Sequence[Sequence[str]]) -> list[pa.Table]:
    """The rows (id, vector) of a table's file, for each group of shards."""
    import torch

    from vladva.losses.pairs import to_teacher_numbers

    columns = ["id", "shard", "embedding", *([SCALE] if _is_scaled(file) else [])]
    rows = as_float32(read_rows(file, columns))
    numbers_NE = to_teacher_numbers(torch.tensor(embedding_matrix(rows))).numpy()
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(numbers_NE.ravel()), numbers_NE.shape[1])
    found = pa.table({"id": rows["id"], "vector": vectors})
    return [found.filter(pc.is_in(rows["shard"], pa.array(group))) for group in groups]


def _is_scaled(file: str) -> bool:
    import pyarrow.parquet as pq

    return SCALE in pq.read_schema(storage.RangedFile(file)).names


def _write(index: ShardIndex, uri: str, shards: Sequence[str], *parts: pa.Table) -> None:
    """Write the vectors of some shards, from the rows that all files have for them."""
    rows = pa.concat_tables(parts)
    row_of = {name: row for row, name in enumerate(rows["id"].to_pylist())}
    vectors = rows["vector"].combine_chunks()
    numbers_NE = vectors.flatten().to_numpy().reshape(len(rows), -1) if len(rows) else np.zeros((0, 0), np.int16)
    for shard in shards:
        number = index.shards.index(shard)
        first = index.ends[number - 1] if number else 0
        found = [
            [
                numbers_NE[row_of[name]] if (name := f"{ref.id}#{i}") in row_of else None
                for i in range(len(ref.captions))
            ]
            for ref in index.samples(first, index.ends[number] - first)
        ]
        write_vectors(uri, shard, found)
