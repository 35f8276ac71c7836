"""`ray job submit` from the repository root to a cluster whose nodes have every dependency but not vladva itself."""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
RUNTIME_ENV = "cluster/runtime_env.yaml"


@dataclass(frozen=True)
class Head:
    """A running `ray start --head`: how to reach it, and the environment in which its commands run."""

    address: str  # of the dashboard, where jobs are submitted
    env: dict[str, str]

    def submit(self, *entrypoint: str, runtime_env: str | None = RUNTIME_ENV) -> subprocess.CompletedProcess[str]:
        """Runs the documented command from the repository root and waits for the job to end."""
        options = ["--runtime-env", runtime_env] if runtime_env else []
        command = ["ray", "job", "submit", "--address", self.address, "--working-dir", ".", *options, "--", *entrypoint]
        return subprocess.run(command, cwd=ROOT, env=self.env, text=True, capture_output=True, timeout=600, check=False)


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    # Not tmp_path: Ray's socket names must fit into 107 characters.
    folder = Path(tempfile.mkdtemp(prefix="head-"))
    gcs, dashboard, agent, client, metrics, runtime_env_agent = free_ports(6)
    environment = node_environment(folder)
    command = [
        "ray",
        "start",
        "--head",
        "--block",
        "--num-cpus=4",
        f"--temp-dir={folder / 'ray'}",
        "--disable-usage-stats",
    ]
    command += ["--node-ip-address=127.0.0.2", "--dashboard-host=127.0.0.1", f"--port={gcs}"]
    command += [f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={agent}"]
    command += [f"--ray-client-server-port={client}", f"--metrics-export-port={metrics}"]
    command += [f"--runtime-env-agent-port={runtime_env_agent}", f"--object-store-memory={512 * 2**20}"]
    with (folder / "head.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{dashboard}"
    try:
        wait_until_ready(process, address, environment["RAY_AUTH_TOKEN"], folder / "head.log")
        yield Head(address, environment)
    finally:
        end(process)
        shutil.rmtree(folder, ignore_errors=True)


def node_environment(folder: Path) -> dict[str, str]:
    """Puts a Python first on PATH that sees all that the running one has installed, except the editable vladva."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    site_packages = folder / "venv/lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    # The .pth files inside the folder named here are not read, and the editable install is one of them.
    (site_packages / "installed.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    ray = folder / "venv/bin/ray"
    ray.write_text(f"#!{folder / 'venv/bin/python'}\nfrom ray.scripts.scripts import main\nmain()\n")
    ray.chmod(0o755)
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "PYTHON", "VIRTUAL_ENV"))
    }
    return inherited | {
        "PATH": f"{folder / 'venv/bin'}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "OMP_NUM_THREADS": "1",
        "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "180",  # Ray's own 60 are too few on a busy machine
    }


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


def wait_until_ready(process: subprocess.Popen[bytes], address: str, token: str, log: Path) -> None:
    """Waits until the job server answers, or fails with the head's own words."""
    request = urllib.request.Request(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.5)
    raise AssertionError(f"the Ray head did not start:\n{log.read_text()}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends the head and all that it started, and nothing else."""
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=20)
    for each in left:
        each.kill()
    psutil.wait_procs(left, timeout=10)


PROBE = """
import ray, vladva.benchmarks.metrics
ray.init()
print("driver", vladva.benchmarks.metrics.__file__)
import importlib
where = ray.remote(lambda: importlib.import_module("vladva.benchmarks.metrics").__file__)
print("worker", ray.get(where.remote()))
"""


def test_vladva_is_importable_in_the_driver_and_on_workers(head: Head) -> None:
    job = head.submit("python", "-c", PROBE)
    assert job.returncode == 0, job.stdout + job.stderr
    places = dict(re.findall(r"^(driver|worker) (.*)$", job.stdout, re.MULTILINE))
    assert places.keys() == {"driver", "worker"}
    for place in places.values():
        assert "/py_modules_files/" in place  # the uploaded copy; this repository is not on the node's path


def test_the_working_directory_alone_is_not_enough(head: Head) -> None:
    job = head.submit("python", "-c", PROBE, runtime_env=None)
    assert job.returncode != 0
    assert "No module named 'vladva'" in job.stdout


def test_the_real_job_trains(head: Head, scenes: Path, tmp_path: Path) -> None:
    run = ("--name", "submitted", "--storage", str(tmp_path), "--data.uri", str(scenes / "train"))
    size = ("--train.steps", "2", "--train.global-batch", "16", "--train.chunk-size", "8")
    job = head.submit("python", "jobs/train.py", "tiny", *run, *size)
    assert job.returncode == 0, job.stdout + job.stderr
    metrics = (tmp_path / "submitted/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == [0, 1]
    assert (tmp_path / "submitted/checkpoints").is_dir()


def test_a_job_is_executable_and_its_failure_is_the_jobs(head: Head) -> None:
    job = head.submit("jobs/train.py", "tinny")
    assert job.returncode != 0
    assert "unknown recipe 'tinny'" in job.stdout
    assert "Traceback" not in job.stdout


def test_the_doctor_asks_every_node(head: Head) -> None:
    job = head.submit("python", "cluster/doctor.py", "--all-nodes")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "no troubles on nodes: 1" in job.stdout
