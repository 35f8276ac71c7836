"""Benchmark embeddings: the texts and images of benchmarks -> one model's vectors of them, by text and image.

Each is embedded once, whatever number of benchmarks asks for it, by the batch job (`embed/pipeline.py`). The vectors
stay in a folder named after the model's exact contents, where the next evaluation finds them.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha1
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vladva.benchmarks.benchmark import AsksMixed, Result, Task
from vladva.core.model_description import ModelDescription
from vladva.core.storage import exists, join
from vladva.data.image_refs import ImageRef, read_images
from vladva.embed.batching import MIXED
from vladva.embed.table import read_embeddings, read_rows

KINDS = ("text", "image")
BLOCK_ROWS = 1024  # items per Ray Data block
ITEMS = pa.schema(
    [
        ("id", pa.string()),
        ("kind", pa.string()),
        ("image", pa.binary()),
        ("text", pa.string()),
        ("name", pa.string()),
        ("uri", pa.string()),
        ("offset", pa.int64()),
        ("length", pa.int64()),
        ("column", pa.string()),
        ("crc32", pa.int64()),
    ]
)


class Embedded(NamedTuple):
    """Where the embeddings of one model are, by layer; `layer` is its own."""

    layer: int | None  # None: a dual encoder has no choice
    tables: dict[int | None, str]
    num_items: int
    num_embedded: int  # of them; the others had been embedded before


def embed(
    model: str, tasks: Mapping[str, Task], out_uri: str, *, dtype: str, layers: Sequence[int] = (), **resources: Any
) -> Embedded:
    """Embed all texts and images of the tasks that have not been embedded with this model before."""
    import ray

    from vladva.embed.pipeline import encode
    from vladva.models.dual_encoders import is_dual_encoder
    from vladva.models.resolve import describe, pin

    model = pin(model)
    config, description = describe(model, adapter=True, dtype=dtype)
    own = description["layer"]
    tables = {}
    for layer in [own, *sorted({*layers} - {own}, reverse=True)]:
        _, description = describe(model, adapter=True, dtype=dtype, layer=layer)
        tables[layer] = join(out_uri, "embeddings", f"{description['fingerprint']}-{dtype}")
    rows = items(tasks.values(), mixed=not is_dual_encoder(config.checkpoint))
    pieces = {tables[own]: rows} if not layers else {None: rows}
    if description.get("vectors_per_image", 1) > 1:
        pieces = {join(tables[own], kind): rows.filter(pc.equal(rows["kind"], kind)) for kind in KINDS}
    num_embedded = 0
    for uri, piece in pieces.items():
        blocks = [piece.slice(first, BLOCK_ROWS) for first in range(0, len(piece), BLOCK_ROWS)]
        summary = encode(
            ray.data.from_arrow(blocks),
            model,
            uri or tables,
            dtype=dtype,
            read_images=read_image_bytes,
            total=len(piece),
            **resources,
        )
        num_embedded += summary.embedded
    return Embedded(own, tables, num_items=len(rows), num_embedded=num_embedded)


def items(tasks: Iterable[Task], *, mixed: bool = False) -> pa.Table:
    """Every distinct text and image as a row for `encode`; of images, where `image_bytes` finds them.

    mixed: also the queries of an image with words.
    """
    texts: dict[str, str] = {}
    images: dict[str, ImageRef] = {}
    queries: dict[str, tuple[ImageRef, str]] = {}
    for task in tasks:
        texts |= {text_id(text): text for text in task.texts}
        images |= {image.id: image for image in task.images}
        if mixed and isinstance(task, AsksMixed):
            asked = [(task.images[image], task.texts[text]) for image, text in task.mixed]
            queries |= {mixed_id(*query): query for query in asked}
    rows = [{"id": item, "kind": "text", "text": text} for item, text in texts.items()]
    rows += [{"kind": "image", **image._asdict()} for image in images.values()]
    rows += [
        {"kind": MIXED, "text": text, **image._replace(id=item)._asdict()} for item, (image, text) in queries.items()
    ]
    return pa.Table.from_pylist(rows, schema=ITEMS)


def read_image_bytes(rows: pa.Table) -> list[bytes]:
    """Encoded bytes of the images in rows of `items`."""
    return read_images([ImageRef(**row) for row in rows.select(ImageRef._fields).to_pylist()])


def text_id(text: str) -> str:
    """A text is known by its contents."""
    return f"text/{sha1(text.encode()).hexdigest()}"


def mixed_id(image: ImageRef, text: str) -> str:
    """An image with words is known by both."""
    return f"{image.id} with {text_id(text)}"


class Embeddings:
    """The embeddings of one model, by text and image."""

    def __init__(self, table: pa.Table, quarantine: Mapping[str, str]) -> None:
        self.row = {item: row for row, item in enumerate(table["id"].to_pylist())}
        values = table["embedding"].combine_chunks()
        self.matrix = values.flatten().to_numpy(zero_copy_only=False).reshape(len(table), -1)
        self.quarantine = quarantine
        self.description: ModelDescription = json.loads(table.schema.metadata[b"vladva"])

    def score(self, task: Task) -> Result:
        """The model's result in a benchmark."""
        texts, images = self.of_texts(task.texts), self.of_images(task.images)
        if not isinstance(task, AsksMixed) or self.description["layer"] is None:  # a dual encoder has no such vectors
            return task.score(texts, images)
        asked = [mixed_id(task.images[image], task.texts[text]) for image, text in task.mixed]
        return task.score_mixed(texts, images, self._rows(asked))

    def of_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Rows [T, D] of the texts, in their order."""
        return self._rows([text_id(text) for text in texts])

    def of_images(self, images: Iterable[ImageRef]) -> np.ndarray:
        """Rows [I, D] of the images, in their order."""
        return self._rows([image.id for image in images])

    def _rows(self, ids: list[str]) -> np.ndarray:
        missing = [item for item in ids if item not in self.row]
        if missing:
            reason = self.quarantine.get(missing[0], "no reason recorded")
            raise ValueError(
                f"{len(missing)} of {len(ids)} items of a benchmark could not be embedded; the first is {missing[0]} "
                f"({reason}). Scores on the others would not be comparable: repair the data and run again"
            )
        return self.matrix[[self.row[item] for item in ids]]


class SeveralVectors(Embeddings):
    """The embeddings of a model whose images have P vectors each (BLIP-2): longer rows, in a table of their own."""

    def __init__(self, texts: Embeddings, images: Embeddings) -> None:
        self.texts, self.images, self.description = texts, images, texts.description

    def of_texts(self, texts: Iterable[str]) -> np.ndarray:
        """Rows [T, D] of the texts, in their order."""
        return self.texts.of_texts(texts)

    def of_images(self, images: Iterable[ImageRef]) -> np.ndarray:
        """Rows [I, P, D] of the images, in their order."""
        rows = self.images.of_images(images)
        return rows.reshape(len(rows), self.description["vectors_per_image"], -1)


def open_embeddings(uri: str) -> Embeddings:
    """What `embed` left at `uri`."""
    if exists(join(uri, "text")):
        return SeveralVectors(*(open_embeddings(join(uri, kind)) for kind in KINDS))
    return Embeddings(read_embeddings(uri), _read_quarantine(uri))


def _read_quarantine(table_uri: str) -> dict[str, str]:
    uri = join(table_uri, "_quarantine.parquet")
    if not exists(uri):
        return {}
    table = read_rows(uri)
    return dict(zip(table["id"].to_pylist(), table["reason"].to_pylist(), strict=True))
