"""Embedding a corpus: items -> embeddings table, by a pool of actors that hold the model.

    items --CPU tasks (batching.py)--> batches --actors (actor.py)--> parts --tasks (commit.py)--> table

The actor that has embedded a batch writes it, so a killed driver, actor or node costs the batches under way. The next
run with the same arguments leaves out every (id, kind) that has an embedding. Items of like length share a batch, so
that little is padded; equal texts and images are embedded once, wherever in the corpus they are. The driver counts and
holds references: neither keys nor rows pass through it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vladva.core import storage
from vladva.core.errors import StorageRefusedError
from vladva.core.job_metrics import JobMetrics
from vladva.core.model_description import ModelDescription
from vladva.core.progress import Progress
from vladva.core.ray_tasks import FEEDER_CPUS, actor_cpus, actor_pool, feeder_pool, in_single_rows
from vladva.embed.actor import EmbeddingActor
from vladva.embed.batching import WINDOW, BatchingConfig, count_done, make_batches
from vladva.embed.known_items import KnownItems, known_in_all, partitions_for
from vladva.embed.stored_vectors import StoredAs
from vladva.embed.table import read_embeddings
from vladva.embed.table_writer import TableTarget, TableWriter
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
    cleaned: int  # captions that lost marks or control characters, of those embedded now
    halvings: int  # how often a batch was halved, because there was no memory for all of it
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
    stored_as: StoredAs | None = None,
) -> EncodeSummary:
    """Embed `items` into the table at `out_uri`, or go on with it; needs a Ray cluster.

    out_uri: the table; or layer -> its table, for several layers of the model in one pass.
    items: columns id, kind ("image" or "text"), image (bytes; null for texts), text (null for images); all but
        `image` and `cleaned` (a number that is summed up) are carried into the table, which holds each (id, kind) once.
    actors: how many hold the model, or the (least, most) of a pool that grows and shrinks with the load.
    read_images: gives the bytes of images whose `image` is null.
    corpus: noted in the table: where the images can be found again.
    total: number of items, for the time left.
    stored_as: type of the stored numbers: of a new table float32 by default, else what the table has.

    What cannot be embedded is in `_quarantine.parquet`, with the reason. Raises ValueError for more than
    `max_bad_fraction` (and MANY_BAD) of that, and FingerprintMismatch where another model made the table. Where the
    storage refuses to be written to, what is there is kept, and the next run goes on with it.
    """
    from ray.data.dataset import MaterializedDataset

    model = pin(model)
    uris: dict[int | None, str] = {None: out_uri} if isinstance(out_uri, str) else {**out_uri}
    described = {layer: describe(model, adapter=adapter, dtype=dtype, layer=layer) for layer in uris}
    items.context.enable_progress_bars = False
    run = Run(max_bad_fraction)
    tables = {
        layer: TableWriter(storage.absolute(uri), described[layer][1], corpus, stored_as) for layer, uri in uris.items()
    }
    if isinstance(items, MaterializedDataset):
        total = items.count()
    unfinished = lacking(items, tables, total) if len(tables) > 1 else tables
    known = what_is_known(unfinished or tables, total)
    try:
        left = None
        if all(table.begun for table in tables.values()):  # what is left is worth a look, before any model is loaded
            run.counts["skipped"], left = count_done(items, known)
        if left != 0:
            targets = {layer: table.target for layer, table in unfinished.items()}
            config = next(iter(described.values()))[0]
            batching = BatchingConfig(
                config, tuple(target.uri for target in targets.values()), batch_size, read_images, known
            )
            load = {"model": model, "adapter": adapter, "merge": adapter, "dtype": dtype}
            pool = Pool(load, targets, actors, cpus_per_actor, gpus_per_actor)
            metrics = JobMetrics(storage.absolute(next(iter(uris.values()))))
            with Progress("embedding", total if left is None else left) as progress:
                for report in reports_of(items, batching, pool):
                    progress.advance(run.add(report), run.figures)
                    metrics.count(
                        {
                            "vladva_embed_items": report.get("embedded", 0),
                            "vladva_embed_tokens": report.get("tokens", 0),
                            "vladva_embed_quarantined": report.get("bad", 0),
                        }
                    )
    finally:
        known.stop()
    for layer, table in tables.items():
        committed = table.commit()
        if not table.manifest.num_rows:
            raise ValueError(f"nothing was embedded: {committed.first_reason or 'there are no items'}")
        run.quarantined = max(run.quarantined, committed.num_rejected) if layer in unfinished else run.quarantined
    return run.summary(table.manifest.num_rows, described[layer][1])


@dataclass(frozen=True)
class Pool:
    """What the actors load, fill and are given."""

    load: Mapping[str, Any]
    targets: Mapping[int | None, TableTarget]
    actors: int | tuple[int, int]
    cpus_per_actor: int
    gpus_per_actor: float


def reports_of(items: ray.data.Dataset, batching: BatchingConfig, pool: Pool) -> Iterator[dict[str, Any]]:
    """The reports of all batches, as they are embedded and written."""
    feeders = feeder_pool(pool.actors, pool.cpus_per_actor)
    batches = items.map_batches(
        make_batches,  # type: ignore[arg-type]  # Ray's signature forgets keyword arguments
        batch_size=WINDOW,
        batch_format="pyarrow",
        fn_kwargs={"settings": batching},
        num_cpus=FEEDER_CPUS,
        compute=feeders,
    )
    whole = pool.targets.get(None)
    reports = in_single_rows(batches, feeders).map_batches(
        encoder_for(pool.targets),
        fn_constructor_args=(dict(pool.load), whole or dict(pool.targets)),
        batch_size=1,
        batch_format="pyarrow",
        compute=actor_pool(pool.actors, pool.cpus_per_actor, pool.gpus_per_actor),
        num_cpus=actor_cpus(pool.cpus_per_actor),
        num_gpus=pool.gpus_per_actor,
    )
    for row in reports.iter_rows():
        yield json.loads(row["report"])


def encoder_for(places: Mapping[int | None, Any]) -> type[EmbeddingActor]:
    """The stage that fills one table, or one for each layer."""
    if None in places:
        return EmbeddingActor
    from vladva.embed.layers_actor import LayersEmbeddingActor

    return LayersEmbeddingActor


def what_is_known(tables: Mapping[int | None, TableWriter], total: int | None) -> KnownItems:
    """What every one of the tables has."""
    return KnownItems.start(known_in_all([table.groups() for table in tables.values()], partitions_for(total)))


def lacking(
    items: ray.data.Dataset, tables: Mapping[int | None, TableWriter], total: int | None
) -> dict[int | None, TableWriter]:
    """The tables that do not have all items yet: a layer that is complete need not be computed again."""
    found = {}
    for layer, table in tables.items():
        if table.begun:
            known = what_is_known({layer: table}, total)
            _, left = count_done(items, known)
            known.stop()
        if not table.begun or left:
            found[layer] = table
    return found


class Run:
    """Counts of a run, from the reports of its batches."""

    def __init__(self, max_bad_fraction: float) -> None:
        names = ("embedded", "images", "repeated", "skipped", "tokens", "bad", "cleaned", "halvings")
        self.counts = dict.fromkeys(names, 0)
        self.last_bad = ""
        self.quarantined = 0  # in the end: repeats of bad items are bad too
        self.max_bad_fraction = max_bad_fraction
        self.began = time.monotonic()

    def add(self, report: Mapping[str, Any]) -> int:
        """Count a report; returns how many items it settles. Raises ValueError where too many are bad.

        Raises StorageRefusedError where the table cannot be written.
        """
        if "refused" in report:
            raise StorageRefusedError(report["refused"])
        before = self.items
        for name in self.counts:
            self.counts[name] += report.get(name, 0)
        self.last_bad = report.get("last_bad", self.last_bad)
        bad = self.counts["bad"]
        if bad > max(MANY_BAD, self.max_bad_fraction * self.items):
            raise ValueError(
                f"{bad:,} of {self.items:,} items cannot be embedded, more than max_bad_fraction "
                f"{self.max_bad_fraction} allows; the last is {self.last_bad}"
            )
        return self.items - before

    @property
    def items(self) -> int:
        """Items that are settled."""
        return sum(self.counts[name] for name in ("embedded", "repeated", "skipped", "bad"))

    @property
    def figures(self) -> str:
        """For the line of progress."""
        images, embedded, tokens = (self.counts[name] for name in ("images", "embedded", "tokens"))
        seconds = time.monotonic() - self.began
        speeds = {"images": images, "texts": embedded - images, "tokens": tokens}
        told = [f"{number / seconds:,.1f} {name}/s" for name, number in speeds.items() if number]
        told += [f"{self.counts['bad']} quarantined"] if self.counts["bad"] else []
        told += [f"out of memory: halved {self.counts['halvings']} times"] if self.counts["halvings"] else []
        return "  ".join(told)

    def summary(self, rows: int, description: ModelDescription) -> EncodeSummary:
        """Of the whole run: repeats of bad items are bad too, which only the end shows."""
        seconds = time.monotonic() - self.began
        counts = self.counts
        return EncodeSummary(
            items=self.items,
            embedded=counts["embedded"],
            repeated=counts["repeated"] - (self.quarantined - counts["bad"]),
            skipped=counts["skipped"],
            quarantined=self.quarantined,
            cleaned=counts["cleaned"],
            halvings=counts["halvings"],
            rows=rows,
            tokens=counts["tokens"],
            seconds=seconds,
            items_per_s=counts["embedded"] / seconds,
            tokens_per_s=counts["tokens"] / seconds,
            fingerprint=description["fingerprint"],
            dimension=description["dimension"],
        )
