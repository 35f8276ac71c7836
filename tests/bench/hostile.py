"""Serving under fire: thousands of hostile requests, with small ones and health checks beside them.

    python tests/bench/hostile.py --requests 10000

Prints what went wrong, then one line of JSON: answers by status, complaints (5xx, no answer, not the one error shape),
actors that died, memory of all replicas before and after, and the slowest health check and small request. Beside each
aimed attack (a body of 60 MB, 400,000 wrong elements, stalled uploads...) the slowest of both is told, too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[2] / "platform")]

from tests.support.hostile_requests import complaint, exchange, hostile_requests, http_request, json_bytes  # noqa: E402

HEALTH = http_request("GET", "/health", b"")
SMALL = http_request("POST", "/v1/embeddings", b'{"input": "a red circle"}')
PAUSE_S = 0.1  # between two health checks, and between two small requests


class Slowest:
    """The longest that one kind of request took, and how many did not succeed."""

    def __init__(self) -> None:
        self.seconds, self.failed, self.sent = 0.0, 0, 0

    async def probe(self, port: int, request: bytes) -> None:
        """One request."""
        began = time.monotonic()
        answer = await exchange("127.0.0.1", port, request)
        self.seconds = max(self.seconds, time.monotonic() - began)
        self.sent += 1
        self.failed += not answer.startswith(b"HTTP/1.1 200")


@contextmanager
def probes(port: int) -> Iterator[tuple[Slowest, Slowest]]:
    """Health checks and small requests, one after the other, as long as the block runs.

    In a process of their own: making a hostile body of 60 MB here would keep them waiting, too.
    """
    health, small = Slowest(), Slowest()
    processes = multiprocessing.get_context("spawn")
    here, there = processes.Pipe()
    process = processes.Process(target=probe_until_told, args=(port, there))
    process.start()
    here.recv()  # it has begun
    try:
        yield health, small
    finally:
        here.send("end")
        for slowest, found in zip((health, small), here.recv(), strict=True):
            slowest.__dict__.update(found.__dict__)
        process.join()


def probe_until_told(port: int, starter: Connection) -> None:
    """Probe until the one who started this process says so; tell it what was found."""
    found = Slowest(), Slowest()

    async def again_and_again(request: bytes, slowest: Slowest) -> None:
        while True:
            await slowest.probe(port, request)
            await asyncio.sleep(PAUSE_S)

    async def run() -> None:
        tasks = [asyncio.create_task(again_and_again(*one)) for one in zip((HEALTH, SMALL), found, strict=True)]
        starter.send("begun")
        await asyncio.to_thread(starter.recv)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(run())
    starter.send(found)


async def crowd(port: int, requests: Iterator[bytes], at_a_time: int) -> tuple[Counter[str], list[str]]:
    """(answers by status, complaints) of many requests."""
    statuses: Counter[str] = Counter()
    complaints: list[str] = []

    async def worker() -> None:
        for sent in requests:
            answer = await exchange("127.0.0.1", port, sent)
            statuses[answer[9:12].decode("latin-1") or "none"] += 1
            wrong = complaint(answer)
            if wrong:
                complaints.append(f"{wrong} after {sent[:200]!r}")

    await asyncio.gather(*[worker() for _ in range(at_a_time)])
    return statuses, complaints


def attacks() -> dict[str, Callable[[int], Any]]:
    """Name -> what is done to the server at the port: those that took it down before."""

    def post(path: str, body: Any) -> Callable[[int], Any]:
        sent = http_request("POST", path, body if isinstance(body, bytes) else json_bytes(body))
        return lambda port: exchange("127.0.0.1", port, sent)

    async def stalled(port: int) -> bytes:
        start = (
            b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 9\r\n\r\n{"
        )
        open_ones = [await asyncio.open_connection("127.0.0.1", port) for _ in range(1050)]
        for _, writer in open_ones:
            writer.write(start)
        await asyncio.sleep(5)
        answers = [reader._buffer for reader, _ in open_ones]  # type: ignore[attr-defined]
        for _, writer in open_ones:
            writer.close()
        return bytes(next((answer for answer in answers if answer), b""))

    chat = "/v1/chat/completions"
    stops = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4, "stop": ["x" * 200_000] * 4}
    return {
        "one text of 60 MB": post("/v1/embeddings", {"input": "word " * 12_000_000}),
        "one text of 20 MB in a conversation": post(
            chat, {"messages": [{"role": "user", "content": "a" * 20_000_000}]}
        ),
        "messages: 400,000 x 0": post(chat, b'{"messages": [' + b"0," * 400_000 + b"0]}"),
        "200,000 texts": post("/v1/embeddings", {"input": ["a"] * 200_000}),
        "nested 100,000 deep": post("/v1/embeddings", b"[" * 100_000),
        "1,050 bodies that stop": stalled,
        "4 stop strings of 200,000": post(chat, stops),
        "60 MB of base64": post("/v1/embeddings", {"input": "data:image/png;base64," + "A" * 60_000_000}),
        "6,000,000 percent signs": post("/v1/embeddings", {"input": "data:image/png;base64," + "%41" * 6_000_000}),
        "100,000 unknown fields": post(
            "/v1/score", {"queries": "a", "documents": "b", **{f"x{i}": i for i in range(100_000)}}
        ),
        "a template of 2,000 places": post(
            "/v1/classify", {"input": "a", "labels": [f"{i:05}" * 100 for i in range(2000)], "template": "{}" * 2000}
        ),
        "2,000 inputs by 2,000 labels": post(
            "/v1/classify", {"input": ["a"] * 2000, "labels": [f"b{i}" for i in range(2000)]}
        ),
        "5,000 types of vectors": post("/v2/embed", {"texts": ["a"] * 2000, "embedding_types": ["float"] * 5000}),
        "60 MB of backslashes": post("/v1/embeddings", b'{"input": "' + b"\\" * 60_000_000 + b'"}'),
    }


def memory_mb() -> float:
    """Memory of all of Serve's processes."""
    total = 0
    for process in psutil.Process().children(recursive=True):
        try:
            if "ServeReplica" in process.name() or "Proxy" in process.name() or "ray::" in " ".join(process.cmdline()):
                total += process.memory_info().rss
        except psutil.Error:
            continue
    return total / 2**20


def replicas() -> set[str]:
    """The actors of the application; one that dies is replaced by one of another name."""
    import ray

    return {one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "SERVE" in one["name"]}


async def run(port: int, requests: int, at_a_time: int, seed: int) -> dict[str, Any]:
    """The figures."""
    for _ in range(20):
        await exchange("127.0.0.1", port, SMALL)
    with probes(port) as (health, small):
        await asyncio.sleep(10)
    alone = {"health_s": round(health.seconds, 3), "small_s": round(small.seconds, 3)}
    print(f"alone: {alone}")
    aimed, complaints = {}, []
    for name, attack in attacks().items():
        began = time.monotonic()
        with probes(port) as (health, small):
            await asyncio.sleep(1)
            answer = await attack(port)
            await asyncio.sleep(1)
        wrong = complaint(answer)
        complaints += [f"{name}: {wrong}"] if wrong else []
        aimed[name] = {
            "status": answer[9:12].decode(),
            "seconds": round(time.monotonic() - began - 2, 2),
            "health_s": round(health.seconds, 3),
            "small_s": round(small.seconds, 3),
        }
        print(f"{name}: {aimed[name]}")
    # The first tenth is not counted: allocators keep what they once had.
    sent = (request.sent for request in hostile_requests(seed, requests))
    first = [next(sent) for _ in range(requests // 10)]
    statuses, wrong_ones = await crowd(port, iter(first), at_a_time)
    before = memory_mb()
    began = time.monotonic()
    with probes(port) as (health, small):
        more, wrong_later = await crowd(port, sent, at_a_time)
    seconds = time.monotonic() - began
    complaints += wrong_ones + wrong_later
    for text, count in Counter(complaints).most_common(20):
        print(f"{count} x {text}")
    statuses += more
    return {
        "requests": sum(statuses.values()),
        "statuses": dict(sorted(statuses.items())),
        "complaints": len(complaints),
        "requests_per_s": round(requests * 0.9 / seconds, 1),
        "memory_mb": [round(before), round(memory_mb())],
        "health_s": round(health.seconds, 3),
        "small_s": round(small.seconds, 3),
        "probes_failed": health.failed + small.failed,
        "alone": alone,
        "aimed": aimed,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--at-a-time", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    import numpy as np
    import ray

    from serve.app import start, stop
    from serve.config import ServeArgs
    from tests.support.wire import CAPTIONS, noise_image, write_index
    from vladva.models.embedder import load_embedder

    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        embedder = load_embedder("tiny")
        vectors = embedder.embed_images([noise_image(i) for i in range(len(CAPTIONS))])
        index = write_index(Path(folder), embedder.description(), np.asarray(vectors))
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        # By default Ray's workers are nice, and would leave the cores to the clients.
        ray.init("local", num_cpus=4, include_dashboard=False, _system_config={"worker_niceness": 0})
        start(ServeArgs(model="tiny", index=index, num_cpus=0, max_replicas=1), port=port)
        before = replicas()
        figures = asyncio.run(run(port, options.requests, options.at_a_time, options.seed))
        figures["deaths"] = len(before - replicas())
        stop()
        ray.shutdown()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
