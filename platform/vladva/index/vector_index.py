"""Index: embeddings table -> Lance data set that can be searched, changed and pinned.

    write the table's rows -> partition and quantise, if they are many -> index columns of filters -> measure -> tag

Every change makes a version; who has opened a version or a tag is never disturbed. Those of a build that is under way,
or that was interrupted, are not opened: the newest is the newest that is whole. searcher.py says how it is searched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from vladva.core import storage
from vladva.core.errors import FingerprintMismatch
from vladva.core.model_description import ModelDescription
from vladva.core.storage import join
from vladva.index.ivf import MEMORY_LIMIT, num_partitions, partition
from vladva.index.searcher import Searcher, SearchSettings, plain_errors
from vladva.index.store import Hit, VectorStore, check_rows
from vladva.index.tuning import TARGET_RECALL, sample_dataset, tune

if TYPE_CHECKING:
    import lance

__all__ = ["FingerprintMismatch", "Hit", "VectorIndex", "VectorStore", "open_index"]

RETRIES = 100  # of a writer that meets others
KEY = ["id", "kind"]


def open_index(uri: str, *, version: int | str | None = None, fingerprint: str | None = None) -> VectorIndex:
    """Open an index, at its newest version, a number, or a tag; `fingerprint` is that of the model to search with.

    Raises FingerprintMismatch for an index of another model, ValueError where there is no such index or version.
    """
    if not storage.exists(join(uri, "_versions")):
        raise ValueError(f"{uri} holds no index; build one with jobs/index.py")
    with plain_errors(None):
        dataset = newest_whole(uri) if version is None else open_dataset(uri, version)
    if dataset is None or not SearchSettings.are_kept(dataset):
        what = "holds an index" if version is None else f"holds a version {version}"
        raise ValueError(f"{uri} {what} whose build is not done; run jobs/index.py again if it was interrupted")
    index = VectorIndex(dataset)
    if fingerprint is not None:
        index.check(fingerprint)
    return index


class VectorIndex:
    """A version of an index. Searches see that version; changes are made to the newest, and seen from then on."""

    def __init__(self, dataset: lance.LanceDataset) -> None:
        self._open_version(dataset)

    def _open_version(self, dataset: lance.LanceDataset) -> None:
        self.dataset = dataset
        self.searcher = Searcher(dataset, SearchSettings.of(dataset))
        self.model: ModelDescription = json.loads(dataset.schema.metadata[b"vladva"])
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

    def search(
        self,
        vector: np.ndarray,
        k: int,
        filter: str | None = None,  # noqa: A002
        timeout_s: float | None = None,
    ) -> list[Hit]:
        """The k rows nearest to a vector [D] among those for which the SQL condition holds, best first.

        Raises ValueError for a vector of another dimension, k below 1, or a condition that cannot be evaluated;
        TimeoutError where the condition is still being evaluated after `timeout_s`.
        """
        return self.searcher.search(vector, k, filter, timeout_s)

    def warm(self, limit: int = MEMORY_LIMIT) -> None:
        """Read into memory what searches use: the vectors, unless they are more than so many bytes."""
        self.searcher.warm(limit)

    def _newest(self) -> lance.LanceDataset:
        """The newest version, to be changed, with what is in memory already. Raises ValueError during a build."""
        newest = open_dataset(self.dataset.uri, session=self.dataset.session())
        if not SearchSettings.are_kept(newest):
            raise ValueError(
                f"the index {self.dataset.uri} is being built anew, or that was interrupted: change it when "
                "jobs/index.py is done"
            )
        return newest

    def refresh(self) -> None:
        """See the newest version from now on."""
        if self.dataset.latest_version != self.version:
            newest = newest_whole(self.dataset.uri, self.dataset.session())
            if newest is not None and newest.version != self.version:
                self._open_version(newest)

    def upsert(self, rows: pa.Table) -> None:
        """Add rows (an embeddings table), in place of those with the same (id, kind). Raises FingerprintMismatch."""
        check_rows(rows, self.fingerprint, f"the index {self.dataset.uri}")
        newest = self._newest()
        fields = [field for field in newest.schema if field.name in rows.column_names]
        rows = rows.select([field.name for field in fields]).cast(pa.schema(fields))
        merge = newest.merge_insert(KEY).when_matched_update_all().when_not_matched_insert_all()
        merge.conflict_retries(RETRIES).execute(rows)
        self._open_version(newest)

    def delete(self, ids: Sequence[str]) -> int:
        """Remove the rows with these ids; returns how many there were."""
        newest = self._newest()
        gone = 0
        for first in range(0, len(ids), 1000):
            quoted = ", ".join("'" + one.replace("'", "''") + "'" for one in ids[first : first + 1000])
            gone += newest.delete(f"id IN ({quoted})", conflict_retries=RETRIES)["num_deleted_rows"]
        self._open_version(newest)
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
        tune(newest, settings, sample_dataset(newest), [None], TARGET_RECALL).keep(newest)
        self._open_version(newest)

    def tag(self, name: str) -> str:
        """Name this version, or give the name to it; readers open it by the name."""
        tags = self.dataset.tags
        (tags.update if name in tags.list() else tags.create)(name, self.version)
        return name


def open_dataset(
    uri: str, version: int | str | None = None, session: lance.Session | None = None
) -> lance.LanceDataset:
    import lance

    # Absolute: tasks of a cluster, which get the data set, have working directories of their own.
    return lance.dataset(storage.absolute(uri), version=version, storage_options=lance_options(), session=session)


def newest_whole(uri: str, session: lance.Session | None = None) -> lance.LanceDataset | None:
    """The newest version that is whole, not of a build under way or interrupted; None where there is none."""
    try:
        newest = open_dataset(uri, session=session)
    except ValueError:  # the folder of versions was made, and no version in it
        return None
    if SearchSettings.are_kept(newest):
        return newest
    for version in sorted((one["version"] for one in newest.versions()), reverse=True):
        older = open_dataset(uri, version, session)
        if SearchSettings.are_kept(older):
            return older
    return None


def lance_options() -> dict[str, str]:
    """What Lance does not take from the AWS variables by itself: that an endpoint may be without TLS."""
    return {"allow_http": "true"} if os.environ.get("AWS_ENDPOINT_URL", "").startswith("http://") else {}


def planned(dataset: lance.LanceDataset, settings: SearchSettings, workers: int) -> SearchSettings:
    """The settings once the data set is partitioned as planned; as they are where it has too few rows for that."""
    if settings.planned == "exact" or dataset.count_rows() < settings.exact_below:
        return settings
    partitions = partition(dataset, settings.planned, workers)
    return replace(settings, index_type=settings.planned, partitions=partitions)
