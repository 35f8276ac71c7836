"""Embedding a corpus: items -> embeddings table, by a pool of actors that hold the model.

    items --CPU tasks (batching.py)--> batches --actors (actor.py)--> parts --driver (table_writer.py)--> table

The actor that has embedded a batch writes it, so a killed driver, actor or node costs the batches under way. The next
run with the same arguments leaves out every (id, kind) that has an embedding. Items of like length share a batch, so
that little is padded; equal texts and images are embedded once, wherever in the corpus they are.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

import numpy as np

from vladva.core import storage
from vladva.core.model_description import ModelDescription
from vladva.core.progress import Progress
from vladva.core.ray_tasks import actor_pool
from vladva.embed.actor import EmbeddingActor
from vladva.embed.batching import WINDOW, BatchingConfig, ContentDeduplicator, count_done, make_batches
from vladva.embed.table import read_embeddings
from vladva.embed.table_writer import TableWriter
from vladva.models.resolve import describe, pin

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

__all__ = ["EncodeSummary", "encode", "read_embeddings"]

MANY_BAD = 100  # bad items below which a run goes on, whatever fraction they are


@dataclass(frozen=True)
class EncodeSummary:
    """What one run did: items = embedded + repeated + skipped + quarantined."""

    items: int
    embedded: int
    repeated: int  # the same text or image as another item, whose embedding they got
    skipped: int  # had an embedding before
    quarantined: int
    rows: int  # in the table
    tokens: int
    seconds: float
    items_per_s: float  # embedded, from start to end
    tokens_per_s: float
    fingerprint: str
    dimension: int


def encode(
    items: ray.data.Dataset,
    model: str,
    out_uri: str | Mapping[int | None, str],
    *,
    adapter: bool = True,
    actors: int | tuple[int, int] = 2,
    batch_size: int = 64,
    dtype: str = "float32",
    cpus_per_actor: int = 1,
    gpus_per_actor: float = 0,
    read_images: Callable[[pa.Table], list[bytes]] | None = None,
    corpus: str = "",
    total: int | None = None,
    max_bad_fraction: float = 0.05,
) -> EncodeSummary:
    """Embed `items` into the table at `out_uri`, or go on with it; needs a Ray cluster.

    out_uri: the table; or layer -> its table, for several layers of the model in one pass.
    items: columns id, kind ("image" or "text"), image (bytes; null for texts), text (null for images); all but
        `image` are carried into the table, which holds each (id, kind) once.
    actors: how many hold the model, or the (least, most) of a pool that grows and shrinks with the load.
    read_images: gives the bytes of images whose `image` is null.
    corpus: noted in the table: where the images can be found again.
    total: number of items, for the time left.

    What cannot be embedded is in `_quarantine.parquet`, with the reason. Raises ValueError for more than
    `max_bad_fraction` (and MANY_BAD) of that, and FingerprintMismatch where another model made the table.
    """
    import ray
    from ray.data.dataset import MaterializedDataset

    model = pin(model)
    uris: dict[int | None, str] = {None: out_uri} if isinstance(out_uri, str) else {**out_uri}
    described = {layer: describe(model, adapter=adapter, dtype=dtype, layer=layer) for layer in uris}
    tables = {layer: TableWriter(storage.absolute(uris[layer]), described[layer][1], corpus) for layer in uris}
    items.context.enable_progress_bars = False
    unfinished = lacking(items, tables) if len(tables) > 1 else tables
    done = ray.put(done_in_all((unfinished or tables).values()))
    run = Run(max_bad_fraction)
    left = None
    if all(table.begun for table in tables.values()):  # what is left is worth a look, before any model is loaded
        run.counts["skipped"], left = count_done(items, done)
    elif isinstance(items, MaterializedDataset):
        total = items.count()
    if left != 0:
        owners: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ContentDeduplicator).remote()
        places = {layer: (table.uri, described[layer][1]) for layer, table in unfinished.items()}
        config = next(iter(described.values()))[0]
        settings = BatchingConfig(
            config, tuple(uri for uri, _ in places.values()), batch_size, read_images, done, owners
        )
        load = {"model": model, "adapter": adapter, "merge": adapter, "dtype": dtype}
        batches = items.map_batches(
            make_batches,  # type: ignore[arg-type]  # Ray's signature forgets keyword arguments
            batch_size=WINDOW,
            batch_format="pyarrow",
            fn_kwargs={"settings": settings},
        ).repartition(target_num_rows_per_block=1)
        reports = batches.map_batches(
            encoder_for(places),
            fn_constructor_args=(load, *places.get(None, (places,))),
            batch_size=1,
            batch_format="pyarrow",
            compute=actor_pool(actors, cpus_per_actor, gpus_per_actor),
            num_cpus=cpus_per_actor,
            num_gpus=gpus_per_actor,
        )
        with Progress("embedding", total if left is None else left) as progress:
            for row in reports.iter_rows():
                progress.advance(run.add(json.loads(row["report"])), run.figures)
        ray.kill(owners)
    for layer, table in tables.items():
        rows, quarantine = table.commit(run.bad if layer in unfinished else [])
        if not rows:
            raise ValueError(f"nothing was embedded: {quarantine[0]['reason'] if quarantine else 'there are no items'}")
    return run.summary(rows, len(quarantine), described[layer][1])


def encoder_for(places: Mapping[int | None, Any]) -> type[EmbeddingActor]:
    """The stage that fills one table, or one for each layer."""
    if None in places:
        return EmbeddingActor
    from vladva.embed.layers_actor import LayersEmbeddingActor

    return LayersEmbeddingActor


def lacking(items: ray.data.Dataset, tables: Mapping[int | None, TableWriter]) -> dict[int | None, TableWriter]:
    """The tables that do not have all items yet: a layer that is complete need not be computed again."""
    import ray

    return {
        layer: table
        for layer, table in tables.items()
        if not table.begun or count_done(items, ray.put(table.done()))[1]
    }


def done_in_all(tables: Iterable[TableWriter]) -> tuple[np.ndarray, np.ndarray]:
    """What `TableWriter.done` gives, of the items that every one of the tables has."""
    keys, contents = zip(*(table.done() for table in tables), strict=True)
    return reduce(np.intersect1d, keys), reduce(np.intersect1d, contents)


class Run:
    """Counts of a run, from the reports of its batches."""

    def __init__(self, max_bad_fraction: float) -> None:
        self.counts = dict.fromkeys(("embedded", "images", "repeated", "skipped", "tokens"), 0)
        self.bad: list[dict[str, Any]] = []
        self.max_bad_fraction = max_bad_fraction
        self.began = time.monotonic()

    def add(self, report: dict[str, Any]) -> int:
        """Count a report; returns how many items it settles. Raises ValueError where too many are bad."""
        before = self.items
        for name in self.counts:
            self.counts[name] += report.get(name, 0)
        for bad in report.get("bad", []):
            self.bad.append({**bad, "content": bytes.fromhex(bad["content"]) if bad["content"] else None})
        if len(self.bad) > max(MANY_BAD, self.max_bad_fraction * self.items):
            raise ValueError(
                f"{len(self.bad):,} of {self.items:,} items cannot be embedded, more than max_bad_fraction "
                f"{self.max_bad_fraction} allows; the last is {self.bad[-1]['id']}: {self.bad[-1]['reason']}"
            )
        return self.items - before

    @property
    def items(self) -> int:
        """Items that are settled."""
        return sum(self.counts[name] for name in ("embedded", "repeated", "skipped")) + len(self.bad)

    @property
    def figures(self) -> str:
        """For the line of progress."""
        images, embedded, tokens = (self.counts[name] for name in ("images", "embedded", "tokens"))
        seconds = time.monotonic() - self.began
        speeds = {"images": images, "texts": embedded - images, "tokens": tokens}
        told = [f"{number / seconds:,.1f} {name}/s" for name, number in speeds.items() if number]
        return "  ".join([*told, f"{len(self.bad)} quarantined"] if self.bad else told)

    def summary(self, rows: int, quarantined: int, description: ModelDescription) -> EncodeSummary:
        """Of the whole run: repeats of bad items are bad too, which only the end shows."""
        seconds = time.monotonic() - self.began
        counts = self.counts
        return EncodeSummary(
            items=self.items,
            embedded=counts["embedded"],
            repeated=counts["repeated"] - (quarantined - len(self.bad)),
            skipped=counts["skipped"],
            quarantined=quarantined,
            rows=rows,
            tokens=counts["tokens"],
            seconds=seconds,
            items_per_s=counts["embedded"] / seconds,
            tokens_per_s=counts["tokens"] / seconds,
            fingerprint=description["fingerprint"],
            dimension=description["dimension"],
        )
