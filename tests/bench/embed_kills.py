#!/usr/bin/env python
"""Embedding a corpus while its actors and its driver are killed, beside the same undisturbed.

    tests/bench/embed_kills.py                    20,000 items
    tests/bench/embed_kills.py --items 2000       a try

Half of the items are small images, half are captions, of WebDataset shards; the model is `tiny`, with two actors.
Every 20 seconds one of the processes that hold the model gets SIGKILL, the one that has lived longest, if anything was
written since the last time (on a busy machine an actor may take longer than that to start). When a third of the items
is embedded, and again when two thirds are, the driver gets SIGKILL, and Ray goes down with it; then the same command
is given again. Goals: complete, each_id_once true, largest_difference <= 1e-5.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import random_llava
from PIL import Image

JOB = Path(__file__).parents[2] / "jobs" / "embed.py"
EVERY_S = 20.0
PER_SHARD = 1000


def write_shards(folder: Path, images: int) -> None:
    """Different images of 40 x 40 random pixels, each with a caption of its own."""
    folder.mkdir()
    random = np.random.default_rng(0)
    captions = random_llava.texts(images)
    for first in range(0, images, PER_SHARD):
        with tarfile.open(folder / f"shard-{first // PER_SHARD:06d}.tar", "w") as tar:
            for i in range(first, min(first + PER_SHARD, images)):
                body = io.BytesIO()
                Image.fromarray(random.integers(0, 256, (40, 40, 3), np.uint8)).save(body, "PNG")
                for name, data in ((f"{i:06d}.png", body.getvalue()), (f"{i:06d}.txt", f"{i} {captions[i]}".encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(data)
                    tar.addfile(entry, io.BytesIO(data))


def start(shards: Path, out: Path) -> psutil.Popen:
    """The job, with a Ray of its own."""
    command = [sys.executable, str(JOB), "tiny", "--data", str(shards), "--out", str(out), "--actors", "2"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return psutil.Popen(command, env=environment | {"OMP_NUM_THREADS": "1"})


def embedded(out: Path) -> int:
    """Items that are in parts of the table."""
    rows = 0
    for part in (out / "_parts").rglob("*.parquet"):
        try:
            rows += pq.read_metadata(part).num_rows
        except FileNotFoundError:  # the table was completed meanwhile
            continue
    return rows


def encoders(job: psutil.Popen) -> list[psutil.Process]:
    """Processes of the job that hold the model, oldest first."""
    found = []
    for process in job.children(recursive=True):
        try:
            if "MapBatches(EmbeddingActor)" in " ".join(process.cmdline()):
                found.append((process.create_time(), process.pid, process))
        except psutil.NoSuchProcess:
            continue
    return [process for _, _, process in sorted(found)]


def kill_driver(job: psutil.Popen) -> None:
    """SIGKILL, and wait for its Ray to be gone."""
    ray = job.children(recursive=True)
    job.kill()
    job.wait()
    for process in psutil.wait_procs(ray, timeout=30)[1]:
        process.kill()


def disturbed(shards: Path, out: Path, items: int) -> dict[str, int]:
    """Run the job to its end through kills; returns how many of what."""
    limits = [items // 3, 2 * items // 3]
    kills = {"actor_kills": 0, "driver_kills": 0}
    job, killed, seen = start(shards, out), time.monotonic(), 0
    while job.poll() is None:
        time.sleep(0.5)
        rows = embedded(out)
        if limits and rows >= limits[0]:
            print(f"{rows:,} of {items:,}: the driver is killed", flush=True)
            kill_driver(job)
            kills["driver_kills"] += 1
            limits.pop(0)
            job, killed, seen = start(shards, out), time.monotonic(), rows
        elif rows > seen and time.monotonic() - killed >= EVERY_S and (alive := encoders(job)):
            print(f"{rows:,} of {items:,}: actor {alive[0].pid} is killed", flush=True)
            alive[0].kill()
            kills["actor_kills"] += 1
            killed, seen = time.monotonic(), rows
    assert job.returncode == 0, f"the job ended with {job.returncode}"
    return kills


def read(out: Path) -> tuple[list[tuple[str, str]], np.ndarray]:
    """Ordered (id, kind) of a complete table, and embeddings [N, D]."""
    note = json.loads((out / "_table.json").read_text())
    assert note["complete"], f"{out} is not complete"
    rows = [pq.read_table(out / file, columns=["id", "kind", "embedding"]) for file in note["files"]]
    keys = [pair for table in rows for pair in zip(*(table[c].to_pylist() for c in ("id", "kind")), strict=True)]
    vectors = [np.stack(table["embedding"].to_numpy()) for table in rows]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    return [keys[i] for i in order], np.concatenate(vectors)[order]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=20_000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shards, calm, stormy = (Path(name, part) for part in ("shards", "calm", "stormy"))
        write_shards(shards, options.items // 2)
        began = time.monotonic()
        job = start(shards, calm)
        assert job.wait() == 0
        undisturbed_s = time.monotonic() - began
        kills = disturbed(shards, stormy, options.items)
        seconds = time.monotonic() - began - undisturbed_s
        (expected, expected_ND), (found, found_ND) = read(calm), read(stormy)
        assert len(set(expected)) == options.items == len(expected)
        same = found == expected
        differences = np.abs(found_ND - expected_ND).max(axis=1) if same else np.zeros(0)
        for i in np.argsort(-differences)[:5]:
            print(f"{' '.join(found[i])} differs by {differences[i]:.1e}")
        result = {
            "items": options.items,
            **kills,
            "complete": set(found) == set(expected),
            "each_id_once": len(found) == len(set(found)),
            "largest_difference": float(differences.max()) if same else None,
            "rows_that_differ": int((differences > 0).sum()),
            # What the comparison is worth: the next item's embedding is elsewhere.
            "difference_of_neighbours": float(np.abs(found_ND - np.roll(expected_ND, 1, axis=0)).max(axis=1).min())
            if same
            else None,
            "undisturbed_s": round(undisturbed_s, 1),
            "disturbed_s": round(seconds, 1),
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
