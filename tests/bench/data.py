#!/usr/bin/env python
"""How fast images and captions become batches, beside webdataset, Ray Data's reader and a bare loop; their memory.

    pip install -c constraints.txt -e '.[bench,test]'
    tests/bench/data.py                          everything, some 5 minutes on two cores
    tests/bench/data.py --parts throughput       of throughput, s3, memory, index
    tests/bench/data.py --samples 400 --rounds 1 --memory-samples 10000

- throughput: images/s of the chunk stream (`feeds.py`), of torch's DataLoader over webdataset, of Ray Data's
  `read_webdataset` and `map_batches`, and of a bare loop on two processes with the files in memory. All take turns;
  speeds are those from the first quarter of the batches on, so without starting anything, and medians count. Ray's own
  processes run beside all of them.
- s3: the chunk stream from SeaweedFS, every request 30 ms late, over that from the local disk.
- memory: the most that one of the tasks' processes and the object store take for 50,000 samples, over that for 2,000;
  images of 336 x 336, so that 2,000 of them are more than the object store of 512 MiB could hold, and taken more
  slowly than they come, as training does: all that may be in flight is then in flight, in both.
- index: seconds and memory of a new process from the index of 100 million samples to the first chunk's samples.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parents[2]))
sys.path.insert(0, str(Path(__file__).parent))

import feeds

from vladva.config import DataConfig, ModelConfig, RunConfig, TrainConfig

LATENCY = 0.03  # seconds
STORE = 512 << 20  # bytes of the object store, where memory is measured
PAUSE = 0.2  # seconds after every chunk, there
FIRST_CHUNK = """
import resource, sys, time
from vladva.data.sampler import SampleFinder
from vladva.config import RunConfig
import json
began = time.perf_counter()
found = SampleFinder(RunConfig.from_json(json.loads(sys.argv[1])))(0)
print(json.dumps([time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, len(found)]))
"""


def config_of(uri: str, model: str, samples: int, chunk: int = feeds.CHUNK) -> RunConfig:
    """A run that takes so many samples, or a few less."""
    train = TrainConfig(steps=samples // (2 * chunk), global_batch=2 * chunk, chunk_size=chunk)
    data = DataConfig(uri, run_length=feeds.RUN)
    return RunConfig("bench", "", ModelConfig(checkpoint=model), data, train)


def speed(stream: Iterator[int], batches: int) -> float:
    """Images/s from the first quarter of the batches to the last."""
    counts, times = [], []
    for count in islice(stream, batches):
        counts.append(count)
        times.append(time.perf_counter())
    quarter = len(times) // 4
    return sum(counts[quarter + 1 :]) / (times[-1] - times[quarter])


def scanned(uri: str, model: str) -> None:
    from vladva.data.scan import scan

    print(scan(uri, feeds.preprocessor(model).count_tokens, verify=False))


# --------------------------------------------------------------------------------------------------------- throughput


def throughput(uri: str, model: str, samples: int, rounds: int) -> dict[str, float]:
    """Medians of images/s, and of the ratios within each round."""
    config = config_of(uri, model, samples)
    batches = samples // feeds.CHUNK
    shards = [str(path) for path in sorted(Path(uri).glob("*.tar"))]
    bare, loader = feeds.Bare(config, batches // 2), feeds.webdataset_loader(model, shards)
    ways = {
        "limit": lambda: batches // 2 * feeds.CHUNK / bare.seconds(),
        "stream": lambda: speed(feeds.vladva_stream(config), batches),
        "webdataset": lambda: speed(feeds.webdataset_stream(loader), batches),
        "ray_webdataset": lambda: speed(feeds.ray_stream(model, shards, 1), batches),
    }
    return turns(ways, rounds, "stream")


def turns(ways: dict, rounds: int, ours: str) -> dict[str, float]:
    """Images/s of each way, and ours over each other one: medians over the rounds."""
    found = {name: [] for name in ways}
    for number in range(rounds):
        for name, way in ways.items():
            found[name].append(way())
        shown = ", ".join(f"{name} {speeds[-1]:.0f}" for name, speeds in found.items())
        print(f"round {number + 1}: images/s {shown}; load {os.getloadavg()[0]:.1f}", flush=True)
    figures = {f"images_per_s_{name}": median(speeds) for name, speeds in found.items()}
    for name in ways:
        if name != ours:
            figures[f"vs_{name}"] = median(a / b for a, b in zip(found[ours], found[name], strict=True))
    return figures


def from_s3(uri: str, model: str, samples: int, rounds: int, folder: Path) -> dict[str, float]:
    """The same shards and index on both storages."""
    from tests.support.s3_server import BUCKET, s3_server
    from vladva.core import storage

    local = config_of(uri, model, samples)
    remote = replace(local, data=replace(local.data, uri=f"s3://{BUCKET}/photos"))
    with s3_server(folder / "s3") as variables:
        port = int(variables["AWS_ENDPOINT_URL"].rpartition(":")[2])
        with feeds.delayed(port, LATENCY) as late:
            os.environ |= variables
            for file in storage.list_files(uri):
                storage.write_bytes_atomically(f"{remote.data.uri}{file.removeprefix(uri)}", Path(file).read_bytes())
            os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{late}"
            start_ray()  # whose processes must know the way
            ways = {
                "local": lambda: speed(feeds.vladva_stream(local), samples // feeds.CHUNK),
                "s3": lambda: speed(feeds.vladva_stream(remote), samples // feeds.CHUNK),
            }
            figures = turns(ways, rounds, "s3")
    return {"images_per_s_s3": figures["images_per_s_s3"], "s3_vs_local": figures["vs_local"]}


# ------------------------------------------------------------------------------------------------------------- memory


class Watch:
    """The most memory that a task's process, and the object store, have used while it ran."""

    def __init__(self) -> None:
        self.rss = self.store = 0
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.look, daemon=True)

    def look(self) -> None:
        import psutil
        import ray
        from ray._private.internal_api import get_memory_info_reply, get_state_from_address

        state = get_state_from_address(ray.get_runtime_context().gcs_address)
        while not self.stop.wait(0.2):
            for process in psutil.Process().children(recursive=True):
                try:
                    if "FlatMap" in (process.cmdline() or [""])[0]:
                        self.rss = max(self.rss, process.memory_full_info().uss)
                except psutil.Error:
                    continue
            self.store = max(self.store, get_memory_info_reply(state).store_stats.object_store_bytes_used)

    def __enter__(self) -> Watch:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()


def memory(folder: Path, sizes: tuple[int, int]) -> dict[str, float]:
    """The larger corpus over the smaller one; a new Ray for each."""
    from vladva.data.shard_writer import ShardWriter

    found, model = [], feeds.build_model(folder / "model of memory")
    for size in sizes:
        uri = str(folder / f"images-{size}")
        images = [feeds.photo(seed) for seed in range(4)]
        small = [shrunk(image) for image in images]
        with ShardWriter(uri, 500) as shards:
            for number in range(size):
                meta = {"captions": [f"an image with the number {number}", "a long caption " * 16]}
                shards.write(f"{number:06d}", {"jpg": small[number % 4], "json": json.dumps(meta).encode()})
        start_ray(object_store_memory=STORE)
        scanned(uri, model)
        config = config_of(uri, model, size)
        with Watch() as watch:
            delivered = 0
            for count in feeds.vladva_stream(config):
                delivered += count
                time.sleep(PAUSE)
        found.append(watch)
        print(f"{delivered} samples: {watch.rss >> 20} MiB in a process, {watch.store >> 20} MiB in the object store")
    return {
        "rss_growth": found[1].rss / found[0].rss,
        "store_growth": found[1].store / found[0].store,
        "rss_mib": found[1].rss / 2**20,
        "store_mib": found[1].store / 2**20,
    }


def shrunk(image: bytes) -> bytes:
    import io

    from PIL import Image

    body = io.BytesIO()
    Image.open(io.BytesIO(image)).resize((16, 16)).save(body, "JPEG")
    return body.getvalue()


def large_index(folder: Path, shards: int) -> dict[str, float]:
    """Index and first chunk in a new process."""
    from tests.support.small_corpora import write_large_index

    config = config_of(str(folder / "large"), "tiny", feeds.CHUNK * 2)
    write_large_index(config, shards, per_shard=1_000)
    command = [sys.executable, "-c", FIRST_CHUNK, json.dumps(config.to_json())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, gib, found = json.loads(done.stdout)
    assert found == feeds.CHUNK
    print(f"{shards * 1_000:,} samples: first chunk after {seconds:.2f} s, {gib:.2f} GiB")
    return {"index_seconds": seconds, "index_gib": gib}


# --------------------------------------------------------------------------------------------------------------- main


def start_ray(object_store_memory: int | None = None) -> None:
    """A new Ray with as many CPUs as the peers have processes."""
    import ray

    ray.shutdown()
    os.environ["RAY_DATA_DISABLE_PROGRESS_BARS"] = "1"
    ray.init(
        "local",
        num_cpus=feeds.PROCESSES,
        object_store_memory=object_store_memory,
        include_dashboard=False,
        logging_level="ERROR",
        log_to_driver=False,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default="throughput,s3,memory,index")
    parser.add_argument("--samples", type=int, default=1_000, help="photos of the corpus, and in one measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory-samples", type=int, default=50_000)
    parser.add_argument("--index-shards", type=int, default=100_000)
    options = parser.parse_args()
    parts, figures = options.parts.split(","), {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if "index" in parts:
            figures |= large_index(folder, options.index_shards)
        if {"throughput", "s3"} & set(parts):
            model, uri = feeds.build_model(folder / "model"), str(folder / "photos")
            feeds.write_photos(uri, options.samples)
            start_ray()
            scanned(uri, model)
        if "throughput" in parts:
            figures |= throughput(uri, model, options.samples, options.rounds)
        if "s3" in parts:
            figures |= from_s3(uri, model, options.samples, options.rounds, folder)
        if "memory" in parts:
            figures |= memory(folder, (2_000, options.memory_samples))
    print(json.dumps({key: round(value, 3) for key, value in figures.items()}))


if __name__ == "__main__":
    main()
