"""Engine metrics: what a replica's engine is busy with and has done, for Prometheus, by way of Ray's metrics.

Told with every health check, every few seconds: the engine's own thread counts, and never waits for a metric. The model
and its fingerprint are labels, so that an update is seen.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from serve.deployments.engine import EngineLoad

LABELS = ("model", "fingerprint", "adapter")


class EngineMetrics:
    """Gauges of the load, and counters that follow the engine's."""

    def __init__(self, labels: dict[str, str]) -> None:
        from ray.util.metrics import Counter, Gauge

        def gauge(name: str, about: str) -> Gauge:
            return Gauge(f"vladva_{name}", about, LABELS)

        def counter(name: str, about: str) -> Counter:
            return Counter(f"vladva_{name}", about, LABELS)

        self.labels = labels
        self.gauges = {
            "queued_cost": gauge("queue_cost_tokens", "Cost of the items that wait, in tokens"),
            "queued_items": gauge("queue_items", "Items that wait to be embedded or scored"),
            "waiting": gauge("conversations_waiting", "Conversations that wait for a place"),
            "answering": gauge("conversations_answering", "Conversations that are being answered"),
            "wait_s": gauge("queue_wait_seconds", "How long an item that arrives now is expected to wait"),
        }
        self.counters = {
            "steps": counter("steps", "Steps of the engine"),
            "batches": counter("batches", "Batches of items"),
            "batch_items": counter("batch_items", "Items in them: over batches, the mean size of a batch"),
            "batch_cost": counter("batch_cost_tokens", "Cost of them, in tokens: over batches, that of a batch"),
            "prompt_tokens": counter("prompt_tokens", "Tokens of prompts that were read to be answered"),
            "answer_tokens": counter("answer_tokens", "Tokens of answers that were made"),
            "busy_s": counter("busy_seconds", "Time that the model was at work"),
            "refused": counter("refused", "Requests refused for want of time or memory"),
            "cancelled": counter("cancelled", "Requests whose caller had gone, or whose time was up"),
        }
        self.told = dict.fromkeys(self.counters, 0.0)

    def tell(self, load: "EngineLoad") -> None:
        """Set the gauges, and add to the counters what was done since the last time."""
        for name, gauge in self.gauges.items():
            gauge.set(getattr(load, name), self.labels)
        for name, counter in self.counters.items():
            done = float(getattr(load.counters, name))
            if done > self.told[name]:
                counter.inc(done - self.told[name], self.labels)
                self.told[name] = done
