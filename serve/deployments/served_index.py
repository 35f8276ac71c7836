"""Index: the index that the application was started with, as a replica searches and changes it.

Without a version in the request or the configuration, a search sees the newest version there is, whoever wrote it. With
a tag or number in the configuration the replica stays there, and changes are seen by those who ask for their version.
"""

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from serve.config import ServeArgs
from serve.protocol.errors import REPLICA_OUTDATED, Failure

if TYPE_CHECKING:
    import pyarrow as pa

    from vladva.index.vector_index import Hit, VectorIndex

T = TypeVar("T")

logger = logging.getLogger("ray.serve")

OPEN_VERSIONS = 8
SEARCH_THREADS = 4
FILTER_S = 10.0  # a condition that takes longer is given up
NO_IMAGE = Failure(404, "the index knows no image that can be read under this id", "image_not_found", "id")
INDEX_UNAVAILABLE = Failure(
    503, "the index cannot be read or written at the moment; try again later", "index_unavailable"
)


@dataclass(frozen=True)
class Found:
    """Hits, best first, from one version of the index; the model that searched; tokens that the query took."""

    hits: list[dict[str, Any]]
    version: int
    fingerprint: str
    tokens: int = 0


@dataclass(frozen=True)
class IndexEntry:
    """A row to write, without its embedding: key, and values of the columns that the index carries."""

    id: str
    kind: str
    columns: dict[str, JsonValue]


@dataclass(frozen=True)
class Changed:
    """The version in which the change is to be seen, rows written or removed; the model; tokens of embedding them."""

    version: int
    count: int
    fingerprint: str
    tokens: int = 0


class ServedIndex:
    """The index of one model. Methods return a `Failure` for what they refuse."""

    def __init__(self, args: ServeArgs, model: dict[str, Any]) -> None:
        self.args = args
        self.model = model
        self.fingerprint: str = model["fingerprint"]
        self.search_threads = ThreadPoolExecutor(SEARCH_THREADS)  # a slow filter leaves the others free
        self.write_thread = ThreadPoolExecutor(1)  # a writer that meets others waits; searches do not
        # A version that is open stays as it is; the newest (None) is refreshed.
        self.version = lru_cache(OPEN_VERSIONS)(self.open)
        self.written = lru_cache(1)(partial(self.open, warm=False))

    def open(self, version: int | str | None = None, warm: bool = True) -> "VectorIndex":
        """The index at a version or tag; None is the newest."""
        from vladva.index.vector_index import open_index

        assert self.args.index is not None  # `refusing` has seen to it
        index = open_index(self.args.index, version=version, fingerprint=self.model["fingerprint"])
        if warm:
            # The vectors of one version only: there may be memory for them, but not for those of all that are open.
            index.warm(self.args.index_memory if version == self.args.index_version else 0)
        return index

    def search(self, vector: np.ndarray, k: int, where: str | None, version: int | str | None) -> Found | Failure:
        """The k rows nearest to a vector [D]."""
        version = self.args.index_version if version is None else version

        def hits() -> Found:
            index = self.version(version)
            if version is None:
                index.refresh()
            return Found(
                [hit_object(hit) for hit in index.search(vector, k, filter=where)], index.version, self.fingerprint
            )

        return self.refusing(hits)

    def thumbnail(self, name: str, size: int) -> bytes | Failure:
        """A JPEG, at most `size` pixels wide and high, of the image with this id, read where it was embedded from."""
        from vladva.core.images import decode_image
        from vladva.embed.corpus import PLACE, read_item_images

        if self.args.index is None:
            return REPLICA_OUTDATED
        try:
            index = self.version(self.args.index_version)
            columns = [column for column in PLACE if column in index.dataset.schema.names]
            quoted = name.replace("'", "''")
            rows = index.dataset.to_table(columns=columns, filter=f"id = '{quoted}' AND kind = 'image'", limit=1)
            [place] = rows.to_pylist() or [{}]
            if not place.get("shard"):
                return NO_IMAGE
            [data] = read_item_images(index.corpus, [{column: place.get(column) for column in PLACE}])
            image = decode_image(data, self.args.max_image_pixels)
        except (OSError, ValueError):  # the corpus has moved, or is not for this machine to read
            logger.info("the image of %r cannot be read", name, exc_info=True)
            return NO_IMAGE
        image.thumbnail((size, size))
        jpeg = io.BytesIO()
        image.save(jpeg, "JPEG", quality=85)
        return jpeg.getvalue()

    def upsert(self, entries: Sequence[IndexEntry], vectors_ND: np.ndarray) -> Changed | Failure:
        """Write rows, in place of those with the same id and kind."""

        def write() -> Changed:
            index = self.written()
            index.upsert(rows_of(entries, vectors_ND, index, self.model))
            return Changed(index.version, len(entries), self.fingerprint)

        return self.refusing(write)

    def delete(self, ids: Sequence[str]) -> Changed | Failure:
        """Remove the rows with these ids."""

        def remove() -> Changed:
            index = self.written()
            count = index.delete(ids)
            return Changed(index.version, count, self.fingerprint)

        return self.refusing(remove)

    def refusing(self, work: Callable[[], T]) -> T | Failure:
        """The result of the work, or why there is none."""
        from vladva.index.vector_index import FingerprintMismatch

        if self.args.index is None:
            return REPLICA_OUTDATED
        try:
            return work()
        except ValueError as error:
            message = str(error).replace(
                self.args.index, self.args.index_name or ""
            )  # where it lies is nobody's business
            if isinstance(error, FingerprintMismatch):
                return Failure(409, message, "fingerprint_mismatch")
            return Failure(422, message, "invalid_value")
        except TimeoutError:
            return Failure(
                422, f"filter: not evaluated within {FILTER_S:g} s; send a simpler one", "invalid_value", "filter"
            )
        except OSError:  # storage fails, or others wrote at the same time again and again
            logger.exception("the index cannot be used")
            return INDEX_UNAVAILABLE


def repeated(keys: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """A key that stands there twice."""
    key, count = Counter(keys).most_common(1)[0]
    return key if count > 1 else None


def rows_of(
    entries: Sequence[IndexEntry], vectors_ND: np.ndarray, index: "VectorIndex", model: dict[str, Any]
) -> "pa.Table":
    """The rows as the index holds them. Raises ValueError naming the column that it does not have or cannot hold."""
    import pyarrow as pa

    fields = [field for field in index.dataset.schema if field.name not in ("id", "kind", "embedding")]
    names = [field.name for field in fields]
    embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors_ND.astype(np.float32).ravel()), index.dimension)
    columns: dict[str, Any] = {
        "id": [entry.id for entry in entries],
        "kind": [entry.kind for entry in entries],
        "embedding": embedding,
    }
    for i, entry in enumerate(entries):
        if unknown := set(entry.columns) - set(names):
            have = ", ".join(names) or "none"
            raise ValueError(f"items[{i}].columns: the index has no {sorted(unknown)[0]!r}; it carries {have}")
    for field in fields:
        try:
            columns[field.name] = pa.array([entry.columns.get(field.name) for entry in entries], field.type)
        except (pa.ArrowException, OverflowError, TypeError) as error:
            raise ValueError(f"items: the column {field.name!r} holds {field.type}: {error}") from None
    return pa.table(columns).replace_schema_metadata({"vladva": json.dumps(model)})


def hit_object(hit: "Hit") -> dict[str, Any]:
    """A hit with the columns that JSON can hold."""
    columns = {name: value for name, value in hit.columns.items() if not isinstance(value, bytes)}
    columns = to_jsonable_python(columns, inf_nan_mode="null")
    return {"id": hit.id, "score": float(hit.score), "columns": columns}
