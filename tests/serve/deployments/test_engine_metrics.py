"""What an engine has done is counted once, however often it is told."""

from __future__ import annotations

from dataclasses import fields, replace

from serve.deployments.engine import EngineCounters, EngineLoad
from serve.deployments.engine_metrics import EngineMetrics


def test_counters_follow_the_engines() -> None:
    metrics = EngineMetrics({"model": "tiny", "fingerprint": "0123", "adapter": ""})
    assert metrics.counters.keys() == {field.name for field in fields(EngineCounters)}
    assert metrics.gauges.keys() | {"counters"} == {field.name for field in fields(EngineLoad)}
    added: list[float] = []
    metrics.counters["batches"].inc = lambda value, labels: added.append(value)
    load = EngineLoad(10, 2, 1, 3, 0.5, EngineCounters(batches=2))
    for done in (2, 2, 5):
        metrics.tell(replace(load, counters=EngineCounters(batches=done)))
    assert added == [2, 3]
