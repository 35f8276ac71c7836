"""Job metrics: figures of training and embedding for Prometheus, through Ray's metrics agent on every node.

Ray puts `ray_` before each name. cluster/grafana.json shows them.
What a run writes to its own folder does not need them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ray.util.metrics import Counter, Gauge

GAUGES = {
    "vladva_train_step": "Optimizer steps done",
    "vladva_train_loss": "Loss of the last step",
    "vladva_train_in_batch_accuracy": "Pairs whose own partner was the nearest, of the last step",
    "vladva_train_effective_negatives": "Negatives that count, on average, of the last step",
    "vladva_train_pairs_per_s": "Pairs a second, over all workers",
    "vladva_train_wait_share": "Share of the last step that was spent waiting for data",
}
COUNTERS = {
    "vladva_train_pairs": "Pairs trained on",
    "vladva_embed_items": "Items embedded",
    "vladva_embed_tokens": "Tokens of the items embedded",
    "vladva_embed_quarantined": "Items that could not be embedded",
}


class JobMetrics:
    """The gauges and counters of one job, with its name as the tag `job_name`. Needs a Ray that runs."""

    def __init__(self, job_name: str) -> None:
        self._tags = {"job_name": job_name}
        self._gauges: dict[str, Gauge] = {}
        self._counters: dict[str, Counter] = {}

    def set(self, values: Mapping[str, float | None]) -> None:
        """Set gauges; None, and what is not finite, leaves one as it is."""
        from ray.util.metrics import Gauge

        for name, value in values.items():
            if value is None or not math.isfinite(value):
                continue
            if name not in self._gauges:
                self._gauges[name] = Gauge(name, GAUGES[name], tuple(self._tags))
            self._gauges[name].set(value, self._tags)

    def count(self, amounts: Mapping[str, float]) -> None:
        """Add to counters."""
        from ray.util.metrics import Counter

        for name, amount in amounts.items():
            if name not in self._counters:
                self._counters[name] = Counter(name, COUNTERS[name], tuple(self._tags))
            if amount > 0:
                self._counters[name].inc(amount, self._tags)
