"""EmbeddingActor: prepared batches -> parts of the embeddings table. The actor that holds the model."""

from __future__ import annotations

import json
import pickle
from threading import Semaphore
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from vladva.core.devices import assigned_device
from vladva.core.errors import FingerprintMismatch
from vladva.embed.batching import PreparedBatch
from vladva.embed.table_writer import write_part

if TYPE_CHECKING:
    from vladva.core.model_description import ModelDescription
    from vladva.models.batch import Pixels


class EmbeddingActor:
    """Ray Data stage: a row of (batch, report) -> the batch's part in the table, and the report with what was done.

    It is called with several batches at once, so that some are read and written while others are computed. Ray starts a
    killed actor again and gives it the batches that it had.
    """

    def __init__(self, load: dict[str, Any], uri: str, description: ModelDescription) -> None:
        device = assigned_device()

        from vladva.models.embedder import load_embedder

        self.embedder = load_embedder(**load, device=device)
        self.uri, self.description = uri, description
        self.width = self.embedder.dimension
        self.compute_slots = Semaphore(self.computed_at_once())
        if self.embedder.fingerprint != description["fingerprint"]:
            hint = "the model has changed since the job began: run it again"
            raise FingerprintMismatch(uri, description["fingerprint"], self.embedder.fingerprint, hint)

    def computed_at_once(self) -> int:
        """Two batches by the fast forward on a CPU, or its threads would wait for the last of each; else one."""
        from vladva.models.packed.inference import PackedInference

        return 2 if self.embedder.device.type == "cpu" and isinstance(self.embedder.forward, PackedInference) else 1

    def __call__(self, rows: pa.Table) -> pa.Table:
        """One row in, one row out: (report)."""
        (row,) = rows.to_pylist()
        report = json.loads(row["report"])
        if row["batch"] is not None:
            self.encode(pickle.loads(row["batch"]), report)
        return pa.table({"report": [json.dumps(report)]})

    def encode(self, batch: PreparedBatch, report: dict[str, Any]) -> None:
        """Embed a batch and write its part. If that fails, item by item: then only those that fail are left out."""
        with self.compute_slots:
            try:
                embeddings_ND = self.forward(batch.prompts, batch.pixels)
                reasons: list[str | None] = [None] * len(batch.items)
            except Exception:
                embeddings_ND, reasons = self.one_by_one(batch)
        finite = np.isfinite(embeddings_ND).all(axis=1)
        reasons = [r or (None if ok else "the embedding is not finite") for r, ok in zip(reasons, finite, strict=True)]
        good = np.array([reason is None for reason in reasons])
        if good.any():
            self.write(batch.items.filter(pa.array(good)), embeddings_ND[good])
        ids = batch.items.select(["id", "kind", "content"]).to_pylist()
        bad = [{**i, "content": i["content"].hex(), "reason": r} for i, r in zip(ids, reasons, strict=True) if r]
        lengths = [len(prompt) for prompt in batch.prompts]
        report["bad"] = report.get("bad", []) + bad
        embedded = int(good.sum())
        report |= {"embedded": embedded, "images": embedded if batch.pixels else 0, "tokens": sum(lengths)}

    def write(self, items: pa.Table, embeddings_ND: np.ndarray) -> None:
        """Write the batch's part."""
        write_part(self.uri, items, embeddings_ND, self.description)

    def forward(self, prompts: list[list[int]], pixels: list[Pixels] | None) -> np.ndarray:
        """Embeddings [N, D] of prepared items."""
        import torch

        from vladva.models.batch import Pixels, as_tensors

        tokens = as_tensors(self.embedder.preprocessor.pad([(prompt, []) for prompt in prompts]), self.embedder.device)
        images = None if pixels is None else as_tensors(Pixels.concatenate(pixels), self.embedder.device)
        with torch.inference_mode():
            return self.embedder.forward(tokens, images).cpu().numpy()

    def one_by_one(self, batch: PreparedBatch) -> tuple[np.ndarray, list[str | None]]:
        """Embeddings [N, D], and why an item has none (its row is then not a number)."""
        # A dual encoder may give an image several vectors: then its row is longer than those of texts.
        width = self.width * (getattr(self.embedder.preprocessor, "vectors", 1) if batch.pixels else 1)
        embeddings_ND = np.full((len(batch.items), width), np.nan, np.float32)
        reasons: list[str | None] = [None] * len(batch.items)
        for i, prompt in enumerate(batch.prompts):
            try:
                embeddings_ND[i] = self.forward([prompt], batch.pixels and [batch.pixels[i]])[0]
            except Exception as error:
                reasons[i] = f"the model failed on it: {type(error).__name__}: {error}"
        return embeddings_ND, reasons
