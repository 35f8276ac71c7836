"""A node is lost while a corpus is embedded: actors that begin again elsewhere leave what feeds them its share."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from vladva.core.ray_tasks import FEEDER_CPUS, actor_cpus
from vladva.embed.table import read_embeddings

ROOT = Path(__file__).parents[2]

# Three nodes and three actors; the one that is killed leaves two CPUs, which two actors take.
JOB = """
import os, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster

tiny, out = sys.argv[1:]
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
ray.init(address=cluster.address, logging_level="ERROR", log_to_driver=False)
import ray.data
from vladva.embed.pipeline import encode

finished = threading.Event()

def lose_a_node():
    while len(list(Path(out).glob("_parts/*/*"))) < 2:
        time.sleep(0.02)
    print("too late" if finished.is_set() else "in time", flush=True)
    cluster.remove_node(nodes[1], allow_graceful=False)
    print("lost", flush=True)

losing = threading.Thread(target=lose_a_node, daemon=True)
losing.start()
rows = [{"id": f"t{i}", "kind": "text", "text": f"{i} " + "word " * (4 * (i % 20))} for i in range(600)]
summary = encode(ray.data.from_items(rows, override_num_blocks=20), tiny, out, batch_size=4, actors=3)
finished.set()
losing.join()
print(summary.rows, flush=True)
ray.shutdown()
cluster.shutdown()
os._exit(0)  # not by the exit handlers of Ray, which miss the node that is lost
"""


@pytest.mark.parametrize("cpus_per_actor", [1, 2, 3, 8])
def test_however_many_actors_fit_a_node_its_feeders_fit_too(cpus_per_actor: int) -> None:
    for cpus in range(1, 249):
        actors = math.floor(cpus / actor_cpus(cpus_per_actor) + 1e-9)
        assert cpus - actors * actor_cpus(cpus_per_actor) >= FEEDER_CPUS - 1e-9, cpus
        assert actors == cpus // cpus_per_actor  # and no more actors fit than whole CPUs would allow
    assert 4 - math.floor(4 / 1) * 1 == 0  # with whole CPUs nothing is left


@pytest.mark.slow
@pytest.mark.ray
def test_the_job_goes_on_where_its_actors_take_every_cpu(tmp_path: Path, tiny: str) -> None:
    out = tmp_path / "table"
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    environment |= {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "OMP_NUM_THREADS": "1", "RAY_DATA_LOG_LEVEL": "ERROR"}
    done = subprocess.run(
        [sys.executable, "-c", JOB, tiny, str(out)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert {"time", "lost", "600"} <= set(done.stdout.split())
    assert read_embeddings(str(out))["id"].to_pylist() == sorted(f"t{i}" for i in range(600))
