#!/usr/bin/env python
"""Embedding ten thousand, a hundred thousand and a million items: does the driver's memory stay what it is?

    tests/bench/scale.py                              all three sizes
    tests/bench/scale.py --sizes 1000,10000           a try

The job as it is (a text file of short lines, equal ones among them, two actors, a table, an index), but for the model:
one that makes vectors of 16 numbers from the token ids, so that what is measured is everything around it. While the
largest corpus is embedded the driver gets SIGKILL, when a third is done, and Ray goes down with it; then the same
command is given again. Memory is the driver's highest resident set, of the killed one too; the same process then builds
the index, and its highest until that is done is told apart.

The last line is JSON: `driver_rss_growth` of embedding, the largest size over the one before it (goal: at most 1.1);
`index_driver_rss_growth` and `us_per_item_growth`, of the whole job, likewise; `each_id_once`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet as pq

from vladva.core.model_description import ModelDescription
from vladva.embed import pipeline
from vladva.embed.actor import EmbeddingActor
from vladva.embed.table_writer import TableTarget

WIDTH = 16
EQUAL = 10  # one line in so many is like the one before it
NAMES = {
    "driver_mib": "MiB of the driver",
    "index_driver_mib": "of the driver that has indexed",
    "us_per_item": "us an item",
    "index_s": "s to index",
}


class FastActor(EmbeddingActor):
    """The actor, with vectors made from the token ids in place of a model."""

    def __init__(self, load: Mapping[str, Any], target: TableTarget) -> None:
        from threading import Lock, Semaphore
        from types import SimpleNamespace

        from vladva.embed.device_failures import DeviceFailures

        self.target, self.width, self.too_big = target, WIDTH, None
        self.compute_slots, self.lock = Semaphore(1), Lock()
        self.failures = DeviceFailures(target.uri)
        self.embedder: Any = SimpleNamespace(preprocessor=None)

    def forward(self, prompts: list[list[int]], pixels: Any) -> np.ndarray:
        """Unit vectors [N, D]: which tokens there are, weighed by their places."""
        lengths = np.array([len(prompt) for prompt in prompts])
        ids = np.concatenate([np.array(prompt, np.int64) for prompt in prompts])
        places = np.arange(len(ids)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
        weights = np.sin((ids[:, None] + 1) * (np.arange(WIDTH) + 1) * 0.37 + places[:, None])
        vectors_ND = np.add.reduceat(weights, np.cumsum(lengths) - lengths)
        return (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)


def write_corpus(path: Path, count: int) -> None:
    """Lines of a few words; every tenth is like the one before it."""
    with path.open("w") as file:
        for number in range(count):
            file.write(f"a line with the number {number - (number % EQUAL == EQUAL - 1)}\n")


def embed(corpus: str, out: str) -> dict[str, float]:
    """The job in this process; its figures."""
    from vladva.core import ray_tasks
    from vladva.embed.corpus import open_corpus
    from vladva.index.build import build_index
    from vladva.models import resolve

    describe = resolve.describe

    def described(*arguments: Any, **options: Any) -> tuple[Any, ModelDescription]:
        config, description = describe(*arguments, **options)
        return config, {**description, "dimension": WIDTH}

    pipeline.describe, pipeline.encoder_for = described, lambda targets: FastActor
    ray_tasks.connect()
    began = time.monotonic()
    items = open_corpus(corpus, ["text"])
    summary = pipeline.encode(items.items, "tiny", out, batch_size=512, corpus=items.uri, total=items.num_items)
    embedded, highest = time.monotonic(), peak_mib()
    index = build_index(out, f"{out}-index", kind="text", index_type="exact")
    return {
        "driver_mib": highest,
        "index_driver_mib": peak_mib(),
        "us_per_item": 1e6 * (embedded - began) / summary.items,
        "rows": summary.rows,
        "repeated": summary.repeated,
        "skipped": summary.skipped,
        "indexed": index.num_rows,
        "index_s": time.monotonic() - embedded,
    }


def peak_mib() -> float:
    """The highest resident set that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def run(corpus: Path, out: Path, kill_at: int = 0) -> dict[str, float]:
    """The job in a process of its own; with `kill_at`, killed when so many items are done, and given again."""
    command = [sys.executable, __file__, "--one", str(corpus), str(out)]
    peak = 0.0
    if kill_at:
        job = psutil.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
        while rows_in_parts(out) < kill_at:
            if job.poll() is not None:
                raise SystemExit("the job ended before it could be killed")
            peak = max(peak, job.memory_info().rss / 2**20)
            time.sleep(0.5)
        children = job.children(recursive=True)
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        psutil.wait_procs(children, timeout=60)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout.splitlines()[-1])
    return figures | {name: max(figures[name], peak) for name in ("driver_mib", "index_driver_mib")}


def rows_in_parts(out: Path) -> int:
    rows = 0
    for part in (out / "_parts").rglob("*.parquet"):
        rows += pq.read_metadata(part).num_rows
    return rows


def each_id_once(out: Path, count: int) -> bool:
    """Whether the table has every line once, and lines that are equal have equal embeddings."""
    files = [out / name for name in json.loads((out / "_table.json").read_text())["files"]]
    seen = np.zeros(count, np.int32)
    firsts = np.zeros((count, WIDTH), np.float32)
    for file in files:
        table = pq.read_table(file, columns=["id", "embedding"])
        numbers = np.array([int(name.rpartition("#")[2]) for name in table["id"].to_pylist()])
        np.add.at(seen, numbers, 1)
        firsts[numbers] = table["embedding"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH)
    again = np.arange(EQUAL - 1, count, EQUAL)
    return bool((seen == 1).all() and (firsts[again] == firsts[again - 1]).all())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="10000,100000,1000000")
    parser.add_argument("--one", nargs=2, metavar=("CORPUS", "OUT"), help="what is measured: the job in this process")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(embed(*options.one)))
        return
    sizes = [int(size) for size in options.sizes.split(",")]
    found: dict[int, dict[str, float]] = {}
    once = True
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            corpus, out = Path(folder, "texts.txt"), Path(folder, "table")
            write_corpus(corpus, size)
            found[size] = run(corpus, out, kill_at=size // 3 if size == sizes[-1] else 0)
            once &= each_id_once(out, size) and found[size]["indexed"] == size
        told = "  ".join(f"{found[size][name]:,.1f} {words}" for name, words in NAMES.items())
        print(f"{size:>10,} items  {told}", flush=True)
    last, before = found[sizes[-1]], found[sizes[-2]]
    growth = {name: round(last[name] / before[name], 3) for name in ("driver_mib", "index_driver_mib", "us_per_item")}
    result = {
        "driver_rss_growth": growth["driver_mib"],
        "index_driver_rss_growth": growth["index_driver_mib"],
        "us_per_item_growth": growth["us_per_item"],
        "each_id_once": once,
        "killed": 1,
        "sizes": {size: {name: round(value, 1) for name, value in figures.items()} for size, figures in found.items()},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
