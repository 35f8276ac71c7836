"""EmbeddingActor: prepared batches -> parts of the embeddings table. The actor that holds the model."""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Sequence
from threading import Lock, Semaphore
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vladva.core.device_errors import is_device_error, is_out_of_memory
from vladva.core.devices import assigned_device
from vladva.core.errors import FingerprintMismatch, refusal
from vladva.embed.batching import PreparedBatch, reject
from vladva.embed.device_failures import TRIES, DeviceFailures
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableTarget

if TYPE_CHECKING:
    from vladva.models.batch import Pixels

logger = logging.getLogger(__name__)


class EmbeddingActor:
    """Ray Data stage: a row of (batch, report) -> the batch's part in the table, and the report with what was done.

    It is called with several batches at once, so that some are read and written while others are computed. Ray starts a
    killed actor again and gives it the batches that it had.

    Of what can fail, out of memory is a batch that is too big: it is halved, and counted. A broken device ends the
    process, for nothing computed after it can be trusted; Ray starts another, which is given the same batches. With any
    other failure the items are tried one by one, and those that fail alone are left out.
    """

    def __init__(self, load: dict[str, Any], target: TableTarget) -> None:
        device = assigned_device()

        from vladva.models.embedder import load_embedder

        self.embedder = load_embedder(**load, device=device)
        self.target = target
        self.width = self.embedder.dimension
        self.compute_slots = Semaphore(self.computed_at_once())
        self.failures = DeviceFailures(target.uri)
        self.lock = Lock()
        self.too_big: int | None = None  # cost of the smallest batch that found no memory
        if self.embedder.fingerprint != target.model["fingerprint"]:
            hint = "the model has changed since the job began: run it again"
            raise FingerprintMismatch(target.uri, target.model["fingerprint"], self.embedder.fingerprint, hint)

    def computed_at_once(self) -> int:
        """Two batches by the fast forward on a CPU, or its threads would wait for the last of each; else one."""
        from vladva.models.packed.inference import PackedInference

        return 2 if self.embedder.device.type == "cpu" and isinstance(self.embedder.forward, PackedInference) else 1

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One row in, one row out: (report)."""
        (row,) = rows.to_pylist()
        report = json.loads(row["report"])
        if row["batch"] is not None:
            try:
                self.encode(pickle.loads(row["batch"]), report)
            except OSError as error:
                if refusal(error) is None:
                    raise
                report["refused"] = str(error)  # what an actor raises comes to the driver as Ray's own
        return pa.table({"report": [json.dumps(report)]})

    def encode(self, batch: PreparedBatch, report: dict[str, Any]) -> None:
        """Embed a batch and write its part. If that fails, item by item: then only those that fail are left out."""
        reasons: list[str | None]
        with self.compute_slots:
            try:
                if self.failures.count(batch.name) >= TRIES:
                    embeddings_ND, reasons = self.one_by_one(batch)
                else:
                    embeddings_ND, halvings = self.in_pieces(batch, range(len(batch.items)))
                    reasons = [None] * len(batch.items)
                    report["halvings"] = halvings
            except Exception as error:
                self.end_if_broken(error, batch.name)
                embeddings_ND, reasons = self.one_by_one(batch)
        finite = np.isfinite(embeddings_ND).all(axis=1)
        reasons = [r or (None if ok else "the embedding is not finite") for r, ok in zip(reasons, finite, strict=True)]
        good = np.array([reason is None for reason in reasons])
        if good.any():
            self.write(batch.items.filter(pa.array(good)), embeddings_ND[good])
        ids = batch.items.select(["id", "kind", "content"]).to_pylist()
        bad = [{**item, "reason": reason} for item, reason in zip(ids, reasons, strict=True) if reason]
        reject(self.tables(), bad, report)
        embedded = int(good.sum())
        tokens = sum(len(prompt) for prompt in batch.prompts)
        report |= {"embedded": embedded, "images": embedded if batch.pixels else 0, "tokens": tokens}

    def tables(self) -> list[str]:
        """Where the tables are that the batches belong to."""
        return [self.target.uri]

    def write(self, items: pa.Table, embeddings_ND: np.ndarray) -> None:
        """Write the batch's part."""
        write_part(self.target.uri, items, embeddings_ND, self.target.model, self.target.stored_as)

    def forward(self, prompts: list[list[int]], pixels: list[Pixels] | None) -> np.ndarray:
        """Embeddings [N, D] of prepared items."""
        import torch

        from vladva.models.batch import Pixels, as_tensors

        tokens = as_tensors(self.embedder.preprocessor.pad([(prompt, []) for prompt in prompts]), self.embedder.device)
        images = None if pixels is None else as_tensors(Pixels.concatenate(pixels), self.embedder.device)
        with torch.inference_mode():
            return self.embedder.forward(tokens, images).cpu().numpy()

    def chosen(self, batch: PreparedBatch, items: Sequence[int]) -> np.ndarray:
        """Embeddings [N, D] of some items of a batch."""
        return self.forward([batch.prompts[i] for i in items], batch.pixels and [batch.pixels[i] for i in items])

    # --- what fails ---------------------------------------------------------------------------------------------------

    def in_pieces(self, batch: PreparedBatch, items: Sequence[int]) -> tuple[np.ndarray, int]:
        """Embeddings [N, D] of items of a batch, in halves where they do not fit the memory; how often it was halved.

        What has been too big once is halved before it is tried.
        """
        cost = len(items) * max(len(batch.prompts[i]) for i in items)
        if len(items) == 1 or self.too_big is None or cost < self.too_big:
            try:
                return self.chosen(batch, items), 0
            except Exception as error:
                if len(items) == 1 or not is_out_of_memory(error):
                    raise
                reason = str(error).splitlines()[0]
            # Outside of `except`, which would hold on to the failed pass's tensors.
            with self.lock:
                self.too_big = min(cost, self.too_big or cost)
            logger.warning("out of memory with %d items of %d tokens: halved (%s)", len(items), cost, reason)
            self.free_memory()
        middle = len(items) // 2
        (first_ND, halved), (second_ND, halved_too) = (
            self.in_pieces(batch, part) for part in (items[:middle], items[middle:])
        )
        return np.concatenate([first_ND, second_ND]), 1 + halved + halved_too

    def free_memory(self) -> None:
        """Give back what torch keeps of the device's memory."""
        import torch

        if self.embedder.device.type == "cuda":
            torch.cuda.empty_cache()

    def end_if_broken(self, error: Exception, what: str) -> None:
        """End this process where an error says that its device is broken, and note what it was computing."""
        if is_device_error(error):
            self.failures.note(what, error)
            logger.error("the device fails, so this actor ends and another begins: %s", error)
            logging.shutdown()
            os._exit(1)  # not an exception, which would be the job's; not `exit_actor`, after which Ray starts none

    def one_by_one(self, batch: PreparedBatch) -> tuple[np.ndarray, list[str | None]]:
        """Embeddings [N, D], and why an item has none (its row is then not a number)."""
        # A dual encoder may give an image several vectors: then its row is longer than those of texts.
        width = self.width * (getattr(self.embedder.preprocessor, "vectors", 1) if batch.pixels else 1)
        embeddings_ND = np.full((len(batch.items), width), np.nan, np.float32)
        reasons: list[str | None] = [None] * len(batch.items)
        for i in range(len(batch.items)):
            name = f"{batch.name}-{i}"
            if self.failures.count(name) >= TRIES:
                reasons[i] = f"the device fails on it: {self.failures.reason(name)}"
                continue
            try:
                embeddings_ND[i] = self.chosen(batch, [i])[0]
            except Exception as error:
                self.end_if_broken(error, name)
                reasons[i] = f"the model failed on it: {type(error).__name__}: {error}"
        return embeddings_ND, reasons
