#!/usr/bin/env python
"""What one replica of both modes does: decoding together, memory, throughput beside the bare forward, overload.

    tests/bench/serving.py                       everything
    tests/bench/serving.py --parts engine        without HTTP
    tests/bench/serving.py --parts bare,overload of a server, and so on: layouts, bare, overload
    tests/bench/serving.py --model tiny          the tiny model, in place of the random LLaVA of 186M parameters

Two cores; the 186M model in bfloat16. What is compared runs in the same minutes and takes turns; medians count.

engine (one process, the engine as a replica has it):
- `concurrent_decode`: tokens per second of 8 conversations at the same time, over those of the same 8 one by one.
- `first_token_steps`: steps of the engine from the arrival of a conversation to its first token while 7 others are
  being answered; `first_token_ratio`: the same in time, over the time of a step before.

The others ask a real server of two cores, with clients in a process of their own on the same cores.

bare:
- `throughput_vs_bare`: single-item requests per second of 32 clients, over the items per second of the bare forward at
  its best batch size, with the inputs made beforehand; of images, and of texts. `mean_batch` is that of the engine.
- `cpu_ms_per_request`: CPU time of Serve's proxy, the ingress and the replica for each of these requests, less what
  the bare forward takes for it.

overload:
- `overload_goodput`: answers in time at twice the highest rate, over the highest rate. `late`: those past the deadline.

layouts:
- `colocated_memory`: memory of the replicas (proportional set size) that serve both modes from one copy of the
  weights, over that of `layout=separate`.
- `colocated_throughput`: how much faster they get through a mixed load, embeddings and conversations.

The last line is JSON. (Not `serve.py`: beside the scripts of this folder that name would hide the package.)
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import json
import multiprocessing
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2]))

import random_llava

THREADS, STREAMS, ANSWER_TOKENS, TURNS = 2, 8, 48, 3
CLIENTS, LOAD_S, DEADLINE_S, QUEUE_S = 32, 10.0, 10.0, 3.0
NOT_NICE = {"worker_niceness": 0}
PARTS = ("engine", "layouts", "bare", "overload")
BATCH_SIZES = (8, 16, 32, 64)
QUESTION = "what is it, and what is to the left of it?"


# ------------------------------------------------------------------------------------------------------------- engine


def engine_part(checkpoint: str, dtype: str, threads: int, turns: int) -> dict[str, Any]:
    """Decoding together, and how long a new conversation waits."""
    import torch

    from serve.deployments.engine import EngineLimits, ModelEngine, Said, TokenSampling
    from serve.deployments.runner import Encoded
    from serve.deployments.runners import runners_of
    from vladva.models.embedder import Embedder, load_embedder
    from vladva.models.generation import AnswerText

    torch.set_num_threads(threads)
    embedder = load_embedder(checkpoint, dtype=dtype)
    assert isinstance(embedder, Embedder)
    tokenizer = embedder.preprocessor.tokenizer
    limits = EngineLimits(4096, 512, 0.0, 32, 16_384, 65_536, 60)
    engine = ModelEngine(*runners_of(embedder), limits, ends=set(), text=lambda s: AnswerText(tokenizer, s), score=list)
    ids = embedder.preprocessor.render([{"role": "user", "content": [{"type": "text", "text": QUESTION}]}])
    encoded = Encoded(ids, None, len(ids))

    async def answer(tokens: int, told: list[tuple[float, int]] | None = None) -> None:
        async for said in engine.answer(encoded, TokenSampling(tokens), 300):
            assert isinstance(said, Said), said
            if told is not None:
                told.append((time.perf_counter(), engine.counters.steps))

    async def together() -> None:
        await asyncio.gather(*[answer(ANSWER_TOKENS) for _ in range(STREAMS)])

    async def one_by_one() -> None:
        for _ in range(STREAMS):
            await answer(ANSWER_TOKENS)

    async def join() -> tuple[int, float]:
        tasks = [asyncio.create_task(answer(400)) for _ in range(STREAMS - 1)]
        first, start = engine.counters.steps, time.perf_counter()
        while engine.counters.steps < first + 25:
            await asyncio.sleep(0.01)
        began, step = time.perf_counter(), engine.counters.steps
        mine: list[tuple[float, int]] = []
        await answer(1, mine)
        [(ended, last)] = mine
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return last - step + 1, (ended - began) / ((began - start) / (step - first))

    ratios, steps, times = [], [], []
    asyncio.run(together())
    for _ in range(turns):
        ratios.append(timed(one_by_one) / timed(together))
        print(f"8 together over one by one: {ratios[-1]:.2f}", flush=True)
        for _ in range(2):
            count, ratio = asyncio.run(join())
            steps.append(count)
            times.append(ratio)
    engine.close()
    return {
        "concurrent_decode": round(median(ratios), 2),
        "concurrent_decode_turns": [round(one, 2) for one in ratios],
        "first_token_steps": max(steps),
        "first_token_ratio": round(median(times), 2),
    }


def timed(work: Callable[[], Coroutine[Any, Any, None]]) -> float:
    """Seconds that it takes."""
    began = time.perf_counter()
    asyncio.run(work())
    return time.perf_counter() - began


# --------------------------------------------------------------------------------------------------------------- bare


def bare_rates(checkpoint: str, dtype: str) -> dict[str, tuple[float, float]]:
    """(items per second, CPU seconds of an item) of the forward at its best batch size, inputs made beforehand."""
    import torch

    from vladva.models.batch import as_tensors
    from vladva.models.embedder import Embedder, load_embedder

    torch.set_num_threads(THREADS)
    embedder = load_embedder(checkpoint, dtype=dtype)
    assert isinstance(embedder, Embedder)
    preprocessor = embedder.preprocessor
    rates = {}
    images = random_llava.images(32)
    for kind in ("text", "image"):
        best = (0.0, 0.0)
        for size in BATCH_SIZES if kind == "text" else BATCH_SIZES[:3]:
            if kind == "text":
                prompts = [preprocessor.text_prompt(text) for text in random_llava.texts(size)]
                pixels = None
            else:
                prompts = [preprocessor.image_prompt(image.size) for image in images[:size]]
                pixels = as_tensors(preprocessor.pixels(images[:size]), "cpu")
            tokens = as_tensors(preprocessor.pad([(prompt, []) for prompt in prompts]), "cpu")
            with torch.inference_mode():
                embedder.forward(tokens, pixels)
                seconds, used = [], time.process_time()
                for _ in range(4):
                    began = time.perf_counter()
                    embedder.forward(tokens, pixels)
                    seconds.append(time.perf_counter() - began)
                used = time.process_time() - used
            best = max(best, (size / median(seconds), used / 4 / size))
        rates[kind] = best
    return rates


# --------------------------------------------------------------------------------------------------------------- http


def bodies(kind: str) -> list[bytes]:
    """Requests of one item each."""
    if kind == "text":
        return [json.dumps({"input": text}).encode() for text in random_llava.texts(256)]
    found = []
    for image in random_llava.images(32):
        file = io.BytesIO()
        image.save(file, "JPEG", quality=90)
        uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        found.append(json.dumps({"input": uri}).encode())
    return found


CHAT = json.dumps({"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 32, "temperature": 2.0}).encode()


def load(url: str, order: dict[str, Any]) -> dict[str, Any]:
    """A client's process: closed loops of clients, an open loop of a rate, or a fixed amount of mixed work."""
    return asyncio.run({"closed": closed, "open": opened, "mixed": mixed}[order["loop"]](url, **order["of"]))


async def send(session: Any, url: str, path: str, body: bytes) -> int:
    """The status of an answer; 0 where none came in time."""
    try:
        async with session.post(f"{url}{path}", data=body, headers={"Content-Type": "application/json"}) as response:
            await response.read()
            return response.status
    except asyncio.TimeoutError:
        return 0


def session_of(seconds: float = 300.0) -> Any:
    """A session without a limit of connections."""
    import aiohttp

    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=seconds))


async def closed(url: str, kind: str, clients: int, seconds: float) -> dict[str, Any]:
    """Answers per second of so many clients, each of which sends when it is answered."""
    sent = bodies(kind)
    statuses: Counter[int] = Counter()
    async with session_of() as session:
        end = time.perf_counter() + seconds

        async def client(number: int) -> None:
            picks = random.Random(number)
            while time.perf_counter() < end:
                status = await send(session, url, "/v1/embeddings", picks.choice(sent))
                statuses[status] += 1
                if status != 200:
                    await asyncio.sleep(1)  # as it was told to

        began = time.perf_counter()
        await asyncio.gather(*[client(number) for number in range(clients)])
        rate = statuses[200] / (time.perf_counter() - began)
        return {"answers": statuses[200], "rate": rate, "refused": statuses.total() - statuses[200]}


async def opened(url: str, kind: str, rate: float, seconds: float) -> dict[str, Any]:
    """Statuses of requests that come at a rate, whatever becomes of those before."""
    sent, picks = bodies(kind), random.Random(0)
    statuses: Counter[int] = Counter()
    async with session_of(DEADLINE_S) as session:

        async def one() -> None:
            statuses[await send(session, url, "/v1/embeddings", picks.choice(sent))] += 1

        tasks, began = [], time.perf_counter()
        while time.perf_counter() < began + seconds:
            tasks.append(asyncio.create_task(one()))
            await asyncio.sleep(picks.expovariate(rate))
        await asyncio.gather(*tasks)
        return {"statuses": statuses, "seconds": time.perf_counter() - began}


async def mixed(url: str, embeddings: int, answers: int) -> dict[str, Any]:
    """Seconds that so many single-item embeddings, by 16 clients, and answers, by 8, take together."""
    texts, images = bodies("text"), bodies("image")
    work = {"/v1/embeddings": [(texts, images)[i % 4 == 0][i % 32] for i in range(embeddings)]}
    work["/v1/chat/completions"] = [CHAT] * answers
    async with session_of() as session:

        async def client(path: str) -> None:
            while work[path]:
                body = work[path].pop()
                while (status := await send(session, url, path, body)) == 429:
                    await asyncio.sleep(1)  # as it was told to
                assert status == 200, (path, status)

        began = time.perf_counter()
        clients = [*["/v1/embeddings"] * 16, *["/v1/chat/completions"] * 8]
        await asyncio.gather(*[client(path) for path in clients])
        return {"seconds": time.perf_counter() - began}


def serve_processes() -> dict[str, list[Any]]:
    """This machine's processes of Serve, by what they are."""
    import psutil

    found: dict[str, list[Any]] = {"replica": [], "ingress": [], "proxy": []}
    for process in psutil.process_iter(["cmdline"]):
        name = " ".join(process.info["cmdline"] or [])
        if name.startswith("ray::ServeReplica:vladva"):
            found["ingress" if ":Ingress" in name else "replica"].append(process)
        elif name.startswith("ray::ProxyActor"):
            found["proxy"].append(process)
    return found


def cpu_seconds() -> dict[str, float]:
    """CPU time that each kind of process has taken so far."""
    return {
        name: sum(sum(process.cpu_times()[:2]) for process in processes)
        for name, processes in serve_processes().items()
    }


class Server:
    """An application on this machine's Ray, and the clients' process."""

    def __init__(self, pool: Any, **arguments: Any) -> None:
        from serve.app import start
        from serve.config import ServeArgs

        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.pool = pool
        self.url = start(ServeArgs(max_replicas=1, max_queue_s=QUEUE_S, **arguments), port=port)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        from serve.app import stop

        stop()

    def run(self, loop: str, **of: Any) -> dict[str, Any]:
        """What the clients' process finds."""
        return self.pool.apply(load, (self.url, {"loop": loop, "of": of}))

    def counters(self, deployment: str) -> Any:
        """What the engine has done so far."""
        from ray import serve

        return serve.get_deployment_handle(deployment, "vladva").load.remote().result().counters

    def memory(self) -> int:
        """Proportional set size of the replicas that hold the model."""
        return sum(process.memory_full_info().pss for process in serve_processes()["replica"])


def layouts_part(pool: Any, common: dict[str, Any], work: dict[str, int], turns: int) -> dict[str, Any]:
    """Memory, and a mixed load, in both layouts."""
    found: dict[str, Any] = {}
    mixed_s: dict[str, list[float]] = {}
    for layout, cpus in (("separate", 1), ("colocated", THREADS)):
        with Server(pool, layout=layout, num_cpus=cpus, **common) as server:
            server.run("mixed", embeddings=32, answers=8)  # kernels are compiled, memory is taken
            mixed_s[layout] = [server.run("mixed", **work)["seconds"] for _ in range(turns)]
            found[f"{layout}_bytes"] = server.memory()
            print(f"{layout}: {mixed_s[layout]} s, {found[f'{layout}_bytes'] / 2**20:.0f} MiB", flush=True)
    return found | {
        "colocated_memory": round(found["colocated_bytes"] / found["separate_bytes"], 3),
        "colocated_throughput": round(median(mixed_s["separate"]) / median(mixed_s["colocated"]), 2),
        "mixed_seconds": {name: [round(one, 2) for one in values] for name, values in mixed_s.items()},
    }


def bare_part(server: Server, bare: Any, checkpoint: str, dtype: str, *, seconds: float, turns: int) -> dict[str, Any]:
    """Throughput of single-item requests beside the bare forward, in turns."""
    found: dict[str, Any] = {}
    rates: dict[str, list[float]] = {"text": [], "image": []}
    plain: dict[str, list[float]] = {"text": [], "image": []}
    model_s: dict[str, float] = {}
    batches: dict[str, list[float]] = {"text": [], "image": []}
    cpu: dict[str, dict[str, float]] = {}
    for kind in rates:
        server.run("closed", kind=kind, clients=CLIENTS, seconds=seconds / 3)  # kernels are compiled
    for _ in range(turns):
        for kind, (rate, model_s[kind]) in bare.apply(bare_rates, (checkpoint, dtype)).items():
            plain[kind].append(rate)
        for kind, values in rates.items():
            before, used = server.counters("Colocated"), cpu_seconds()
            result = server.run("closed", kind=kind, clients=CLIENTS, seconds=seconds)
            after, then = server.counters("Colocated"), cpu_seconds()
            values.append(result["rate"])
            batches[kind].append((after.batch_items - before.batch_items) / (after.batches - before.batches))
            cpu[kind] = {name: (then[name] - used[name]) / result["answers"] * 1e3 for name in then}
            print(f"{kind}: {values[-1]:.1f}/s, bare {plain[kind][-1]:.1f}/s, {cpu[kind]} ms", flush=True)
            found["refused"] = found.get("refused", 0) + result["refused"]  # so many clients are no overload
    for kind, values in rates.items():
        found[f"throughput_vs_bare_{kind}"] = round(median(values) / median(plain[kind]), 2)
        found[f"{kind}s_per_s"] = round(median(values), 1)
        found[f"bare_{kind}s_per_s"] = round(median(plain[kind]), 1)
        found[f"mean_batch_{kind}"] = round(median(batches[kind]), 1)
        found[f"cpu_ms_per_request_{kind}"] = round(sum(cpu[kind].values()) - model_s[kind] * 1e3, 1)
        found[f"bare_cpu_ms_{kind}"] = round(model_s[kind] * 1e3, 1)
        found[f"cpu_ms_{kind}"] = {name: round(value, 1) for name, value in cpu[kind].items()}
    return found


def overload_part(server: Server, seconds: float) -> dict[str, Any]:
    """Answers in time at twice the highest rate."""
    server.run("closed", kind="image", clients=CLIENTS, seconds=seconds / 3)
    peak = server.run("closed", kind="image", clients=CLIENTS, seconds=seconds)["rate"]
    result = server.run("open", kind="image", rate=2 * peak, seconds=2 * seconds)
    statuses = result["statuses"]
    return {
        "overload_peak": round(peak, 1),
        "overload_goodput": round(statuses.get(200, 0) / result["seconds"] / peak, 2),
        "overload_statuses": statuses,
        "late": statuses.get(0, 0) + statuses.get(408, 0),
    }


def server_parts(parts: list[str], checkpoint: str, dtype: str, *, seconds: float, turns: int) -> dict[str, Any]:
    """What a server does."""
    import ray

    # By default Ray's workers are nice, and would leave the cores to the clients.
    ray.init("local", num_cpus=THREADS * 2, include_dashboard=False, log_to_driver=False, _system_config=NOT_NICE)
    found: dict[str, Any] = {}
    common = {"model": checkpoint, "dtype": dtype}
    work = {"embeddings": 96, "answers": 12} if checkpoint != "tiny" else {"embeddings": 1500, "answers": 120}
    processes = multiprocessing.get_context("spawn")
    with processes.Pool(1) as pool, processes.Pool(1) as bare:
        if "layouts" in parts:
            found |= layouts_part(pool, common, work, turns)
        if {"bare", "overload"} & set(parts):
            with Server(pool, num_cpus=THREADS, **common) as server:
                if "bare" in parts:
                    found |= bare_part(server, bare, checkpoint, dtype, seconds=seconds, turns=turns)
                if "overload" in parts:
                    found |= overload_part(server, seconds)
    ray.shutdown()
    return found


def main() -> None:
    """Measure, and print a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure")
    parser.add_argument("--model", choices=["random", "tiny"], default="random")
    parser.add_argument("--threads", type=int, default=THREADS, help="of the engine part")
    parser.add_argument("--turns", type=int, default=TURNS, help="how often each is measured")
    parser.add_argument("--seconds", type=float, default=LOAD_S, help="of each load")
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: no {sorted(unknown)[0]!r}; there are {', '.join(PARTS)}")
    result: dict[str, Any] = {"model": options.model}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, dtype = "tiny", "float32"
        if options.model == "random":
            checkpoint, dtype = random_llava.build_random_llava(Path(folder) / "llava"), "bfloat16"
        if "engine" in parts:
            result |= engine_part(checkpoint, dtype, options.threads, options.turns)
        if parts != ["engine"]:
            result |= server_parts(parts, checkpoint, dtype, seconds=options.seconds, turns=options.turns)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
