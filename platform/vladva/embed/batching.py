"""Batching: some thousand items of a corpus -> batches ready for the model, on CPUs.

    leave out what is done -> find equal contents -> tokenise -> sort by length -> cut -> decode

A task makes the batches of one window, one after the other, while actors embed the first of them (`pipeline.py`).
An item is of the kind `text`, `image` or `image+text`, with an `instruction` where the items have such a column.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from vladva.config import ModelConfig
from vladva.core.hashing import digest
from vladva.core.ray_tasks import FEEDER_CPUS
from vladva.core.text import clean_text
from vladva.embed.known_items import KnownItems
from vladva.embed.source_items import REJECTED
from vladva.embed.table import CONTENT, keys_of
from vladva.embed.table_parts import write_rejected_items, write_repeats
from vladva.models.batch import cut
from vladva.models.resolve import preprocessor_of

if TYPE_CHECKING:
    import ray.data

    from vladva.models.batch import Pixels
    from vladva.models.interface import InputPreprocessor

MIXED = "image+text"  # the kind of an item whose vector is of both
WINDOW = 2048  # items that are sorted by length together
IMAGES_AT_ONCE = 256  # of them, images that are in memory together


@dataclass(frozen=True)
class BatchingConfig:
    """What the tasks of one run share."""

    config: ModelConfig
    uris: tuple[str, ...]  # of the tables
    batch_size: int
    read_images: Callable[[pa.Table], list[bytes]] | None
    known: KnownItems


@dataclass(frozen=True)
class PreparedBatch:
    """A batch of one kind: items (without `image`, with `content`), their prompts, and pixels of each image."""

    items: pa.Table
    prompts: list[list[int]]
    pixels: list[Pixels] | None

    @property
    def name(self) -> str:
        """The same for the same items."""
        return digest(*keys_of(self.items)).hex()


def count_done(items: ray.data.Dataset, known: KnownItems) -> tuple[int, int]:
    """How many of the items have an embedding, and how many have none."""
    counts = items.map_batches(
        _count_done,  # type: ignore[arg-type]  # Ray's signature forgets keyword arguments
        batch_size=WINDOW,
        batch_format="pyarrow",
        fn_kwargs={"known": known},
        num_cpus=FEEDER_CPUS,
    )
    done = left = 0
    for row in counts.iter_rows():
        done, left = done + row["done"], left + row["left"]
    return done, left


def _count_done(items: pa.Table, *, known: KnownItems) -> pa.Table:
    found = int(known.are_done(items).sum())
    return pa.table({"done": [found], "left": [len(items) - found]})


def make_batches(items: pa.Table, *, settings: BatchingConfig) -> Iterator[pa.Table]:
    """One window: rows of (batch: a pickled PreparedBatch or null, report: JSON of what happened to other items)."""
    if "image" not in items.column_names:
        items = items.append_column("image", pa.nulls(len(items), pa.binary()))
    fresh = items.filter(pa.array(~settings.known.are_done(items)))
    if "cleaned" in fresh.column_names:
        cleaned = pc.sum(fresh["cleaned"]).as_py() or 0
        fresh = fresh.drop_columns(["cleaned"])
        if cleaned:
            yield _row(None, settings, cleaned=cleaned)
    kinds = ("text", WINDOW, _texts), ("image", IMAGES_AT_ONCE, _images), (MIXED, IMAGES_AT_ONCE, _images)
    for kind, size, prepare in kinds:
        rows = fresh.filter(pc.equal(fresh["kind"], kind))
        for first in range(0, len(rows), size):
            yield from prepare(rows.slice(first, size), settings)
    strange = fresh.filter(pc.invert(pc.is_in(fresh["kind"], pa.array([kind for kind, _, _ in kinds]))))
    if len(strange):
        yield _row(None, settings, [{**item, "reason": _why_not(item)} for item in strange.to_pylist()])


def _why_not(item: dict[str, Any]) -> str:
    return item["text"] if item["kind"] == REJECTED else f"kind is neither image nor text nor {MIXED}"


def _texts(rows: pa.Table, settings: BatchingConfig) -> Iterator[pa.Table]:
    preprocessor = preprocessor_of(settings.config)
    texts = rows["text"].to_pylist()
    rows, texts, bad = _without(
        rows.drop_columns(["image"]), texts, [None if clean_text(text or "") else "the text is empty" for text in texts]
    )
    rows, texts, repeated = _first_of_content(rows, texts, settings)
    prompts, reasons = _attempt(
        lambda item: _fitting(preprocessor, "text", preprocessor.item_prompt(item[0], instruction=item[1])),
        list(zip(texts, _column(rows, "instruction"), strict=True)),
    )
    rows, prompts, more = _without(rows, prompts, reasons)
    yield _row(None, settings, bad + more, repeated)
    for chosen in cut([len(prompt) for prompt in prompts], settings.batch_size):
        yield _row(PreparedBatch(rows.take(chosen), [prompts[i] for i in chosen], None), settings)


def _images(rows: pa.Table, settings: BatchingConfig) -> Iterator[pa.Table]:
    preprocessor = preprocessor_of(settings.config)
    images, reasons = _read(rows, settings.read_images)
    words = _words_beside_images(rows)
    reasons = [
        reason or (None if text is None or clean_text(text) else "the text is empty")
        for reason, text in zip(reasons, words, strict=True)
    ]
    rows, images, bad = _without(rows.drop_columns(["image"]), images, reasons)
    rows, images, repeated = _first_of_content(rows, images, settings)
    prompts, reasons = _attempt(
        lambda item: _fitting(preprocessor, "image", preprocessor.item_prompt(item[1], _size(item[0]), item[2])),
        list(zip(images, _words_beside_images(rows), _column(rows, "instruction"), strict=True)),
    )
    rows, pairs, more = _without(rows, list(zip(images, prompts, strict=True)), reasons)
    yield _row(None, settings, bad + more, repeated)
    for chosen in cut([len(prompt) for _, prompt in pairs], settings.batch_size):
        pixels, reasons = _attempt(lambda image: _pixels(preprocessor, image), [pairs[i][0] for i in chosen])
        decoded = list(zip(pixels, [pairs[i][1] for i in chosen], strict=True))
        batch, decoded, bad = _without(rows.take(chosen), decoded, reasons)
        prepared = PreparedBatch(batch, [prompt for _, prompt in decoded], [pixel for pixel, _ in decoded])
        yield _row(prepared if decoded else None, settings, bad)


def _first_of_content(rows: pa.Table, payloads: list[Any], settings: BatchingConfig) -> tuple[pa.Table, list[Any], int]:
    """The rows that are to be embedded, with the column `content`; rows that another serves are noted and counted."""
    kinds, words = rows["kind"].to_pylist(), zip(_words_beside_images(rows), _column(rows, "instruction"), strict=True)
    beside = [[] if pair == (None, None) else [text or "" for text in pair] for pair in words]
    contents = [digest(kind, payload, *more) for kind, payload, more in zip(kinds, payloads, beside, strict=True)]
    rows = rows.append_column("content", pa.array(contents, CONTENT))
    first_N = settings.known.claim(contents, rows)
    repeats = rows.filter(pa.array(~first_N))
    if len(repeats):
        for uri in settings.uris:
            write_repeats(uri, repeats)
    return rows.filter(pa.array(first_N)), [payloads[i] for i in np.flatnonzero(first_N)], len(repeats)


def _column(rows: pa.Table, name: str) -> list[Any]:
    """The values of a column that need not be there."""
    return rows[name].to_pylist() if name in rows.column_names else [None] * len(rows)


def _words_beside_images(rows: pa.Table) -> list[str | None]:
    """The text that is embedded together with each image; None of what is of one kind."""
    kinds = rows["kind"].to_pylist()
    return [(text or "") if kind == MIXED else None for kind, text in zip(kinds, _column(rows, "text"), strict=True)]


def _read(rows: pa.Table, read_images: Callable[[pa.Table], list[bytes]] | None) -> tuple[list[Any], list[str | None]]:
    """The bytes of each image, and why there are none."""
    images = rows["image"].to_pylist()
    away = [i for i, image in enumerate(images) if image is None]
    if not away or read_images is None:
        return images, [None if image else "there are no bytes" for image in images]
    try:
        bodies: list[Any] = read_images(rows.take(away))
        reasons: list[str | None] = [None] * len(away)
    except (OSError, ValueError):  # one of them: find out which
        bodies, reasons = _attempt(lambda i: read_images(rows.slice(i, 1))[0], away)
    every: list[str | None] = [None] * len(images)
    for i, body, reason in zip(away, bodies, reasons, strict=True):
        images[i], every[i] = body, reason
    return images, every


def _size(image: bytes) -> tuple[int, int]:
    """(width, height) as the decoded image will have them: upright, from the header alone."""
    from vladva.core.images import check_image

    facts = check_image(image, verify=False)
    return facts.width, facts.height


def _fitting(preprocessor: InputPreprocessor, what: str, prompt: list[int]) -> list[int]:
    """The prompt. Raises ValueError where the model's context is too short for it."""
    limit = preprocessor.config.get_text_config().max_position_embeddings
    if len(prompt) > limit:
        raise ValueError(f"the {what} has {len(prompt)} tokens with its prompt; the model takes {limit}")
    return prompt


def _pixels(preprocessor: InputPreprocessor, image: bytes) -> Pixels:
    from vladva.core.images import decode_image

    return preprocessor.pixels([decode_image(image)])


def _attempt(function: Callable[[Any], Any], values: Sequence[Any]) -> tuple[list[Any], list[str | None]]:
    """`function` of each value, and why there is none; one bad value does not spoil the others."""
    results: list[Any] = []
    reasons: list[str | None] = []
    for value in values:
        try:
            result, reason = function(value), None
        except ValueError as error:
            result, reason = None, str(error)
        except Exception as error:
            result, reason = None, f"{type(error).__name__}: {error}"
        results.append(result)
        reasons.append(reason)
    return results, reasons


def _without(
    rows: pa.Table, values: list[Any], reasons: Sequence[str | None]
) -> tuple[pa.Table, list[Any], list[dict[str, Any]]]:
    """Rows and values for which there is no reason against, and the others as rejected items."""
    good = [reason is None for reason in reasons]
    items = rows.select([name for name in ("id", "kind", "content") if name in rows.column_names])
    bad = [{**items.slice(i, 1).to_pylist()[0], "reason": reason} for i, reason in enumerate(reasons) if reason]
    return rows.filter(pa.array(good, pa.bool_())), [v for v, ok in zip(values, good, strict=True) if ok], bad


def _row(
    batch: PreparedBatch | None,
    settings: BatchingConfig,
    bad: Sequence[dict[str, Any]] = (),
    repeated: int = 0,
    cleaned: int = 0,
) -> pa.Table:
    data = None if batch is None else pickle.dumps(batch, protocol=5)
    report: dict[str, Any] = {"repeated": repeated, "cleaned": cleaned}
    reject(settings.uris, bad, report)
    return pa.table({"batch": pa.array([data], pa.large_binary()), "report": [json.dumps(report)]})


def reject(uris: Sequence[str], bad: Sequence[dict[str, Any]], report: dict[str, Any]) -> None:
    """Note items (id, kind, content where there is one, reason) in every table; the report says how many, and the last.

    A run may have many, so they are not in the report itself.
    """
    if bad:
        rows = [{name: item.get(name) for name in ("id", "kind", "content", "reason")} for item in bad]
        for uri in uris:
            write_rejected_items(uri, rows)
        report["bad"] = report.get("bad", 0) + len(bad)
        report["last_bad"] = f"{bad[-1]['id']}: {bad[-1]['reason']}"
