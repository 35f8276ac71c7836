"""Embeddings tables: Parquet files of one model's embeddings, each (id, kind) once.

    <uri>/embeddings-<hash>.parquet   rows: id, kind, embedding (fixed_size_list[D]), content, carried columns
    <uri>/_table.json                 the model, and the files that make up the table; a file not listed is not in it
    <uri>/_quarantine.parquet         id, kind, content, reason of what the last run could not embed

`content` is a digest: equal where the images or texts are equal. Embeddings are float32 for whoever reads the table by
these functions, whatever they are stored in (`stored_vectors.py`). `_table.json` is written last, and atomically, so
readers see the table as it was completed, whatever is being added to it (`table_writer.py`).
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.hashing import digest
from vladva.core.model_description import ModelDescription
from vladva.core.storage import join
from vladva.embed.stored_vectors import SCALE, StoredAs, as_float32, float32_type

GROUP_ROWS = 4096  # rows of one Parquet row group
READERS = 16
CONTENT = pa.binary(16)


def keys_of(rows: pa.Table) -> list[bytes]:
    """The digest of each row's (id, kind)."""
    return [digest(*pair) for pair in zip(rows["id"].to_pylist(), rows["kind"].to_pylist(), strict=True)]


@dataclass(frozen=True)
class TableManifest:
    """What `_table.json` says: the model's description with its fingerprint, the corpus, and the table's files."""

    model: ModelDescription
    corpus: str
    complete: bool
    num_rows: int
    files: list[str]
    stored_as: StoredAs = "float32"

    @property
    def fingerprint(self) -> str:
        """Of the model that made the embeddings."""
        return self.model["fingerprint"]

    @property
    def dimension(self) -> int:
        """D."""
        return self.model["dimension"]


def find_manifest(uri: str) -> TableManifest | None:
    """The manifest of the table at `uri`, complete or not; None where there is no table."""
    file = join(uri, "_table.json")
    return TableManifest(**storage.read_json(file)) if storage.exists(file) else None


def open_table(uri: str) -> TableManifest:
    """The manifest of a complete table. Raises ValueError where there is none, or it is still being made."""
    manifest = find_manifest(uri)
    if manifest is None:
        raise ValueError(f"{uri} holds no embeddings table; make one with jobs/embed.py")
    if not manifest.complete:
        raise ValueError(f"the embeddings table {uri} is not complete; run its embedding job again and it goes on")
    return manifest


def read_embeddings(uri: str) -> pa.Table:
    """The rows of a complete table in the order of (kind, id); the schema's metadata (`vladva`) describe the model."""
    manifest = open_table(uri)
    rows = concat([as_float32(read_rows(join(uri, file))) for file in manifest.files] or [no_rows(manifest.model)])
    return rows.sort_by([("kind", "ascending"), ("id", "ascending")])


def stream_rows(uri: str, kind: str) -> pa.RecordBatchReader:
    """The rows of one kind (or "all") of a complete table, without `content`, a file at a time."""
    files = [join(uri, file) for file in open_table(uri).files]
    schema = schema_of(uri)
    batches = (batch for file in files for batch in rows_of_file(file, kind, schema))
    return pa.RecordBatchReader.from_batches(schema, batches)


def schema_of(uri: str) -> pa.Schema:
    """The columns of a complete table, without `content` and those that are null in every row; float32 embeddings."""
    manifest = open_table(uri)
    with ThreadPoolExecutor(READERS) as pool:
        schemas = list(pool.map(lambda file: pq.read_schema(storage.RangedFile(join(uri, file))), manifest.files))
    whole = pa.unify_schemas(schemas or [no_rows(manifest.model).schema], promote_options="permissive")
    fields = [
        field.with_type(float32_type(field.type)) if field.name == "embedding" else field
        for field in whole
        if field.name not in ("content", SCALE) and not pa.types.is_null(field.type)
    ]
    return pa.schema(fields, whole.metadata)


def rows_of_file(file: str, kind: str, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    """The rows of one kind (or "all") of a table's file, with the columns of `schema`."""
    rows = as_float32(read_rows(file))
    if kind != "all":
        rows = rows.filter(pc.equal(rows["kind"], kind))
    for field in schema:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, pa.nulls(len(rows), field.type))
    yield from rows.select(schema.names).cast(schema).to_batches(max_chunksize=GROUP_ROWS)


def sample_rows(uri: str, count: int, seed: int) -> pa.Table:
    """About `count` rows (id, kind, embedding) of a complete table, from a few places in its files."""
    choice = random.Random(seed)
    files = open_table(uri).files
    tables = []
    for name in choice.sample(files, min(4, len(files))):
        file = pq.ParquetFile(storage.RangedFile(join(uri, name)))
        groups = choice.sample(range(file.num_row_groups), min(4, file.num_row_groups))
        columns = [name for name in ("id", "kind", "embedding", SCALE) if name in file.schema_arrow.names]
        tables += [as_float32(file.read_row_group(group, columns)) for group in groups]
    table = pa.concat_tables(tables)
    return table.take(sorted(choice.sample(range(len(table)), min(count, len(table)))))


def read_rows(uri: str, columns: list[str] | None = None) -> pa.Table:
    """One Parquet file; with `columns`, no more than these is fetched."""
    return pq.read_table(
        storage.RangedFile(uri) if columns else pa.BufferReader(storage.read_bytes(uri)), columns=columns
    )


def read_each(uris: Iterable[str], columns: list[str] | None = None) -> Iterator[pa.Table]:
    """Parquet files one after the other, READERS of them fetched at a time."""
    remaining = iter(uris)
    with ThreadPoolExecutor(READERS) as pool:
        while group := list(islice(remaining, READERS)):
            yield from pool.map(partial(read_rows, columns=columns), group)


def write_rows(uri: str, rows: pa.Table) -> None:
    """Write one Parquet file, atomically."""
    sink = pa.BufferOutputStream()
    # Only texts get a dictionary: one of floats costs time and saves nothing.
    texts = [field.name for field in rows.schema if pa.types.is_string(field.type)]
    pq.write_table(rows, sink, row_group_size=GROUP_ROWS, use_dictionary=texts, compression="lz4")
    storage.write_bytes_atomically(uri, sink.getvalue().to_pybytes())


def concat(tables: list[pa.Table]) -> pa.Table:
    """One table of many. A carried column may be all null, and so of no type, in some of them."""
    return pa.concat_tables(tables, promote_options="permissive")


def no_rows(model: ModelDescription) -> pa.Table:
    """The empty table of a model."""
    embedding = pa.list_(pa.float32(), model["dimension"])
    fields = [("id", pa.string()), ("kind", pa.string()), ("embedding", embedding), ("content", CONTENT)]
    return pa.schema(fields, {b"vladva": json.dumps(model).encode()}).empty_table()


def embedding_matrix(rows: pa.Table) -> np.ndarray:
    """The embeddings of rows, float32 [N, D]."""
    embedding = rows["embedding"].combine_chunks()
    values = embedding.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(len(rows), embedding.type.list_size).astype(np.float32, copy=False)
