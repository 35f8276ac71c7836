"""Serving while its processes are killed, its model and index are updated, and its replicas come and go.

    python tests/bench/serve_kills.py                     everything
    python tests/bench/serve_kills.py --parts kills       of: kills, updates, scaling

The application runs as an operator runs it, by `serve deploy` of a config file. Clients embed one small text after the
other; every tenth request asks for a short answer, every fifth searches. For each line of the table: requests, those
not answered 200 by status, connections that were refused or broke off, and the longest wait.

kills: every kind of process gets SIGKILL. One host has one proxy: while it is down nobody listens, and a client (or a
    load balancer) has to try again; these do, until somebody listens.
updates: `serve deploy` of another adapter with its index, then of a newer version of the index. `wrong`: replies that
    mix the two models, or name the old one after the update.
scaling: 1 -> 2 -> 1 -> 0 -> 1 replicas by load alone, with delays of seconds.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "platform")]

PARTS = ("kills", "updates", "scaling")
EMBED = ("/v1/embeddings", {"input": "a red circle"})
ANSWER = ("/v1/chat/completions", {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 4})
SEARCH = ("/v1/search", {"query": "a red circle", "k": 3})
LONG = ("/v1/embeddings", {"input": "word " * 100})
VICTIMS = {
    "replica": "ray::ServeReplica:vladva:Colocated",
    "ingress": "ray::ServeReplica:vladva:Ingress",
    "controller": "ray::ServeController",
    "proxy": "ray::ProxyActor",
}
CLIENTS = 4
UNDER_WAY = 48  # clients that one replica is not enough for
SETTLED_S = 300.0


class Load:
    """Clients that ask again and again, and what became of it."""

    def __init__(self, port: int, clients: int = CLIENTS, *, only: tuple[str, dict[str, Any]] | None = None) -> None:
        self.port, self.only = port, only
        self.statuses: Counter[str] = Counter()
        self.unconnected = 0
        self.longest_s = 0.0
        self.last_ok = time.monotonic()
        self.fingerprints: list[tuple[float, str]] = []  # when a request was sent, and which model it was answered by
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.ask, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Load:
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.over.set()
        for thread in self.threads:
            thread.join()

    def ask(self) -> None:
        """One client."""
        number = 0
        while not self.over.is_set():
            number += 1
            began = time.monotonic()
            path, body = self.only or (ANSWER if number % 10 == 0 else SEARCH if number % 5 == 0 else EMBED)
            while (status := self.one(path, body)) is None and not self.over.is_set():
                self.unconnected += 1
                time.sleep(0.25)
            if status is not None:
                self.statuses[str(status)] += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    def one(self, path: str, body: dict[str, Any]) -> int | None:
        """The status of a request; None where nobody listened, or the connection broke off."""
        began = time.monotonic()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=150)
        try:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if response.status == 200:
            self.last_ok = time.monotonic()
            fingerprint = json.loads(content).get("fingerprint")
            if fingerprint:
                self.fingerprints.append((began, fingerprint))
        else:
            print(f"    {response.status} {path}: {content[:200]!r}", flush=True)
        return response.status

    def result(self) -> dict[str, Any]:
        """The line of the table."""
        return {
            "requests": self.statuses.total(),
            "failed": {status: count for status, count in self.statuses.items() if status != "200"},
            "unconnected": self.unconnected,
            "longest_s": round(self.longest_s, 2),
        }

    def settle(self) -> None:
        """Whatever comes back late counts, too."""
        while time.monotonic() - self.last_ok > 1:
            time.sleep(0.5)


class Deployed:
    """An application on this machine's Ray, deployed by `serve deploy`."""

    def __init__(self, folder: Path) -> None:
        from serve.protocol import proxy_errors

        self.file = folder / "serve.yaml"
        self.port, self.dashboard = free_port(), free_port()
        self.config: dict[str, Any] = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "127.0.0.1", "port": self.port},
            "controller_options": proxy_errors.controller_options(),
            "logging_config": {"log_level": "WARNING"},
        }

    def deploy(self, args: dict[str, Any], scaling: dict[str, Any] | None = None) -> None:
        """As an operator types it."""
        application = {"name": "vladva", "route_prefix": "/", "import_path": "serve.app:build", "args": args}
        if scaling:
            application["deployments"] = [{"name": "Colocated", "autoscaling_config": scaling}]
        self.file.write_text(yaml.safe_dump(self.config | {"applications": [application]}))
        command = [
            Path(sys.executable).with_name("serve"),
            "deploy",
            "-a",
            f"http://127.0.0.1:{self.dashboard}",
            self.file,
        ]
        subprocess.run([str(one) for one in command], check=True, stdout=subprocess.DEVNULL)

    def running(self) -> bool:
        """Whether the last config is what runs."""
        from ray import serve

        found = serve.status().applications.get("vladva")
        return found is not None and found.status == "RUNNING"

    def replicas(self) -> int:
        """Replicas of the model that run."""
        from ray import serve

        states = serve.status().applications["vladva"].deployments["Colocated"].replica_states
        return {str(getattr(state, "value", state)): count for state, count in states.items()}.get("RUNNING", 0)

    def get(self, path: str) -> Any:
        """The JSON of a GET."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        response = connection.getresponse()
        return json.loads(response.read())


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def until(what: str, condition: Callable[[], bool]) -> float:
    """Seconds until something is so. Raises TimeoutError."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > SETTLED_S:
            raise TimeoutError(f"not within {SETTLED_S:g} s: {what}")
        time.sleep(0.25)
    return round(time.monotonic() - began, 1)


def processes(title: str) -> list[psutil.Process]:
    """Processes of this Ray whose title begins so."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(title):
                found.append(process)
        except psutil.Error:
            continue
    return found


def killed(deployed: Deployed, title: str | None, recovery_s: float) -> dict[str, Any]:
    """What a load sees while one process of this title is killed, and for a while after."""
    with Load(deployed.port) as load:
        time.sleep(3)
        if title:
            os.kill(processes(title)[0].pid, signal.SIGKILL)
        time.sleep(recovery_s)
        load.settle()
    return load.result()


def updated(deployed: Deployed, args: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """What a load sees while another config is deployed."""
    with Load(deployed.port) as load:
        time.sleep(3)
        deployed.deploy(args)
        time.sleep(1)
        seconds = until("the update is over", deployed.running)
        time.sleep(6)  # what an ingress has heard of the model is believed for 5 s
        over = time.monotonic()
        time.sleep(5)
    old = [one for sent, one in load.fingerprints if sent > over and one != fingerprint]
    listed = deployed.get("/v1/models")["data"][0]["fingerprint"]
    return {**load.result(), "update_s": seconds, "wrong": len(old) + (listed != fingerprint)}


def scaled(deployed: Deployed, args: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What loads see while replicas come and go."""
    scaling = {
        "min_replicas": 0,
        "max_replicas": 2,
        "initial_replicas": 1,
        "target_ongoing_requests": 16,
        "look_back_period_s": 2,
        "upscale_delay_s": 2,
        "downscale_delay_s": 5,
        "metrics_interval_s": 1,
    }
    deployed.deploy(args | {"min_replicas": 0}, scaling)
    until("the application runs", deployed.running)
    with Load(deployed.port, clients=1):
        until("one replica", lambda: deployed.replicas() == 1)
        with Load(deployed.port, UNDER_WAY, only=LONG) as load:
            seconds = until("two replicas", lambda: deployed.replicas() == 2)
            time.sleep(5)
        yield "1 -> 2", {**load.result(), "seconds": seconds}
    with Load(deployed.port, clients=1) as load:
        seconds = until("one replica", lambda: deployed.replicas() == 1)
    yield "2 -> 1", {**load.result(), "seconds": seconds}
    seconds = until("no replica", lambda: deployed.replicas() == 0)
    ready = deployed.get("/ready")
    failed = {} if ready.get("asleep") else {str(ready): 1}
    time.sleep(10)
    if deployed.replicas():
        failed["it does not sleep"] = 1
    yield "1 -> 0", {"requests": 1, "failed": failed, "seconds": seconds}
    unready: Counter[str] = Counter()

    def answers() -> bool:
        ready = deployed.get("/ready")
        if ready.get("status") != "ready":
            unready[str(ready)] += 1
        return load.statuses.total() > 20

    with Load(deployed.port, clients=2) as load:
        until("answers", answers)
    woken = load.result()
    yield "0 -> 1", woken | {"failed": {**woken["failed"], **unready}}


def model_and_index(folder: Path, seed: int) -> tuple[dict[str, Any], str]:
    """Arguments of an application with an adapter and its index, and the fingerprint."""
    import numpy as np

    from tests.support.wire import CAPTIONS, noise_image, shaken_adapter, write_index
    from vladva.models.embedder import load_embedder

    folder.mkdir()
    run = shaken_adapter(folder / "run", seed)
    embedder = load_embedder(run)
    vectors = embedder.embed_images([noise_image(i) for i in range(len(CAPTIONS))])
    index = write_index(folder, embedder.description(), np.asarray(vectors))
    common = {"num_cpus": 0, "ingress_cpus": 0, "min_replicas": 2, "max_replicas": 2, "name": "seaside"}
    return {"model": run, "index": index, "index_version": "first", **common}, embedder.fingerprint


def measured(parts: list[str], recovery_s: float, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of the table."""
    import ray
    from ray import serve

    from serve.app import wait_until_ready

    (args, _), (others, fingerprint) = model_and_index(folder / "first", 0), model_and_index(folder / "second", 1)
    deployed = Deployed(folder)
    os.environ["PYTHONPATH"] = f"{ROOT / 'platform'}{os.pathsep}{ROOT}"  # Serve's controller is no worker of ours
    ray.init("local", num_cpus=4, include_dashboard=True, dashboard_port=deployed.dashboard, log_to_driver=False)
    try:
        deployed.deploy(args)
        wait_until_ready(f"http://127.0.0.1:{deployed.port}")
        until("the application runs", deployed.running)
        if "kills" in parts:
            yield "nothing", killed(deployed, None, 7)
            for name, title in VICTIMS.items():
                yield name, killed(deployed, title, recovery_s)
        if "updates" in parts:
            yield "another model", updated(deployed, others, fingerprint)
            newest = {name: value for name, value in others.items() if name != "index_version"}
            yield "newer index", updated(deployed, newest, fingerprint)
        if "scaling" in parts:
            yield from scaled(deployed, args)
    finally:
        serve.shutdown()
        ray.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--recovery-s", type=float, default=30, help="how long each kind is watched after the kill")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: no {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, result in measured(parts, options.recovery_s, Path(folder)):
            results[name] = result
            print(f"{name:16} {result}", flush=True)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
