"""Serving while its processes are killed: every kind of process gets SIGKILL under steady load.

    python tests/bench/serve_kills.py

Clients send one small embedding request after the other; every tenth asks for a short answer. One line for each kind of
process: requests, those not answered 200 by status, connections that were refused or broke off, and the longest wait.
One host has one proxy: while it is down nobody listens, and a client (or a load balancer) has to try again; these do,
until somebody listens. The last line is JSON.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "platform")]

EMBED = ("/v1/embeddings", json.dumps({"input": "a red circle"}))
ANSWER = (
    "/v1/chat/completions",
    json.dumps({"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 4}),
)
CLIENTS = 4


class Load:
    """Clients that ask again and again, and what became of it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.statuses: Counter[str] = Counter()
        self.unconnected = 0
        self.longest_s = 0.0
        self.last_ok = time.monotonic()
        self.over = threading.Event()
        self.threads = [threading.Thread(target=self.ask, daemon=True) for _ in range(CLIENTS)]

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
            path, body = ANSWER if number % 10 == 0 else EMBED
            while (status := self.one(path, body)) is None and not self.over.is_set():
                self.unconnected += 1
                time.sleep(0.25)
            if status is not None:
                self.statuses[str(status)] += 1
                self.longest_s = max(self.longest_s, time.monotonic() - began)

    def one(self, path: str, body: str) -> int | None:
        """The status of a request; None where nobody listened, or the connection broke off."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=150)
        try:
            connection.request("POST", path, body, {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        if response.status == 200:
            self.last_ok = time.monotonic()
        return response.status


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


def killed(port: int, title: str, recovery_s: float) -> dict[str, Any]:
    """What a load sees while one process of this title is killed, and for a while after."""
    with Load(port) as load:
        time.sleep(3)
        victim = processes(title)[0]
        os.kill(victim.pid, signal.SIGKILL)
        time.sleep(recovery_s)
        while time.monotonic() - load.last_ok > 1:  # whatever comes back late counts, too
            time.sleep(0.5)
    failed = {status: count for status, count in load.statuses.items() if status != "200"}
    return {
        "requests": load.statuses.total(),
        "failed": failed,
        "unconnected": load.unconnected,
        "longest_s": round(load.longest_s, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recovery-s", type=float, default=30, help="how long each kind is watched after the kill")
    options = parser.parse_args()

    import ray

    from serve.app import start, stop
    from serve.config import ServeArgs
    from tests.support.wire import shaken_adapter

    with tempfile.TemporaryDirectory() as folder:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        ray.init("local", num_cpus=4, include_dashboard=False, logging_level="WARNING")
        model = shaken_adapter(Path(folder) / "seaside")
        start(ServeArgs(model=model, num_cpus=0, max_replicas=2, min_replicas=2), port=port)
        titles = {process.cmdline()[0].split(":vladva:")[-1]: process for process in processes("ray::ServeReplica")}
        victims = {name: f"ray::ServeReplica:vladva:{name}" for name in sorted(titles)}
        victims |= {"controller": "ray::ServeController", "proxy": "ray::ProxyActor"}
        results = {"none": killed_nothing(port)}
        for name, title in victims.items():
            results[name] = killed(port, title, options.recovery_s)
            print(f"{name:16} {results[name]}", flush=True)
        stop()
        ray.shutdown()
    print(json.dumps(results))


def killed_nothing(port: int) -> dict[str, Any]:
    """The same load undisturbed."""
    with Load(port) as load:
        time.sleep(10)
    return {"requests": load.statuses.total(), "longest_s": round(load.longest_s, 2)}


if __name__ == "__main__":
    main()
