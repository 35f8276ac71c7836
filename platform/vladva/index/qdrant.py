"""Qdrant: embeddings of one model in a collection of a Qdrant server (`pip install vladva[qdrant]`).

    client = QdrantClient("http://localhost:6333")
    store = fill(client, "images", read_embeddings(TABLE))     # once
    store = QdrantStore(client, "images")                      # from then on

It is a VectorStore as Lance's index is, without versions to go back to. Of SQL it takes conditions on columns
(qdrant_filter.py) and refuses the rest.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vladva.core.model_description import ModelDescription
from vladva.embed.table import embedding_matrix
from vladva.index.qdrant_filter import qdrant_filter
from vladva.index.store import Hit, check_query, check_rows, to_hit

if TYPE_CHECKING:
    from qdrant_client import QdrantClient

BATCH = 256  # rows of one request


def fill(client: QdrantClient, collection: str, rows: pa.Table) -> QdrantStore:
    """A new collection with the rows of an embeddings table, as read_embeddings gives them."""
    from qdrant_client import models

    model = json.loads(rows.schema.metadata[b"vladva"])
    vectors = models.VectorParams(size=model["dimension"], distance=models.Distance.COSINE)
    columns = [name for name in rows.column_names if name not in ("embedding", "content")]
    metadata = {"model": model, "columns": columns, "version": 0}
    client.create_collection(collection, vectors_config=vectors, metadata=metadata)
    store = QdrantStore(client, collection)
    store.upsert(rows)
    return store


class QdrantStore:
    """A collection; what it says of itself is in the collection's metadata. See VectorStore."""

    def __init__(self, client: QdrantClient, collection: str) -> None:
        self.client = client
        self.collection = collection
        metadata = self._metadata()
        self.model: ModelDescription = metadata["model"]
        self.columns: list[str] = metadata["columns"]

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
        return self.client.count(self.collection, exact=True).count

    @property
    def version(self) -> int:
        """Grows with every change."""
        return self._metadata()["version"]

    def search(self, vector: np.ndarray, k: int, filter: str | None = None) -> list[Hit]:  # noqa: A002
        """See VectorStore. Raises ValueError also for SQL that is no condition on a column."""
        query_D = check_query(vector, k, self.dimension)
        condition = None if filter is None else qdrant_filter(filter, self.columns)
        found = self.client.query_points(self.collection, query_D.tolist(), query_filter=condition, limit=k)
        return [to_hit(point.payload or {}, float(point.score)) for point in found.points]

    def upsert(self, rows: pa.Table) -> None:
        """See VectorStore."""
        from qdrant_client import models

        check_rows(rows, self.fingerprint, f"the collection {self.collection}")
        matrix_ND = embedding_matrix(rows)
        for first in range(0, len(rows), BATCH):
            part = rows.slice(first, BATCH).select([name for name in self.columns if name in rows.column_names])
            points = [
                models.PointStruct(id=point_id(row["id"], row["kind"]), vector=vector.tolist(), payload=row)
                for row, vector in zip(part.to_pylist(), matrix_ND[first : first + BATCH], strict=True)
            ]
            self.client.upsert(self.collection, points, wait=True)
        self._changed()

    def delete(self, ids: Sequence[str]) -> int:
        """See VectorStore."""
        from qdrant_client import models

        chosen = models.Filter(must=[models.FieldCondition(key="id", match=models.MatchAny(any=list(ids)))])
        count = self.client.count(self.collection, count_filter=chosen, exact=True).count
        self.client.delete(self.collection, models.FilterSelector(filter=chosen), wait=True)
        self._changed()
        return count

    def optimize(self) -> None:
        """See VectorStore; the server does so by itself."""

    def _metadata(self) -> dict[str, Any]:
        """What `fill` noted. Raises ValueError for a collection of somebody else's."""
        metadata = self.client.get_collection(self.collection).config.metadata
        if not metadata or "model" not in metadata:
            raise ValueError(f"the collection {self.collection} was not made by vladva; make one with `fill`")
        return metadata

    def _changed(self) -> None:
        self.client.update_collection(self.collection, metadata={"version": self.version + 1})


def point_id(key: str, kind: str) -> str:
    """The id that Qdrant knows a row by; it takes only numbers and UUIDs."""
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{kind}:{key}"))
