#!/usr/bin/env python
"""Training on 8 to 1,024 GPUs, projected from what a step's parts cost; the same arithmetic held to 1, 2 and 4 workers.

    tests/bench/scaling.py                        measure here, check, project (some minutes)
    tests/bench/scaling.py --project-only         the projection alone, of what is assumed and one image decoded here
    tests/bench/scaling.py --recipe llava_1_5_7b --gpu "8 x A100 80 GB (AWS p4de.24xlarge)"

A step takes as long as its slowest worker: its pairs forward and backward, its part of the loss over the global batch,
the gather of embeddings and the sum of gradients around a ring; or as long as its next pairs take to be read, to be
decoded, or to be dealt to the workers (one process for every 64 of them), where that is longer. What overlaps besides
is not counted, so the projection errs on the slow side.

Measured here, each by itself: the bare step at two batch sizes (a time for a pair and one for a step), making a pair's
chunk, dealing a chunk, a message and a byte between two processes (Gloo). What Ray adds to a step is taken from the run
with one worker; those with two and four, which share this machine's cores, are predicted. The last line is JSON:
`predicted_vs_measured` of each, `efficiency` (pairs/s over those of the same share of cores with one worker), and the
projection.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np

from vladva.config import RunConfig
from vladva.train.data_loader import WORKERS_PER_DEALER

GPUS = (8, 16, 32, 64, 128, 256, 512, 1024)
GPUS_PER_NODE = 8
WEAK_PAIRS = 32  # of each GPU, where the batch grows with their number
CHECKED, BATCH, CHUNK = (1, 2, 4), 64, 8
DEALT = 1024  # chunks
WARM_UP = 3
SIDE = 336

# Nobody measured these here. A machine of eight GPUs, as clouds rent them.
ASSUMED = {
    "link_in_a_node": 300e9,  # bytes/s of a GPU: NVLink, as NCCL reaches it
    "link_between_nodes": 40e9,  # bytes/s of a GPU: its share of 3,200 Gbit/s
    "latency_s": 2e-5,  # of a message from one GPU to the next
    "step_s": 0.05,  # launches, optimizer, log
    "loss_utilisation": 0.05,  # of the GPU's rate, by the loss's products in float32
    "storage": 5e9 / GPUS_PER_NODE,  # bytes/s of a GPU's share of what a node reads from object storage
    "file_bytes": 150e3,  # of an image and its caption
    "cores": 20.0,  # of a GPU's share of the node, that read and decode
}


@dataclass(frozen=True)
class Costs:
    """Of one worker: seconds, bytes, and bytes/s."""

    pair_s: float
    """Forward and backward of a pair."""
    step_s: float
    """Of a step, whatever its batch."""
    entry_s: float
    """Of an entry of the matrix of similarities."""
    pair_bytes: float
    """The embeddings of a pair."""
    gradient_bytes: float
    latency_s: float
    link: float
    file_bytes: float
    storage: float
    decode_s: float
    """Of a pair, on one core."""
    cores: float
    """That decode for one worker."""
    deal_s: float
    """Of a chunk, by the process that deals to some of the workers."""


@dataclass(frozen=True)
class Projection:
    """Of one step: how long it takes, and what the time goes into."""

    seconds: float
    bottleneck: str
    parts: dict[str, float]


def project(costs: Costs, workers: int, batch: int, chunk: int) -> Projection:
    """A step of `batch` pairs, dealt in chunks to so many workers."""
    pairs = -(-batch // (chunk * workers)) * chunk  # of the worker that has most
    # One or two ranks compute the whole loss, more each their own rows and columns (train/grad_cache.py).
    entries = batch**2 if workers <= 2 else 2 * batch**2 / workers
    steps = workers - 1  # of a ring
    in_turn = {
        "compute": pairs * costs.pair_s,
        "every step": costs.step_s,
        "loss": entries * costs.entry_s,
        "gather of embeddings": steps * (costs.latency_s + pairs * costs.pair_bytes / costs.link),
        "sum of gradients": 2 * steps * (costs.latency_s + costs.gradient_bytes / workers / costs.link),
    }
    beside = {
        "reading": pairs * costs.file_bytes / costs.storage,
        "decoding": pairs * costs.decode_s / costs.cores,
        "dealing": batch / chunk / -(-workers // WORKERS_PER_DEALER) * costs.deal_s,
    }
    worker = sum(in_turn.values())
    slowest = max(beside, key=lambda name: beside[name])
    if beside[slowest] > worker:
        return Projection(beside[slowest], slowest, in_turn | beside)
    return Projection(worker, max(in_turn, key=lambda name: in_turn[name]), in_turn | beside)


def project_shared(costs: Costs, workers: int, batch: int, chunk: int, cores: int) -> Projection:
    """The same, of workers and decoders that share the cores of one machine, a core for each at most."""
    alone = project(costs, workers, batch, chunk)
    of_cores = (batch * (costs.pair_s + costs.decode_s) + workers * costs.step_s + alone.parts["dealing"]) / cores
    exchanged = alone.parts["gather of embeddings"] + alone.parts["sum of gradients"]
    if of_cores + exchanged > alone.seconds:
        return Projection(of_cores + exchanged, "cores", alone.parts)
    return alone


# --- what is measured ------------------------------------------------------------------------------------------------


def config_of(folder: Path, steps: int, workers: int = 1, batch: int = BATCH) -> RunConfig:
    """The recipe `tiny` with small chunks, and nothing but steps."""
    import loop_overhead

    config = loop_overhead.config_of(folder, steps)
    return replace(
        config,
        name=f"workers-{workers}",
        data=replace(config.data, run_length=CHUNK),
        train=replace(config.train, global_batch=batch, chunk_size=CHUNK),
        # Less than a core for each of four, as the others need cores for their readers, too.
        cluster=replace(config.cluster, workers=workers, cpus_per_worker=1 if workers == 1 else 0.5),
    )


def bare(folder: Path, steps: int, batch: int) -> float:
    """Seconds of a step on chunks in memory, in this process."""
    import loop_overhead

    return statistics.median(loop_overhead.bare(config_of(folder, steps, batch=batch))[WARM_UP:])


def reading(folder: Path) -> float:
    """Seconds to read, decode and tokenise a pair, on one core."""
    import torch

    from vladva.train.data_loader import ChunkReader

    torch.set_num_threads(1)
    reader = ChunkReader(config_of(folder, 20))
    reader(0)
    began = time.perf_counter()
    for number in range(1, 33):
        reader(number)
    return (time.perf_counter() - began) / 32 / CHUNK


def dealing(dealers: int) -> float:
    """Seconds to deal a chunk, by as many dealers as workers, of chunks that take no time to make."""
    import ray
    import stream

    from vladva.core.ray_tasks import connect

    connect()
    dealt = stream.EmptyStream(stream.config_of(DEALT), 0, dealers, workers_per_dealer=1)
    name = f"chunks-{uuid.uuid4()}"
    _dealers = [dealt.start(name, number) for number in range(dealers)]

    @ray.remote(num_cpus=0)
    def ends(rank: int) -> list[float]:
        chunks = dealt.share(name, rank, ahead=2)
        return [time.time() for _, _ in zip(range(DEALT // dealers), chunks, strict=False)]

    every = sorted(end for one in ray.get([ends.remote(rank) for rank in range(dealers)]) for end in one)
    middle = every[DEALT // 4 :]  # the first ones wait for processes to start
    return (middle[-1] - middle[0]) / (len(middle) - 1)


def exchange(rank: int, port: int, results: Any) -> None:
    """Seconds of a sum over two processes, of few bytes and of many."""
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for numbers in (16, 1 << 20):
        value, times = torch.zeros(numbers), []
        for _ in range(30):
            distributed.barrier()
            began = time.perf_counter()
            distributed.all_reduce(value)
            times.append(time.perf_counter() - began)
        if rank == 0:
            results.put((4 * numbers, statistics.median(times[5:])))
    distributed.destroy_process_group()


def measure_link() -> tuple[float, float]:
    """(latency in s, bytes/s) of a message between two processes here. A sum of two takes two of half the bytes."""
    from torch import multiprocessing

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    processes = [context.Process(target=exchange, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    (small, least), (large, most) = sorted(results.get() for _ in range(2))
    for process in processes:
        process.join()
    return least / 2, (large - small) / max(most - least, 1e-9)


def decode_seconds() -> float:
    """To decode a photo-like JPEG of 640 x 480 and make it SIDE x SIDE, on one core."""
    from PIL import Image

    from vladva.core.images import decode_image

    random = np.random.default_rng(0)
    coarse = Image.fromarray(random.integers(0, 256, (60, 80, 3), np.uint8)).resize(
        (640, 480), Image.Resampling.BICUBIC
    )
    with io.BytesIO() as file:
        coarse.save(file, "JPEG", quality=90)
        data = file.getvalue()
    times = []
    for _ in range(20):
        began = time.perf_counter()
        np.asarray(decode_image(data).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def in_a_process(*arguments: str) -> Any:
    """What this script prints last when it is given `arguments`."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    return json.loads(done.stdout.splitlines()[-1])


def run(config: RunConfig) -> float:
    """Seconds of a step of the run as it is, from one logged step to the next."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from vladva.train.launch import train

    train(config)
    events = EventAccumulator(f"{config.uri}/tensorboard").Reload()
    ends = [event.wall_time for event in events.Scalars("loss")]
    return statistics.median([end - start for start, end in pairwise(ends)][WARM_UP:])


def check(steps: int) -> dict[str, Any]:
    """Measure the parts, then runs with 1, 2 and 4 workers; predictions beside what was measured."""
    from vladva.core.ray_tasks import connect
    from vladva.data.scenes.corpus import write_scenes
    from vladva.train.memory_plan import plan_memory, settings_of
    from vladva.train.preflight import check_data

    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_scenes(str(folder / "scenes"), train=1_000, test=10, negatives=1)
        config = config_of(folder, steps)
        connect()
        check_data(config, print)
        half, whole = (in_a_process("--bare", name, str(batch), "--steps", str(steps)) for batch in (BATCH // 2, BATCH))
        pair_s = (whole - half) / (BATCH // 2)
        decode_s = in_a_process("--reading", name)
        latency_s, link = measure_link()
        width = settings_of(config.model.checkpoint).get_text_config().hidden_size
        costs = Costs(
            pair_s=pair_s, step_s=max(0.0, whole - BATCH * pair_s), entry_s=0.0, pair_bytes=8 * width,
            gradient_bytes=4 * plan_memory(config).trainable, latency_s=latency_s, link=link,
            file_bytes=0.0, storage=1.0, decode_s=decode_s, cores=1.0, deal_s=in_a_process("--dealing", "1"),
        )  # fmt: skip
        measured = {workers: run(config_of(folder, steps, workers)) for workers in CHECKED}
    added = max(0.0, measured[1] - project_shared(costs, 1, BATCH, CHUNK, cores).seconds)
    costs = replace(costs, step_s=costs.step_s + added)
    print("measured here: " + ", ".join(f"{name} {value:.3g}" for name, value in asdict(costs).items()))
    rows = {}
    for workers, seconds in measured.items():
        found = project_shared(costs, workers, BATCH, CHUNK, cores)
        share = min(1.0, cores / workers) * workers  # cores that the workers have together
        rows[workers] = {
            "step_s": seconds, "pairs_per_s": BATCH / seconds, "efficiency": measured[1] / seconds / share,
            "predicted_s": found.seconds, "predicted_vs_measured": found.seconds / seconds,
        }  # fmt: skip
        told = "  ".join(f"{name} {value:.3f}" for name, value in rows[workers].items())
        print(f"{workers} workers on {cores} cores: {told}  ({found.bottleneck})", flush=True)
    return {"cores": cores, "costs": asdict(costs), "workers": rows}


# --- GPUs ------------------------------------------------------------------------------------------------------------


def gpu_costs(recipe: str, gpu: str) -> tuple[RunConfig, Costs, dict[str, Any]]:
    """The recipe's costs on one of the machines of cluster/prices.yaml, and what was taken for it."""
    import yaml

    from vladva import recipes
    from vladva.train.cost import TERA, read_prices, training_work
    from vladva.train.memory_plan import plan_memory, settings_of

    config: RunConfig = getattr(recipes, recipe)()
    prices = Path(__file__).parents[2] / "cluster/prices.yaml"
    machine = next(each for each in read_prices(yaml.safe_load(prices.read_text())) if each.name == gpu)
    rate = machine.tflops * TERA
    work = training_work(config) / (config.train.steps * config.train.global_batch)
    width = settings_of(config.model.checkpoint).get_text_config().hidden_size
    costs = Costs(
        pair_s=work / (rate * machine.utilisation),
        step_s=ASSUMED["step_s"],
        entry_s=6 * width / (rate * ASSUMED["loss_utilisation"]),  # a product forward, two backward
        pair_bytes=8 * width,  # two embeddings in float32
        gradient_bytes=4 * plan_memory(config).trainable,
        latency_s=ASSUMED["latency_s"],
        link=ASSUMED["link_in_a_node"],
        file_bytes=ASSUMED["file_bytes"],
        storage=ASSUMED["storage"],
        decode_s=decode_seconds(),
        cores=ASSUMED["cores"],
        deal_s=in_a_process("--dealing", "1"),
    )
    taken = {"recipe": recipe, "gpu": gpu, "tflops": machine.tflops, "utilisation": machine.utilisation}
    measured = {"decode_s, measured here": costs.decode_s, "deal_s, measured here": costs.deal_s}
    return config, costs, taken | {"TFLOP_per_pair": work / TERA} | measured | ASSUMED


def project_gpus(recipe: str, gpu: str) -> dict[str, Any]:
    """Tables for the recipe's own batch and for one that grows with the GPUs."""
    config, costs, taken = gpu_costs(recipe, gpu)
    print("assumed: " + ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
                                  for name, value in taken.items()))  # fmt: skip
    tables: dict[str, Any] = {}
    chunk = config.train.chunk_size
    for title, batch_of in (("batch of the recipe", lambda _: config.train.global_batch),
                            (f"{WEAK_PAIRS} pairs a GPU", lambda gpus: WEAK_PAIRS * gpus)):  # fmt: skip
        print(
            f"\n{title}\n{'GPUs':>6} {'batch':>7} {'step s':>8} {'pairs/s':>9} {'of linear':>9}  bottleneck, its share"
        )
        rows: list[dict[str, Any]] = []
        for gpus in GPUS:
            batch = batch_of(gpus)
            if batch < gpus * chunk:
                print(f"{gpus:>6} {batch:>7}  fewer chunks of {chunk} pairs than GPUs")
                continue
            link = ASSUMED["link_in_a_node" if gpus <= GPUS_PER_NODE else "link_between_nodes"]
            found = project(replace(costs, link=link), gpus, batch, chunk)
            rate = batch / found.seconds
            linear = rate / gpus / (rows[0]["pairs_per_s"] / rows[0]["gpus"]) if rows else 1.0
            share = found.parts[found.bottleneck] / found.seconds
            rows.append({"gpus": gpus, "batch": batch, "step_s": round(found.seconds, 4), "pairs_per_s": round(rate, 1),
                         "of_linear": round(linear, 3), "bottleneck": found.bottleneck})  # fmt: skip
            told = f"{gpus:>6} {batch:>7} {found.seconds:>8.3f} {rate:>9,.0f} {linear:>9.2f}"
            print(f"{told}  {found.bottleneck}, {share:.0%}")
        tables[title] = rows
    return {"assumed": taken, "projection": tables}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--recipe", default="qwen2_vl_2b")
    parser.add_argument("--gpu", default="8 x H100 80 GB (AWS p5.48xlarge)", help="a machine of cluster/prices.yaml")
    parser.add_argument("--project-only", action="store_true")
    parser.add_argument("--bare", nargs=2, metavar=("FOLDER", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--reading", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--dealing", type=int, help="seconds a chunk of so many dealers at once, and nothing else")
    options = parser.parse_args()
    if options.bare:
        print(json.dumps(bare(Path(options.bare[0]), options.steps, int(options.bare[1]))))
    elif options.reading:
        print(json.dumps(reading(Path(options.reading))))
    elif options.dealing:
        print(json.dumps(dealing(options.dealing)))
    else:
        checked = {} if options.project_only else check(options.steps)
        print(json.dumps(checked | project_gpus(options.recipe, options.gpu)))


if __name__ == "__main__":
    main()
