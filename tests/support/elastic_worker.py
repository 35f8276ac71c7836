"""A run on a cluster that loses an announced node and gets another: python tests/elastic_worker.py OUT

The cluster is real: raylets of their own for a head that reads data and for nodes with room for one worker each.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.support.checkpoints import build_llava
from vladva.config import ClusterConfig, DataConfig, ModelConfig, OptimConfig, RunConfig, TrainConfig
from vladva.data.scenes.corpus import write_scenes
from vladva.models import checkpoint
from vladva.train.launch import train
from vladva.train.tracking import read_metrics

STEPS, NEVER = 30, 1000
# A worker fits on a node once, and not on the head. Below two CPUs it computes with one thread.
NODE_CPUS, WORKER_CPUS = 2, 1.5
NOTICE = "/latest/meta-data/spot/instance-action"


def config_of(out: Path, name: str, cluster: ClusterConfig) -> RunConfig:
    """No checkpoint but the last, unless a node's leaving makes one due."""
    return RunConfig(
        name=name,
        storage=str(out / "runs"),
        model=ModelConfig(checkpoint=str(out / "llava"), lora_rank=4),
        data=DataConfig(uri=str(out / "scenes" / "train"), run_length=2),
        optim=OptimConfig(lr=1e-2, warmup_fraction=0.3),
        train=TrainConfig(steps=STEPS, global_batch=24, chunk_size=4, checkpoint_every=NEVER),
        cluster=cluster,
    )


def wait_for(what: str, happened: Callable[[], bool]) -> None:
    """Look ten times a second; the limit is for a run that hangs."""
    deadline = time.monotonic() + 300
    while not happened():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no {what} within 300 s")
        time.sleep(0.1)


def steps_of(config: RunConfig) -> int:
    """Steps in the log."""
    return len(read_metrics(config.uri)) if (Path(config.uri) / "metrics.jsonl").exists() else 0


class Metadata(BaseHTTPRequestHandler):
    """The part of AWS's instance metadata service that tells of a spot instance's end: here, in ten seconds."""

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        self.answer(b"a-token")

    def do_GET(self) -> None:
        assert (self.path, self.headers["X-aws-ec2-metadata-token"]) == (NOTICE, "a-token")
        end = datetime.now(timezone.utc) + timedelta(seconds=10)
        self.answer(json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")}).encode())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


def announce(node_id: str, address: str) -> None:
    """Run the watcher as a node would, on which AWS gives notice."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as metadata:
        threading.Thread(target=metadata.serve_forever, daemon=True).start()
        variables = os.environ | {"AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{metadata.server_port}"}
        command = [sys.executable, "cluster/spot_watcher.py", "--address", address, "--node-id", node_id]
        subprocess.run(command, check=True, capture_output=True, env=variables)
        metadata.shutdown()


def main() -> None:
    out = Path(sys.argv[1])
    os.environ |= {
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "15",  # waited for the node that is gone
        "RAY_AUTH_MODE": "disabled",
    }
    build_llava(out / "llava")
    write_scenes(str(out / "scenes"), train=300, test=8, negatives=1, samples_per_shard=100)

    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=NODE_CPUS) for _ in range(2)]
    ray.init(address=cluster.address, logging_level="WARNING", log_to_driver=False)

    home = ray.get_runtime_context().get_node_id()  # with the driver and Ray Train's controller
    leaving = next(node for node in nodes if node.node_id != home)
    workers = ClusterConfig(workers=2, min_workers=1, cpus_per_worker=WORKER_CPUS)
    config = config_of(out, "elastic", workers)
    run = threading.Thread(target=train, args=(config,))
    run.start()
    wait_for("step", lambda: steps_of(config) >= 3)
    announce(leaving.node_id, cluster.address)
    wait_for("checkpoint", lambda: checkpoint.latest(config.uri) is not None)
    saved = checkpoint.latest(config.uri)
    cluster.remove_node(leaving, allow_graceful=False)
    run.join()
    steady = config_of(out, "steady", ClusterConfig(workers=1, cpus_per_worker=WORKER_CPUS))
    train(steady)
    ray.shutdown()
    cluster.shutdown()
    curves = {c.name: [row["loss"] for row in read_metrics(c.uri)] for c in (config, steady)}
    print(json.dumps({"saved_after": int(saved.rsplit("-", 1)[1]), "curves": curves}))


if __name__ == "__main__":
    main()
