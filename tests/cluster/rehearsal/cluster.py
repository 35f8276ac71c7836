"""A vladva cluster on the hosts of a rehearsal: `ray up` brings it up, `ray job submit` uses it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests.cluster.rehearsal.hosts import PROJECT, Host, Hosts
from vladva.core import storage
from vladva.models import checkpoint

BUCKET = "s3://vladva"
RAY = {"RAY_AUTH_MODE": "token", "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:8265"}
API_KEY, WRITE_KEY = "key-of-a-reader", "key-of-a-writer"
SUBMIT = "ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml"
NODE_CPUS = 4  # that each worker says it has
# Seconds.
WITHIN = {"ray up": 600.0, "nodes": 300.0, "launcher": 120.0, "job": 1200.0, "checkpoint": 600.0, "end": 240.0}

LAUNCHER = re.compile(r"\d{4}-\d\d-\d\d [\d:,]+\s+\w+ \w+\.py:\d+ -- |Running entrypoint for job ")


class StepError(AssertionError):
    """A step did not show what it should; the text says what was seen."""


@dataclass
class Job:
    """A submitted job that may be running: its command goes on on the laptop."""

    process: subprocess.Popen[bytes]
    log: Path

    @property
    def output(self) -> str:
        """What the job itself said, without the lines of `ray job submit` around it."""
        lines = re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace")).splitlines()
        return "\n".join(line for line in lines if line.strip() and not LAUNCHER.match(line))

    @property
    def name(self) -> str:
        """Ray's id of it."""
        match = re.search(r"raysubmit_\w+", self.log.read_text(errors="replace"))
        if match is None:
            raise StepError(f"not submitted: {self.log.read_text(errors='replace')[-2000:]}")
        return match[0]

    def wait(self, timeout: float = WITHIN["job"]) -> int:
        return self.process.wait(timeout)

    def succeed(self, timeout: float = WITHIN["job"]) -> str:
        """Its output, when it has ended well. Raises StepError."""
        if status := self.wait(timeout):
            raise StepError(f"exit status {status}: {self.output[-4000:]}")
        return self.output


@dataclass
class Cluster:
    """What the steps of a rehearsal work with."""

    machines: Hosts
    s3: dict[str, str]
    folder: Path
    prometheus: str = ""
    faults: list[str] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    submitted: int = 0

    # --- the launcher

    @property
    def config(self) -> Path:
        """cluster/on_prem.yaml with the addresses of these hosts, and as much of this machine as they may use."""
        path = self.folder / "on_prem.yaml"
        if not path.exists():
            content = yaml.safe_load((PROJECT / "cluster/on_prem.yaml").read_text())
            content["provider"]["head_ip"] = self.machines.head.address
            content["provider"]["worker_ips"] = [worker.address for worker in self.machines.workers]
            content["auth"]["ssh_user"] = "root"
            text = yaml.safe_dump(content, sort_keys=False)
            memory = "--object-store-memory=209715200"
            text = text.replace("ray start --head", f"ray start --head {memory}")
            text = text.replace("ray start --address", f"ray start {memory} --num-cpus={NODE_CPUS} --address")
            path.write_text(text)
        return path

    def prepare_laptop(self) -> None:
        """The two files that on_prem.yaml asks for, and what its user exports."""
        laptop = self.machines.laptop
        laptop.profile |= RAY
        laptop.kill()
        laptop.boot()
        home = laptop.folder / "root"
        # Replicas import serve.app by name: on real machines it is in the image, or in a folder that all have.
        variables = self.s3 | {
            "VLADVA_API_KEYS": API_KEY, "VLADVA_WRITE_KEYS": WRITE_KEY, "PYTHONPATH": str(PROJECT),
            "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        (home / ".vladva.env").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
        (home / "on_prem.yaml").write_text(self.config.read_text())
        self.laptop("ray get-auth-token --generate")

    def laptop(self, command: str, *, timeout: float = 300, status: int | None = 0) -> str:
        """What a command says that is typed on the laptop. Raises StepError for another exit status; None: for none."""
        done = self.machines.laptop.run(command, timeout=timeout, cwd=str(PROJECT))
        if status is not None and done.returncode != status:
            raise StepError(f"{command}: exit status {done.returncode}, not {status}: {done.stdout[-4000:]}")
        return done.stdout

    def listed(self) -> list[dict[str, Any]]:
        """What `ray list nodes` tells on the head."""
        shown = self.machines.head.run("RAY_AUTH_MODE=token ray list nodes --format json --limit 100", timeout=60)
        match = re.search(r"^\[.*\]", shown.stdout, re.MULTILINE | re.DOTALL)
        return json.loads(match.group()) if match else []

    def node_id(self, host: Host) -> str:
        """Ray's id of a host that is alive."""
        return next(
            node["node_id"] for node in self.listed() if node["node_ip"] == host.address and node["state"] == "ALIVE"
        )

    def nodes(self) -> dict[str, str]:
        """Address -> state, of the nodes that Ray knows."""
        states: dict[str, str] = {}
        for node in self.listed():
            if node["state"] == "ALIVE" or node["node_ip"] not in states:
                states[node["node_ip"]] = node["state"]
        return states

    def wait_for_nodes(self, number: int, timeout: float = WITHIN["nodes"]) -> None:
        """Until so many nodes are alive. Raises StepError."""
        seen: dict[str, str] = {}

        def enough() -> bool:
            nonlocal seen
            seen = self.nodes()
            return sum(state == "ALIVE" for state in seen.values()) == number

        wait_until(enough, timeout, lambda: f"{number} nodes alive: {seen}", pause=2)

    def rejoin(self, worker: Host) -> None:
        """Until a worker that has come back is a node again. Raises StepError.

        The launcher on the head starts Ray there by ssh. Where it has given the worker up, this does so, as a service
        manager would; not before, as two at once stop each other's Ray.
        """
        seen: dict[str, str] = {}

        def joined() -> bool:
            nonlocal seen
            seen = self.nodes()
            return seen.get(worker.address) == "ALIVE"

        told = "the launcher did not start Ray there"
        try:
            wait_until(joined, WITHIN["launcher"], lambda: told, pause=2)
            return
        except StepError:
            *_, start = yaml.safe_load(self.config.read_text())["worker_start_ray_commands"]
            command = f"ray stop --force; export RAY_HEAD_IP={self.machines.head.address}; {start}"
            told = worker.run(command, timeout=WITHIN["nodes"]).stdout
        wait_until(
            joined, WITHIN["nodes"], lambda: f"{worker.name} is {seen}; `ray start` said: {told[-2000:]}", pause=2
        )

    # --- jobs

    def submit(self, *entrypoint: str, options: str = "") -> Job:
        """`ray job submit` from the laptop, followed in the background."""
        self.submitted += 1
        log = self.folder / f"job-{self.submitted}.log"
        command = f"{SUBMIT} {options} -- {shlex.join(entrypoint)}"
        return Job(self.machines.laptop.start(command, log, cwd=str(PROJECT)), log)

    def job(self, *entrypoint: str, timeout: float = WITHIN["job"]) -> str:
        """The output of a job that ends well. Raises StepError."""
        return self.submit(*entrypoint).succeed(timeout)

    def wait_for_step(self, run: str, step: int, job: Job) -> int:
        """The step of a run's first checkpoint at `step` or after it. Raises StepError where the job ends before."""
        found = 0

        def reached() -> bool:
            nonlocal found
            newest = checkpoint.latest(run)
            found = storage.read_json(storage.join(newest, checkpoint.STATE))["step"] if newest else 0
            if found < step and job.process.poll() is not None:
                raise StepError(f"{run} ended before step {step}: {job.output[-4000:]}")
            return found >= step

        wait_until(reached, WITHIN["checkpoint"], lambda: f"step {step} of {run}, at {found}: {job.output[-3000:]}")
        return found

    def places(self, run: str) -> list[dict[str, Any]]:
        """Where the workers of a run's newest group are."""
        return storage.read_json(storage.join(run, "workers.json"))


def wait_until(reached: Callable[[], bool], timeout: float, what: Callable[[], str], pause: float = 0.5) -> float:
    """Seconds until `reached`. Raises StepError after `timeout`."""
    began = time.monotonic()
    while not reached():
        if time.monotonic() - began > timeout:
            raise StepError(f"not within {timeout:.0f} s: {what()}")
        time.sleep(pause)
    return time.monotonic() - began


def check(holds: bool, seen: object) -> None:
    """Raise StepError, with what was seen, unless it holds."""
    if not holds:
        raise StepError(str(seen)[-4000:])


def use(s3: dict[str, str]) -> None:
    """Let this process reach the S3 server."""
    os.environ.update(s3)
