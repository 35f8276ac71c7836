#!/usr/bin/env python
"""What a long run costs before its first chunk, and while it goes on: `tests/bench/stream.py [--steps 60 1000000]`.

The stream of a run whose chunks hold next to nothing, read by two workers: seconds to the first chunk and memory of
Ray's processes (split coordinators, raylet, controller) after it, and after many chunks. A round of the short run and
one of the long run in turn. The last line is JSON:

    first_row_growth      seconds to the first chunk of the long run over those of the short one (medians)
    memory_growth         memory of Ray's processes after the first chunks, long run over short one (medians)
    memory_per_chunk_kib  what a chunk that is read leaves behind in them, from the second window on
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import uuid
from dataclasses import dataclass
from typing import Any

import psutil

from vladva.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.train import data_loader
from vladva.train.data_loader import CHUNKS_PER_TASK, ChunkStream

CHUNKS_PER_BATCH, WORKERS = 16, 2
RAY = ("SplitCoordinator", "_Dealer", "gcs_server", "raylet/raylet")


@dataclass(frozen=True)
class EmptyStream(ChunkStream):
    """The stream, whose tasks read nothing."""

    def window(self, number: int, dealer: int = 0) -> Any:
        """The same rows, made by tasks that read nothing."""
        import numpy as np

        from vladva.models.batch import MicroBatch, Tokens

        def stub(row: dict[str, Any], *, stream: Any, window: int, dealer: int) -> Any:
            import ray

            start, one = int(row["id"]) * CHUNKS_PER_TASK, np.ones(1, np.int64)
            tokens = Tokens(one[None], one, one)
            for number in ray.get(stream).chunk_numbers(window, dealer, range(start, start + CHUNKS_PER_TASK)):
                yield MicroBatch(number, ["id"], None, tokens, tokens, one, one > 0, one, one).to_row()

        data_loader.read_chunks_of_task = stub  # in the dealer's process alone
        return super().window(number, dealer)


def config_of(steps: int) -> RunConfig:
    """A run of so many steps; its data is never looked at."""
    train = TrainConfig(steps=steps, global_batch=8 * CHUNKS_PER_BATCH, chunk_size=8)
    return RunConfig(
        "stream", "/nowhere", ModelConfig("tiny"), DataConfig("/nowhere"), train, cluster=ClusterConfig(workers=WORKERS)
    )


def ray_memory() -> float:
    """MiB of this Ray's own processes."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if any(name in " ".join(process.cmdline()) for name in RAY):
                total += process.memory_full_info().uss
        except psutil.Error:
            continue
    return total / 2**20


def measure(steps: int, chunks: int) -> tuple[float, float, float]:
    """Seconds to the first row, MiB of Ray's processes a little later, MiB after `chunks` chunks of each worker."""
    import ray

    stream, name = EmptyStream(config_of(steps), 0, WORKERS), f"chunks-{uuid.uuid4()}"

    @ray.remote(num_cpus=0)
    class Worker:
        """Reads its share as a training worker does."""

        def __init__(self, name: str, rank: int) -> None:
            self.chunks = stream.share(name, rank, ahead=CHUNKS_PER_BATCH // WORKERS)
            self.expected = rank

        def take(self, count: int) -> None:
            for _ in range(count):
                assert next(self.chunks).number == self.expected, self.expected
                self.expected += WORKERS

    began = time.perf_counter()
    _dealer = stream.start(name)
    workers = [Worker.remote(name, rank) for rank in range(WORKERS)]
    ray.get([worker.take.remote(1) for worker in workers])
    first = time.perf_counter() - began
    ray.get([worker.take.remote(99) for worker in workers])
    early = ray_memory()
    if chunks <= 100:
        return first, early, early
    ray.get([worker.take.remote(chunks - 100) for worker in workers])
    return first, early, ray_memory()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs=2, default=(60, 1_000_000), help="of the short and the long run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunks", type=int, default=4_000, help="read by each worker in the last, long round")
    options = parser.parse_args()

    import ray

    ray.init("local", num_cpus=4, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    measure(options.steps[0], 100)  # processes that start for the first time
    found: dict[int, list[tuple[float, float, float]]] = {steps: [] for steps in options.steps}
    for number in range(options.rounds):
        for steps in options.steps:
            found[steps].append(measure(steps, 100))
            first, early, _ = found[steps][-1]
            print(f"round {number}: {steps:,} steps: first chunk after {first:.2f} s, {early:.0f} MiB", flush=True)
    quarter = options.chunks // 4
    _, _, some = measure(options.steps[1], quarter)
    _, _, many = measure(options.steps[1], options.chunks)
    short, long = (found[steps] for steps in options.steps)
    figures = {
        "first_row_growth": statistics.median(row[0] for row in long) / statistics.median(row[0] for row in short),
        "memory_growth": statistics.median(row[1] for row in long) / statistics.median(row[1] for row in short),
        "memory_per_chunk_kib": (many - some) * 1024 / (WORKERS * (options.chunks - quarter)),
        "first_row_s": statistics.median(row[0] for row in long),
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
