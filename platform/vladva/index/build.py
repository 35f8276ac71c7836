"""Build: embeddings table -> a new index."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from vladva.core import storage
from vladva.core.errors import refused
from vladva.core.ray_tasks import collect, submit
from vladva.core.storage import join
from vladva.embed.table import TableManifest, open_table, rows_of_file, sample_rows, schema_of
from vladva.index.ivf import IndexType
from vladva.index.searcher import EXACT_BELOW, SearchSettings
from vladva.index.tuning import CANDIDATES_GRID, NUM_QUERIES, TARGET_RECALL, sample_queries, tune
from vladva.index.vector_index import VectorIndex, lance_options, newest_whole, planned

if TYPE_CHECKING:
    import lance


PARALLEL_FROM = 1_000_000  # rows from which on the whole cluster builds
ROWS_PER_TASK = 1_000_000  # of a table, that one task writes where the index is to be
MAX_WORKERS = 8  # each adds a little to the time of a search


@dataclass(frozen=True)
class IndexSummary:
    """A built index; `settings` say what recall was measured."""

    uri: str
    version: int
    tag: str
    fingerprint: str
    num_rows: int
    dimension: int
    settings: SearchSettings
    index_bytes: int  # beside the vectors
    seconds: float


def build_index(
    table_uri: str,
    index_uri: str,
    *,
    kind: Literal["image", "text", "all"] = "image",
    index_type: IndexType = "IVF_SQ",
    exact_below: int = EXACT_BELOW,
    filter_columns: Sequence[str] = (),
    tag: str | None = None,
    replace: bool = False,
    workers: int | None = None,
    recall: float = TARGET_RECALL,
) -> IndexSummary:
    """Index the rows of one kind of a complete embeddings table; an index of the same model is built anew.

    exact_below: rows below which there is nothing but an exact search.
    filter_columns: carried columns that are often used in conditions.
    tag: name of this version; `v<version>` by default.
    replace: also in place of an index of another model.
    workers: Ray workers that build, each with all cores of its machine, at most MAX_WORKERS; by default one for each
        node of the cluster from PARALLEL_FROM rows on, else none.

    Raises FingerprintMismatch, ValueError for a table without rows of the kind or with unknown columns, and
    StorageRefusedError where the index cannot be written: the version that was there stays the newest one.
    """
    began = time.monotonic()
    if index_type not in ("exact", *CANDIDATES_GRID):
        raise ValueError(f"index_type is {index_type!r}; use one of exact, {', '.join(CANDIDATES_GRID)}")
    manifest = open_table(table_uri)
    if storage.exists(join(index_uri, "_versions")) and not replace and (there := newest_whole(index_uri)):
        VectorIndex(there).check(manifest.fingerprint)
    if workers is None:
        workers = cluster_nodes() if manifest.num_rows >= PARALLEL_FROM else 1
    workers = max(1, min(workers, MAX_WORKERS))
    plan = SearchSettings(planned=index_type, exact_below=exact_below)
    try:
        index = _build(manifest, table_uri, index_uri, kind, filter_columns, plan, workers, recall)
        tagged = index.tag(tag or f"v{index.version}")
    except OSError as error:
        raise refused(error, index_uri) or error from None
    return IndexSummary(
        uri=index_uri,
        version=index.version,
        tag=tagged,
        fingerprint=manifest.fingerprint,
        num_rows=index.num_rows,
        dimension=manifest.dimension,
        settings=index.settings,
        index_bytes=sum(one.total_size_bytes or 0 for one in index.dataset.describe_indices()),
        seconds=time.monotonic() - began,
    )


def _build(
    manifest: TableManifest,
    table_uri: str,
    index_uri: str,
    kind: str,
    filter_columns: Sequence[str],
    plan: SearchSettings,
    workers: int,
    recall: float,
) -> VectorIndex:
    """The rows, partitioned as planned if they are many, and measured: a new version of the index."""
    dataset = _write(
        manifest, table_uri, storage.absolute(index_uri), kind, filter_columns, -(-manifest.num_rows // workers)
    )
    rows = dataset.count_rows()
    settings = planned(dataset, plan, workers)
    dataset.create_scalar_index("kind", "BITMAP")
    for column in dict.fromkeys(["id", *filter_columns]):
        dataset.create_scalar_index(column, "BTREE")
    # Texts are what images will be asked for with, so both are tried, whichever are in the index.
    queries = sample_queries(sample_rows(table_uri, 2 * NUM_QUERIES, seed=0))
    conditions = [f"kind = '{one}'" for one in ("image", "text")]
    wheres = [None, *(where for where in conditions if 0 < dataset.count_rows(where) < rows)]
    tune(dataset, settings, queries, wheres, recall).keep(dataset)
    return VectorIndex(dataset)


def _write(
    manifest: TableManifest,
    table_uri: str,
    index_uri: str,
    kind: str,
    filter_columns: Sequence[str],
    rows_per_file: int,
) -> lance.LanceDataset:
    """The rows of the kind as a new version of the index; each worker will index a file."""
    import lance

    columns = schema_of(table_uri)
    if unknown := set(filter_columns) - set(columns.names):
        names = ", ".join(columns.names)
        raise ValueError(f"filter_columns: {', '.join(sorted(unknown))} is not in the table; it has {names}")
    schema = columns.with_metadata({"vladva": json.dumps(manifest.model), "vladva.corpus": manifest.corpus})
    rows_per_task = min(rows_per_file, ROWS_PER_TASK)
    per_task = max(1, len(manifest.files) * rows_per_task // max(1, manifest.num_rows))
    files = [storage.absolute(join(table_uri, file)) for file in manifest.files]
    written = collect(
        [
            submit(_write_fragments, files[i : i + per_task], kind, schema, index_uri, rows_per_file)
            for i in range(0, len(files), per_task)
        ]
    )
    fragments = [lance.FragmentMetadata.from_json(fragment) for one in written for fragment in one]
    if not fragments:
        raise ValueError(f"the table {table_uri} has no rows of kind {kind}")
    return lance.LanceDataset.commit(
        index_uri, lance.LanceOperation.Overwrite(schema, fragments), storage_options=lance_options()
    )


def _write_fragments(
    files: Sequence[str], kind: str, schema: pa.Schema, index_uri: str, rows_per_file: int
) -> list[str]:
    """Write the rows of some files of a table where the index is to be; what they become part of it with, as JSON."""
    import lance

    batches = (batch.cast(schema) for file in files for batch in rows_of_file(file, kind, schema))
    first = next((batch for batch in batches if len(batch)), None)
    if first is None:
        return []
    rows = pa.RecordBatchReader.from_batches(schema, itertools.chain([first], batches))
    fragments = lance.fragment.write_fragments(
        rows,
        index_uri,
        schema,
        mode="overwrite",
        max_rows_per_file=rows_per_file,
        storage_options=lance_options(),
    )
    return [json.dumps(fragment.to_json()) for fragment in fragments]


def cluster_nodes() -> int:
    """Nodes of the Ray cluster that this process has joined; 1 without one."""
    import ray

    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
