#!/usr/bin/env python
"""What Ray costs a training run: pairs/s of the whole loop over those of the bare step on batches in memory.

    tests/bench/loop_overhead.py [--steps 12]

The tiny LVLM's recipe with one worker on scenes: Ray Data reads and collates, Ray Train runs the worker, DeepSpeed the
step. The bare step is the same engine on the run's own chunks, read before, in a process of its own. Bare, loop, bare:
the last line is JSON with `loop_efficiency`, the median of both bare runs over the loop's median time from one logged
step to the next, which holds waiting for data and logging.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from vladva.config import ClusterConfig, RunConfig

WARM_UP = 3  # steps that are not counted


def config_of(folder: Path, steps: int) -> RunConfig:
    """The recipe `tiny` with one worker and nothing but steps."""
    from vladva.recipes import tiny

    recipe = tiny()
    return replace(
        recipe,
        name="loop",
        storage=str(folder / "runs"),
        data=replace(recipe.data, uri=str(folder / "scenes" / "train")),
        train=replace(recipe.train, steps=steps, checkpoint_every=10 * steps),
        cluster=ClusterConfig(workers=1, cpus_per_worker=1),
    )


def bare(config: RunConfig) -> list[float]:
    """Seconds of each step on chunks in memory, as the worker makes them."""
    import torch

    from vladva.train.data_loader import ChunkReader
    from vladva.train.setup import build_engine, make_backward

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    torch.set_num_threads(1)
    reader, size = ChunkReader(config), config.chunks_per_batch
    batches = [[reader(step * size + i) for i in range(size)] for step in range(config.train.steps)]
    engine, backward, seconds = build_engine(config, 0), make_backward(config), []
    for batch in batches:
        began = time.perf_counter()
        backward(engine, batch)
        engine.step(config.optim.lr)
        seconds.append(time.perf_counter() - began)
    return seconds


def bare_in_a_process(folder: Path, steps: int) -> list[float]:
    """The same, in a process without Ray."""
    command = [sys.executable, __file__, "--steps", str(steps), "--bare", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--bare", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(config_of(Path(options.bare), options.steps))))
        return

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from vladva.core.ray_tasks import connect
    from vladva.data.scenes.corpus import write_scenes
    from vladva.train.launch import train
    from vladva.train.preflight import check_data

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(str(folder / "scenes"), train=1_000, test=10, negatives=1)
        config = config_of(folder, options.steps)
        connect()
        check_data(config, print)
        before = bare_in_a_process(folder, options.steps)
        train(config)
        after = bare_in_a_process(folder, options.steps)
        events = EventAccumulator(f"{config.uri}/tensorboard").Reload()
        ends = [event.wall_time for event in events.Scalars("loss")]
        loop = [end - start for start, end in pairwise(ends)]
    medians = [statistics.median(seconds[WARM_UP:]) for seconds in (loop, before + after[WARM_UP:])]
    figures = {
        "loop_efficiency": medians[1] / medians[0],
        "loop_pairs_per_s": config.train.global_batch / medians[0],
        "bare_pairs_per_s": config.train.global_batch / medians[1],
    }
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
