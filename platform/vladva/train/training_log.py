"""Training log: what is written of every optimizer step, by rank 0, and by every rank what it trained on."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING, Any

import torch

from vladva.config import RunConfig
from vladva.core.job_metrics import JobMetrics
from vladva.losses.contrastive import find_loss
from vladva.models.checkpoint import AsyncSaver
from vladva.train.audit_log import AuditLog
from vladva.train.tracking import Tracker

if TYPE_CHECKING:
    from vladva.models.batch import MicroBatch
    from vladva.train.grad_cache import StepLoss

SHOWN_IN_PROMETHEUS = ("loss", "in_batch_accuracy", "effective_negatives", "pairs_per_s")


class TrainingLog:
    """What rank 0 writes of a run: metrics and checkpoints. Other ranks only keep their part of the audit."""

    def __init__(self, config: RunConfig, rank: int, world: int, start: int) -> None:
        self.config = config
        self.loss = find_loss(config.loss)
        self.audit = AuditLog(config.uri, rank, world, start) if config.train.audit else None
        self.tracker: Tracker | None = None
        self.saver: AsyncSaver | None = None
        if rank == 0:
            chosen = config.tracking
            self.tracker = Tracker(
                config.uri, first_step=start, config=config.to_json(), mlflow=chosen.mlflow, wandb=chosen.wandb
            )
            self.metrics = JobMetrics(config.name)
            kept = config.train
            self.saver = AsyncSaver(config.uri, keep_last=kept.keep_last, keep_best=kept.keep_best or None)

    def step(
        self,
        step: int,
        losses: StepLoss,
        batch: list[MicroBatch],
        *,
        rate: float,
        norm: float,
        waited: float,
        seconds: float,
        scores: dict[str, float],
    ) -> None:
        """Log one optimizer step; `seconds` is its wall time, of which `waited` went on waiting for data."""
        if self.audit is not None:
            self.audit.step(step, batch)
        if self.tracker is None:
            return
        contrastive = losses.contrastive
        tokens = sum(int(chunk.image.lengths.sum() + chunk.text.lengths.sum()) for chunk in batch)
        next_token = losses.next_token.item()
        masked = self.config.loss.false_negatives_above
        scalars = dict(zip(self.loss.scalars(), losses.scalars, strict=True))
        values = {
            "loss": contrastive.loss.item() + self.config.loss.next_token_weight * next_token,
            "contrastive_loss": contrastive.loss.item(),
            **({"next_token_loss": next_token} if losses.caption_tokens else {}),
            **{name: value.item() for name, value in self.loss.figures(scalars).items()},
            "in_batch_accuracy": contrastive.accuracy.item(),
            "in_batch_recall_i2t": contrastive.image_recall.item(),
            "in_batch_recall_t2i": contrastive.text_recall.item(),
            "effective_negatives": contrastive.effective_negatives.item(),
            "duplicates": contrastive.duplicates.item(),
            **({} if masked is None else {"false_negatives": contrastive.false_negatives.item()}),
            "lr": rate,
            "grad_norm": norm,
            "pairs_per_s": self.config.train.global_batch / seconds,
            "pairs_per_s_per_worker": self.config.train.global_batch / seconds / self.config.cluster.workers,
            "tokens_per_s_per_worker": tokens / seconds,
            "data_wait_s": waited,
            "step_s": seconds,
            "peak_memory_gib": peak_memory() / 2**30,
            **scores,
        }
        self.tracker.log(step, values)
        self.metrics.set(
            {
                "vladva_train_step": step + 1,
                "vladva_train_wait_share": waited / seconds,
                **{f"vladva_train_{name}": values[name] for name in SHOWN_IN_PROMETHEUS},
            }
        )
        self.metrics.count({"vladva_train_pairs": self.config.train.global_batch})

    def flush(self) -> None:
        """Wait until the last checkpoint is where it belongs."""
        if self.saver is not None:
            self.saver.wait()

    def write_audit(self, steps: int) -> None:
        """Write what was trained on; for every rank to call before the checkpoint after `steps` steps."""
        if self.audit is not None:
            self.audit.write(steps)
            torch.distributed.barrier()  # the checkpoint may be published when all parts of its record are there

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.tracker is not None and self.saver is not None:
            self.saver.close()
            self.tracker.close()


def peak_memory() -> int:
    """Highest use of memory of this worker so far, in bytes: of the GPU, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
