"""Index: embeddings table -> Lance data set that can be searched, changed and pinned.

    write the table's rows -> partition and quantise, if they are many -> index columns of filters -> measure -> tag

Every change makes a version; who has opened a version or a tag is never disturbed. searches.py says how it is searched.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa

from vladva import storage
from vladva.hits import Hit, VectorStore, check_rows
from vladva.partitions import IN_MEMORY, IndexType, num_partitions, partition
from vladva.searches import (
    EFFORTS,
    EXACT_BELOW,
    NUM_QUERIES,
    WANTED,
    Searcher,
    SearchSettings,
    fit,
    plain_errors,
    queries_of,
    sample,
)
from vladva.storage import join
from vladva.tables import FingerprintMismatch, TableNote, open_table, sample_rows, stream_rows

if TYPE_CHECKING:
    import lance

__all__ = ["FingerprintMismatch", "Hit", "IndexSummary", "VectorIndex", "VectorStore", "build_index", "open_index"]

PARALLEL_FROM = 1_000_000  # rows from which on the whole cluster builds
MAX_WORKERS = 8  # each adds a little to the time of a search
RETRIES = 100  # of a writer that meets others
KEY = ["id", "kind"]


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
    recall: float = WANTED,
) -> IndexSummary:
    """Index the rows of one kind of a complete embeddings table; an index of the same model is built anew.

    exact_below: rows below which there is nothing but an exact search.
    filter_columns: carried columns that are often used in conditions.
    tag: name of this version; `v<version>` by default.
    replace: also in place of an index of another model.
    workers: Ray workers that build, each with all cores of its machine, at most MAX_WORKERS; by default one for each
        node of the cluster from PARALLEL_FROM rows on, else none.

    Raises FingerprintMismatch, and ValueError for a table without rows of the kind or with unknown columns.
    """
    began = time.monotonic()
    if index_type not in ("exact", *EFFORTS):
        raise ValueError(f"index_type is {index_type!r}; use one of exact, {', '.join(EFFORTS)}")
    note = open_table(table_uri)
    if storage.exists(join(index_uri, "_versions")) and not replace:
        open_index(index_uri, fingerprint=note.fingerprint)
    if workers is None:
        workers = cluster_nodes() if note.num_rows >= PARALLEL_FROM else 1
    workers = max(1, min(workers, MAX_WORKERS))
    dataset = _write(note, table_uri, index_uri, kind, filter_columns, -(-note.num_rows // workers))
    rows = dataset.count_rows()
    settings = planned(dataset, SearchSettings(planned=index_type, exact_below=exact_below), workers)
    dataset.create_scalar_index("kind", "BITMAP")
    for column in dict.fromkeys(["id", *filter_columns]):
        dataset.create_scalar_index(column, "BTREE")
    # Texts are what pictures will be asked for with, so both are tried, whichever are in the index.
    queries = queries_of(sample_rows(table_uri, 2 * NUM_QUERIES, seed=0))
    kinds = {None: rows} | {f"kind = '{one}'": dataset.count_rows(f"kind = '{one}'") for one in ("image", "text")}
    wheres = [where for where, count in kinds.items() if count and (where is None or count < rows)]
    settings = fit(dataset, settings, queries, wheres, recall)
    settings.keep(dataset)
    index = VectorIndex(dataset)
    return IndexSummary(
        uri=index_uri,
        version=index.version,
        tag=index.tag(tag or f"v{index.version}"),
        fingerprint=note.fingerprint,
        num_rows=rows,
        dimension=note.dimension,
        settings=settings,
        index_bytes=sum(one.total_size_bytes for one in dataset.describe_indices()),
        seconds=time.monotonic() - began,
    )


def open_index(uri: str, *, version: int | str | None = None, fingerprint: str | None = None) -> VectorIndex:
    """Open an index, at its newest version, a number, or a tag; `fingerprint` is that of the model to search with.

    Raises FingerprintMismatch for an index of another model, ValueError where there is no such index or version.
    """
    if not storage.exists(join(uri, "_versions")):
        raise ValueError(f"{uri} holds no index; build one with jobs/index.py")
    with plain_errors(None):
        index = VectorIndex(_open(uri, version))
    if fingerprint is not None:
        index.check(fingerprint)
    return index


class VectorIndex:
    """A version of an index. Searches see that version; changes are made to the newest, and seen from then on."""

    def __init__(self, dataset: lance.LanceDataset) -> None:
        self._see(dataset)

    def _see(self, dataset: lance.LanceDataset) -> None:
        self.dataset = dataset
        self.searcher = Searcher(dataset, SearchSettings.of(dataset))
        self.model: dict[str, Any] = json.loads(dataset.schema.metadata[b"vladva"])
        self.corpus = dataset.schema.metadata[b"vladva.corpus"].decode()

    @property
    def settings(self) -> SearchSettings:
        """How it is searched, and what recall was measured."""
        return self.searcher.settings

    @property
    def fingerprint(self) -> str:
        """Of the model that made the embeddings."""
        return self.model["fingerprint"]

    @property
    def dimension(self) -> int:
        """D."""
        return self.model["dimension"]

    @property
    def num_rows(self) -> int:
        """Rows that can be found."""
        return self.searcher.num_rows

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self.dataset.version

    def check(self, fingerprint: str) -> None:
        """Raises FingerprintMismatch for the fingerprint of another model, whose vectors would mean nothing here."""
        if fingerprint != self.fingerprint:
            hint = "search with the model it was made with, or embed and index again"
            raise FingerprintMismatch(f"the index {self.dataset.uri}", self.fingerprint, fingerprint, hint)

    def search(self, vector: np.ndarray, k: int, filter: str | None = None) -> list[Hit]:  # noqa: A002
        """The k rows nearest to a vector [D] among those for which the SQL condition holds, best first.

        Raises ValueError for a vector of another dimension, k below 1, or a condition that cannot be evaluated.
        """
        return self.searcher.search(vector, k, filter)

    def warm(self, most: int = IN_MEMORY) -> None:
        """Read into memory what searches use: the vectors, unless they are more than so many bytes."""
        self.searcher.warm(most)

    def _newest(self) -> lance.LanceDataset:
        """The newest version, with what is in memory of the index already."""
        return _open(self.dataset.uri, session=self.dataset.session())

    def refresh(self) -> None:
        """See the newest version from now on."""
        if self.dataset.latest_version != self.version:
            self._see(self._newest())

    def upsert(self, rows: pa.Table) -> None:
        """Add rows (an embeddings table), in place of those with the same (id, kind). Raises FingerprintMismatch."""
        check_rows(rows, self.fingerprint, f"the index {self.dataset.uri}")
        newest = self._newest()
        fields = [field for field in newest.schema if field.name in rows.column_names]
        rows = rows.select([field.name for field in fields]).cast(pa.schema(fields))
        merge = newest.merge_insert(KEY).when_matched_update_all().when_not_matched_insert_all()
        merge.conflict_retries(RETRIES).execute(rows)
        self._see(newest)

    def delete(self, ids: Sequence[str]) -> int:
        """Remove the rows with these ids; returns how many there were."""
        newest = self._newest()
        gone = 0
        for first in range(0, len(ids), 1000):
            quoted = ", ".join("'" + one.replace("'", "''") + "'" for one in ids[first : first + 1000])
            gone += newest.delete(f"id IN ({quoted})", conflict_retries=RETRIES)["num_deleted_rows"]
        self._see(newest)
        return gone

    def optimize(self) -> None:
        """Merge small files, take new rows into the partitions (or make them, of enough rows), and measure again."""
        newest = self._newest()
        settings = SearchSettings.of(newest)
        newest.optimize.compact_files()
        newest.optimize.optimize_indices(num_indices_to_merge=1)
        if settings.index_type != "exact":
            settings = replace(settings, partitions=num_partitions(newest))
        else:
            settings = planned(newest, settings, workers=1)
        fit(newest, settings, sample(newest), [None], WANTED).keep(newest)
        self._see(newest)

    def tag(self, name: str) -> str:
        """Name this version, or give the name to it; readers open it by the name."""
        tags = self.dataset.tags
        (tags.update if name in tags.list() else tags.create)(name, self.version)
        return name


def _open(uri: str, version: int | str | None = None, session: lance.Session | None = None) -> lance.LanceDataset:
    import lance

    return lance.dataset(uri, version=version, storage_options=_options(), session=session)


def _options() -> dict[str, str]:
    """What Lance does not take from the AWS variables by itself: that an endpoint may be without TLS."""
    return {"allow_http": "true"} if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://") else {}


def _write(
    note: TableNote, table_uri: str, index_uri: str, kind: str, filter_columns: Sequence[str], rows_per_file: int
) -> lance.LanceDataset:
    """The rows of the kind as a new version of the index; each worker will index a file."""
    import lance

    rows = stream_rows(table_uri, kind)
    if unknown := set(filter_columns) - set(rows.schema.names):
        names = ", ".join(rows.schema.names)
        raise ValueError(f"filter_columns: {', '.join(sorted(unknown))} is not in the table; it has {names}")
    first = next((batch for batch in rows if len(batch)), None)
    if first is None:
        raise ValueError(f"the table {table_uri} has no rows of kind {kind}")
    schema = rows.schema.with_metadata({"vladva": json.dumps(note.model), "vladva.corpus": note.corpus})
    batches = (batch.cast(schema) for batch in itertools.chain([first], rows))
    return lance.write_dataset(
        pa.RecordBatchReader.from_batches(schema, batches),
        index_uri,
        mode="overwrite",
        max_rows_per_file=rows_per_file,
        storage_options=_options(),
    )


def planned(dataset: lance.LanceDataset, settings: SearchSettings, workers: int) -> SearchSettings:
    """The settings once the data set is partitioned as planned; as they are where it has too few rows for that."""
    if settings.planned == "exact" or dataset.count_rows() < settings.exact_below:
        return settings
    partitions = partition(dataset, settings.planned, workers)
    return replace(settings, index_type=settings.planned, partitions=partitions)


def cluster_nodes() -> int:
    """Nodes of the Ray cluster that this process has joined; 1 without one."""
    import ray

    return sum(node["Alive"] for node in ray.nodes()) if ray.is_initialized() else 1
