"""What a kill costs a run: `python tests/bench/resume.py [--kills 5]`. Last line: one JSON object.

An epoch of a small LLaVA on a real cluster (a head and two nodes) with two workers, undisturbed; then again, each time
with something killed by SIGKILL at a random step: a worker, the node with the workers, the driver. Then with the
driver killed and another number of workers afterwards. Then from a real S3 server behind a proxy that spoils a quarter
of the answers, with a worker killed. The worst of each figure is reported:

    duplicated, missing  samples of the epoch that came twice, or not at all, by `jobs/audit.py`
    wrong_batches        steps whose global batch is not the undisturbed run's
    max_weight_diff      of the final adapters, same number of workers
    max_loss_diff        of the curves, another number of workers
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil

from vladva.core import storage
from vladva.data.scenes.corpus import write_scenes
from vladva.models import checkpoint
from vladva.train.audit import audit
from vladva.train.tracking import read_metrics

PAIRS, BATCH, CHUNK = 600, 32, 4
STEPS = PAIRS // BATCH  # one epoch
FAULTS = ("503", "reset", "truncate", "stall", "short")
SHARE = 0.05  # of the requests, each


def command(out: Path, name: str, where: str, data: str, workers: int) -> list[str]:
    """The command line of a run."""
    options = {
        "name": name,
        "storage": where,
        "model.checkpoint": str(out / "llava"),
        "model.lora-rank": 4,
        "data.uri": data,
        "data.run-length": 2,
        "train.steps": STEPS,
        "train.global-batch": BATCH,
        "train.chunk-size": CHUNK,
        "train.checkpoint-every": 4,
        "cluster.workers": workers,
    }
    arguments = [argument for key, value in options.items() for argument in (f"--{key}", str(value))]
    return [sys.executable, str(Path(__file__).parents[2] / "jobs" / "train.py"), "tiny", *arguments, "--train.audit"]


class Stage:
    """A cluster of this machine: a head without CPUs, where drivers are, and two nodes, one with the workers."""

    def __init__(self, driver_log: Path) -> None:
        from ray.cluster_utils import Cluster

        self.driver_log = driver_log
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        self.nodes = [self.cluster.add_node(num_cpus=2) for _ in range(2)]
        self.logs = Path(self.cluster.head_node.get_logs_dir_path())

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *error: object) -> None:
        self.cluster.shutdown()

    def start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start a driver."""
        variables = os.environ | {"RAY_ADDRESS": self.cluster.address}
        with self.driver_log.open("ab") as log:
            return subprocess.Popen(arguments, env=variables, stdout=log, stderr=log)

    def training_workers(self) -> list[psutil.Process]:
        """The processes that train."""
        found = psutil.Process().children(recursive=True)
        return [each for each in found if each.is_running() and "RayTrainWorker" in " ".join(each.cmdline())]

    def kill(self, what: str, driver: subprocess.Popen[bytes]) -> None:
        """Kill a worker, the node of the workers (another one comes), or the driver."""
        if what == "driver":
            driver.kill()
            driver.wait()
        elif what == "worker":
            self.training_workers()[0].send_signal(signal.SIGKILL)
        else:
            above = {parent.pid for parent in self.training_workers()[0].parents()}
            node = next(n for n in self.nodes if above & {p.process.pid for p in n.all_processes["raylet"]})
            self.nodes.remove(node)
            self.cluster.remove_node(node, allow_graceful=False)
            self.nodes.append(self.cluster.add_node(num_cpus=2))

    def run(
        self, arguments: list[str], uri: str, *, kill: str = "", at: int = 0, then: list[str] | None = None
    ) -> None:
        """A run to its end; after `at` steps something is killed, and where that was the driver, `then` goes on."""
        began = time.monotonic()
        driver = self.start(arguments)
        if kill:
            while steps_of(uri) < at:
                if driver.poll() is not None:
                    raise RuntimeError(f"{uri} ended before step {at}:\n{self.driver_log.read_text()[-3000:]}")
                time.sleep(0.05)
            self.kill(kill, driver)
        if kill == "driver":
            driver = self.start(then or arguments)
        if driver.wait():
            raise RuntimeError(f"{uri} failed:\n{self.driver_log.read_text()[-3000:]}")
        print(f"{uri.rpartition('/')[2]}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def steps_of(uri: str) -> int:
    """Steps in a run's log so far."""
    return len(read_metrics(uri)) if storage.exists(storage.join(uri, "metrics.jsonl")) else 0


def adapter(uri: str) -> dict[str, Any]:
    """The final adapter of a run."""
    from safetensors.torch import load_file

    return load_file(checkpoint.fetch_adapter(checkpoint.latest(uri)) / "adapter_model.safetensors")


def weight_diff(one: str, other: str) -> float:
    """Largest difference between two runs' adapters."""
    a, b = adapter(one), adapter(other)
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def loss_diff(one: str, other: str) -> float:
    """Largest difference between two runs' curves."""
    a, b = ([row["loss"] for row in read_metrics(uri)] for uri in (one, other))
    assert len(a) == len(b) == STEPS
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def spoiled(seed: int) -> Iterator[str]:
    """A fault of each kind in SHARE of the requests."""
    chance = random.Random(seed)
    while True:
        number = int(chance.random() / SHARE)
        yield FAULTS[number] if number < len(FAULTS) else "ok"


def count_retries(logs: Iterable[Path]) -> int:
    """Attempts that failed, as `storage.py` logs them; a driver's log repeats its workers', with their `pid`."""
    lines = (line for log in logs for line in log.read_text(errors="replace").splitlines())
    return sum(bool(re.search(r"attempt \d of \d failed", line)) for line in lines if "pid=" not in line)


def measure_s3(out: Path, steady: str, at: int) -> dict[str, Any]:
    """The epoch from S3, and to S3, through the proxy."""
    from tests.support.s3_server import BUCKET, faulty_proxy, s3_server

    with s3_server(out / "s3") as variables, faulty_proxy(variables["AWS_ENDPOINT_URL"]) as proxy:
        os.environ.update(variables | {"AWS_ENDPOINT_URL": proxy.url})
        where = f"s3://{BUCKET}"
        for uri in storage.list_files(str(out / "scenes" / "train"), ".tar"):
            storage.write_bytes_atomically(f"{where}/train/{uri.rpartition('/')[2]}", storage.read_bytes(uri))
        uri = f"{where}/runs/spoiled"
        with Stage(out / "driver-s3.log") as stage:
            proxy.requests.clear()
            proxy.faults, proxy.stall = spoiled(0), 11.0
            stage.run(command(out, "spoiled", f"{where}/runs", f"{where}/train", 2), uri, kill="worker", at=at)
            proxy.faults = iter(())
            retries = count_retries([*stage.logs.glob("worker-*.err"), stage.driver_log, out / "own.log"])
        requests = list(proxy.requests)
        # An answer without a body cannot be cut.
        done = Counter(fault for method, _, fault in requests if method == "GET" or fault in ("503", "reset"))
        report = audit(uri)
        return {
            "requests": len(requests),
            "faults": {name: done[name] for name in FAULTS},
            "retries_logged": retries,
            **{name: report.figures()[name] for name in ("duplicated", "missing")},
            "wrong_batches": len(report.wrong_steps),
            "weight_diff": weight_diff(uri, steady),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= {
        "RAY_AUTH_MODE": "disabled",
        "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    chance = random.Random(options.seed)
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.support.checkpoints import build_llava

    with tempfile.TemporaryDirectory(prefix="vladva-resume-") as folder:
        out = Path(folder)
        logging.basicConfig(filename=out / "own.log")
        build_llava(out / "llava")
        write_scenes(str(out / "scenes"), train=PAIRS, test=8, negatives=1, samples_per_shard=100)
        data, where = str(out / "scenes" / "train"), str(out / "runs")

        steady, resized = f"{where}/steady", f"{where}/resized"
        kinds = [("worker", "driver", "node")[number % 3] for number in range(options.kills)]
        kills = [(kind, chance.randrange(1, STEPS - 1)) for kind in kinds]
        runs = [f"{where}/{kind}-killed-after-{at}" for kind, at in kills]
        with Stage(out / "driver.log") as stage:
            stage.run(command(out, "steady", where, data, 2), steady)
            for (kind, at), uri in zip(kills, runs, strict=True):
                stage.run(command(out, uri.rpartition("/")[2], where, data, 2), uri, kill=kind, at=at)
            first, then = (command(out, "resized", where, data, workers) for workers in (2, 1))
            stage.run(first, resized, kill="driver", at=chance.randrange(5, STEPS - 1), then=then)

        found = [audit(uri) for uri in (steady, *runs, resized)]
        result = {
            "steps": STEPS,
            "kills": kills,
            "attempts": [report.attempts for report in found],
            "duplicated": max(report.figures()["duplicated"] for report in found),
            "missing": max(report.figures()["missing"] for report in found),
            "wrong_batches": max(len(report.wrong_steps) for report in found),
            "max_weight_diff": max(weight_diff(uri, steady) for uri in runs),
            "max_loss_diff": loss_diff(resized, steady),
        }
        print(json.dumps(result), flush=True)
        result["s3"] = measure_s3(out, steady, chance.randrange(1, STEPS - 1))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
