#!/usr/bin/env python3
"""Doctor: what this node has, and what is wrong with it.

    cluster/doctor.py                                     this machine
    cluster/doctor.py --storage s3://bucket/runs          can it write, read and delete there, and how fast
    cluster/doctor.py --all-nodes                         every node of the running Ray cluster, and between them
    cluster/doctor.py --all-nodes --recipe RECIPE         and does the object store hold what it reads ahead
    ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python cluster/doctor.py --all-nodes

Nodes are examined at the same time, each check for a limited time. With several nodes: is storage the same everywhere,
do the clocks agree, does every node reach every other, how fast is a sum over all of them, is the dashboard closed.

Exit status 0 when nothing is wrong; otherwise 1, and a line for each trouble that says what to do. It needs nothing but
Python to start, so that it can say what is missing. With --json it prints one object and nothing else.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import re
import resource
import secrets
import shutil
import socket
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
MODULES = ("torch", "ray", "transformers", "peft", "deepspeed", "pyarrow", "lance", "lance_ray", "vladva")
MIN_SHARED_MEMORY = 1 << 30  # bytes; a container without --shm-size gets 64 MiB, and Ray's object store goes to disk
MIN_OPEN_FILES = 8192
TIME_LIMITS = {"imports": 180.0, "devices": 120.0, "DeepSpeed op": 420.0, "storage": 90.0}  # seconds
TIME_LIMIT = 60.0  # of every other check
STORAGE_BYTES = 8 << 20  # written and read to tell the speed
SLOW_STORAGE = 5.0  # MB/s below which training and embedding wait for data
MAX_SKEW = 1.0  # seconds between two clocks; signatures of S3 allow minutes, logs and time limits do not
REDUCED_BYTES = 16 << 20  # of the vector that all nodes sum
SLOW_NETWORK = 0.05  # GB/s below which gradients take longer than computing them
SLOW_DEVICE = 0.7  # of the median of the same kind
IMAGE_BYTES = 3 * 640 * 480  # in the object store: pixels stay bytes until they are on the device
CHUNKS_AHEAD = 3  # chunks of each worker that wait in the object store, at the least
CLUSTER = "between the nodes"


@dataclass(frozen=True)
class Finding:
    """What a check found; `trouble` says what to do, and is empty when nothing is wrong."""

    found: str
    trouble: str = ""
    figures: dict[str, float] = field(default_factory=dict)  # what was measured


Findings = dict[str, Finding]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", help="folder or s3:// URI to try")
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS, help="the versions to compare with")
    parser.add_argument("--all-nodes", action="store_true", help="ask every node of the running Ray cluster")
    parser.add_argument("--recipe", help="as in jobs/train.py: whether the cluster's object store is enough for it")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args = parser.parse_args()
    if not args.constraints.is_file():
        sys.exit(f"doctor: there is no {args.constraints}; --constraints takes the repository's constraints.txt")
    pins = read_pins(args.constraints.read_text())
    if args.all_nodes:
        nodes = examine_cluster(pins, args.storage, args.recipe)
    else:
        nodes = {platform.node(): examine(pins, args.storage)}
    status = report(nodes, as_json=args.json)
    sys.stdout.flush()
    os._exit(status)  # a check that hangs in a thread must not keep the doctor


def report(nodes: Mapping[str, Findings], *, as_json: bool = False) -> int:
    """Prints what was found on each node; returns the exit status."""
    troubles = sum(bool(finding.trouble) for findings in nodes.values() for finding in findings.values())
    if as_json:
        content = {node: {subject: asdict(each) for subject, each in found.items()} for node, found in nodes.items()}
        print(json.dumps({"troubles": troubles, "nodes": content}))
        return int(troubles > 0)
    for node, findings in nodes.items():
        print(node if node == CLUSTER else f"node {node}")
        for subject, finding in findings.items():
            print(f"  {'TROUBLE' if finding.trouble else 'ok':9}{subject:15}{finding.found}")
            if finding.trouble:
                print(f"{'':26}-> {finding.trouble}")
    print(f"{troubles or 'no'} troubles on nodes: {len(nodes.keys() - {CLUSTER})}")
    return int(troubles > 0)


def examine(pins: dict[str, str], storage: str | None) -> Findings:
    """Subject -> finding, for the machine that this runs on."""
    checks: dict[str, Callable[[], Finding]] = {
        "machine": check_machine,
        "shared memory": check_shared_memory,
        "open files": check_open_files,
        "imports": check_imports,
        "versions": partial(check_versions, pins),
        "devices": check_devices,
        "compiler": check_compiler,
        "DeepSpeed op": check_deepspeed_op,
    }
    if storage is not None:
        checks["storage"] = partial(check_storage, storage)
    return {subject: attempt(check, TIME_LIMITS.get(subject, TIME_LIMIT)) for subject, check in checks.items()}


def attempt(check: Callable[[], Finding], seconds: float) -> Finding:
    """The check's finding; or which import kept it from finding anything, or that it took too long."""
    found: list[Finding] = []

    def run() -> None:
        try:
            found.append(check())
        except ImportError as error:
            found.append(Finding("not examined", f"needs an import that fails: {error}"))
        except Exception as error:
            found.append(Finding("not examined", f"{type(error).__name__}: {error}"))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    return found[0] if found else Finding(f"no answer within {seconds:.0f} s", "look at this node's load and network")


# --- one node --------------------------------------------------------------------------------------------------------


def read_pins(text: str) -> dict[str, str]:
    """Distribution -> version, from the lines of a constraints file."""
    lines = (line.partition("#")[0].strip() for line in text.splitlines())
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def canonical(distribution: str) -> str:
    """PEP 503's form of a name: Jinja2 -> jinja2, pydantic_core -> pydantic-core."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def check_machine() -> Finding:
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    disk = shutil.disk_usage(".").free / 2**30
    found = f"Python {platform.python_version()}, {os.cpu_count()} CPUs, {memory:.0f} GiB, {disk:.0f} GiB of disk free"
    return Finding(found, "" if sys.version_info >= (3, 10) else "use Python 3.10 or later")


def check_shared_memory() -> Finding:
    size = shutil.disk_usage("/dev/shm").total
    trouble = "" if size >= MIN_SHARED_MEMORY else "start the container with --shm-size, 30% of its memory"
    return Finding(f"{size / 2**30:.1f} GiB", trouble)


def check_open_files() -> Finding:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    enough = hard == resource.RLIM_INFINITY or hard >= MIN_OPEN_FILES
    return Finding(f"at most {hard}", "" if enough else "raise the limit: ulimit -n 65536")


def check_imports() -> Finding:
    """Imports what every worker needs."""
    failed = []
    for module in MODULES:
        try:
            import_module(module)
        except ImportError as error:
            failed.append(f"{module} ({error})")
    if failed:
        advice = "install the packages; for vladva alone, submit with --runtime-env cluster/runtime_env.yaml"
        return Finding(f"cannot import {', '.join(failed)}", advice)
    return Finding(", ".join(MODULES))


def check_versions(pins: dict[str, str]) -> Finding:
    """Compares what is installed with the constraints; a local suffix such as +cpu does not count."""
    installed = {canonical(each.metadata["Name"]): each.version.partition("+")[0] for each in distributions()}
    common = sorted(pins.keys() & installed.keys())
    other = [f"{name} {installed[name]} (not {pins[name]})" for name in common if installed[name] != pins[name]]
    if other:
        return Finding(", ".join(other), "install with -c constraints.txt")
    return Finding(f"{len(common)} packages as in constraints.txt")


def check_devices() -> Finding:
    """What computes here, and how fast each multiplies matrices."""
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        rates = {
            f"{device.name} {index}": product_rate(f"cuda:{index}", torch.bfloat16, 8192)
            for index, device in enumerate(devices)
        }
        found = ", ".join(
            f"{device.name} {device.total_memory / 2**30:.0f} GiB at {rate:,.0f} TFLOP/s"
            for device, rate in zip(devices, rates.values(), strict=True)
        )
        trouble = "" if torch.cuda.is_bf16_supported() else "no bfloat16 here: train and embed in float32"
        return Finding(found, trouble or slow_device(rates), rates)
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        return Finding("nvidia-smi, but torch sees no GPU", "install a CUDA build of torch, check the driver")
    rate = product_rate("cpu", torch.float32, 1024)
    return Finding(f"CPU, {torch.get_num_threads()} threads at {rate * 1e3:,.0f} GFLOP/s", "", {"CPU": rate})


def product_rate(device: str, dtype: Any, size: int) -> float:
    """TFLOP/s of a product of two square matrices, the best of five."""
    import torch

    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        if device != "cpu":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        left @ right
        if device != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best / 1e12


def slow_device(rates: Mapping[str, float]) -> str:
    """What to do about a device that is far slower than its like; empty if none is."""
    if len(rates) < 2:
        return ""
    middle = statistics.median(rates.values())
    slow = [
        f"{name} at {rate / middle:.0%} of the others" for name, rate in rates.items() if rate < SLOW_DEVICE * middle
    ]
    return f"{', '.join(slow)}: another process, heat or a power cap? nvidia-smi -q -d PERFORMANCE" if slow else ""


def check_compiler() -> Finding:
    tools = {tool: shutil.which(tool) for tool in ("c++", "ninja")}
    missing = [tool for tool, path in tools.items() if path is None]
    if missing:
        return Finding(f"no {', no '.join(missing)} on PATH", "DeepSpeed's first start compiles an op: install them")
    return Finding(", ".join(str(path) for path in tools.values()))


def check_deepspeed_op() -> Finding:
    """Compiles, or loads if compiled before, the op with which DeepSpeed's CPU workers talk to each other."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if accelerator.device_name() != "cpu":
        return Finding(f"{accelerator.device_name()}: nothing to compile")
    began = time.monotonic()
    try:
        accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except (RuntimeError, OSError) as error:
        return Finding(f"does not compile: {compile_error(str(error))}", "check the compiler, ninja and free memory")
    return Finding(f"compiled, or loaded as the image has it: {time.monotonic() - began:.0f} s")


def compile_error(text: str) -> str:
    """The line of a failed build that says why: the first holds only the command."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    telling = [line for line in lines if re.search(r"\bKilled\b|error:|No such file|not found", line)]
    return (telling or lines or ["without a word"])[0][:300]


def check_storage(uri: str) -> Finding:
    """Writes an object at `uri` with the credentials in use, reads it back, deletes it."""
    from vladva.core.storage import delete_file, join, read_bytes, write_bytes_atomically

    probe = join(uri, f"doctor-{secrets.token_hex(8)}")
    written = secrets.token_bytes(STORAGE_BYTES)
    try:
        began = time.monotonic()
        write_bytes_atomically(probe, written)
        between = time.monotonic()
        same = read_bytes(probe) == written
        ended = time.monotonic()
        delete_file(probe)
    except OSError as error:
        return Finding(f"{uri}: {error}", "check the URI, the AWS_* variables and the node's rights")
    speeds = {
        "write MB/s": STORAGE_BYTES / 1e6 / (between - began),
        "read MB/s": STORAGE_BYTES / 1e6 / (ended - between),
    }
    found = f"{uri}: written at {speeds['write MB/s']:,.0f} MB/s, read at {speeds['read MB/s']:,.0f} MB/s, deleted"
    if not same:
        return Finding(found, "other bytes came back than were written", speeds)
    slow = speeds["read MB/s"] < SLOW_STORAGE
    return Finding(found, "slow: is it in another region, behind a proxy or a small link?" if slow else "", speeds)


# --- all nodes -------------------------------------------------------------------------------------------------------


class Peer:
    """An actor on a node: tells the time, listens, connects to others, sums with them."""

    def __init__(self) -> None:
        self.listener: socket.socket | None = None

    def time(self) -> float:
        """Seconds since 1970, by this node's clock."""
        return time.time()

    def listen(self) -> int:
        """A port on which this node accepts connections."""
        self.listener = socket.create_server(("", 0), backlog=1024)
        return int(self.listener.getsockname()[1])

    def connect(self, others: dict[str, tuple[str, int]]) -> dict[str, str]:
        """Name -> why it cannot be reached, of those that cannot."""
        refused = {}
        for name, address in others.items():
            try:
                socket.create_connection(address, timeout=5).close()
            except OSError as error:
                refused[name] = str(error)
        return refused

    def free_port(self) -> int:
        """A port on which nothing listens."""
        with socket.create_server(("", 0)) as server:
            return int(server.getsockname()[1])

    def all_reduce(self, address: str, port: int, rank: int, world: int) -> float:
        """GB/s at which a vector is summed over all nodes, as NCCL's tests count it (bus bandwidth)."""
        import torch
        import torch.distributed as dist

        from vladva.train.process_group import join_ray_network

        join_ray_network()
        cuda = torch.cuda.is_available()
        store = dist.TCPStore(address, port, world, rank == 0)
        dist.init_process_group("nccl" if cuda else "gloo", store=store, rank=rank, world_size=world)
        try:
            vector = torch.ones(REDUCED_BYTES // 4, device="cuda:0" if cuda else "cpu")
            best = float("inf")
            for _ in range(4):
                dist.barrier()
                began = time.perf_counter()
                dist.all_reduce(vector)
                if cuda:
                    torch.cuda.synchronize()
                best = min(best, time.perf_counter() - began)
        finally:
            dist.destroy_process_group()
        return REDUCED_BYTES * 2 * (world - 1) / world / best / 1e9


def examine_cluster(pins: dict[str, str], storage: str | None, recipe: str | None) -> dict[str, Findings]:
    """Node -> its findings, for every live node of the Ray cluster that this machine belongs to; then CLUSTER's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        context = ray.init(address="auto", log_to_driver=False, logging_level=logging.ERROR)
    except ConnectionError:
        sys.exit("doctor: no Ray cluster runs here; start one, submit this as a job, or leave out --all-nodes")
    alive = [node for node in ray.nodes() if node["Alive"]]
    names = {node["NodeID"]: f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})" for node in alive}
    there = {node: NodeAffinitySchedulingStrategy(node, soft=False) for node in names}
    task = ray.remote(num_cpus=0, max_retries=0)(examine)
    asked = {names[node]: task.options(scheduling_strategy=there[node]).remote(pins, storage) for node in names}
    limit = sum(TIME_LIMITS.values()) + 5 * TIME_LIMIT
    nodes = {name: answer(reference, limit) for name, reference in asked.items()}
    between: Findings = {"access": attempt(partial(check_access, context.dashboard_url or ""), TIME_LIMIT)}
    if recipe:
        between["object store"] = attempt(partial(check_object_store, recipe, alive), TIME_LIMIT)
    between["devices"] = compare_devices(nodes)
    if len(alive) > 1:
        peer = ray.remote(num_cpus=0)(Peer)
        peers = {names[node]: peer.options(scheduling_strategy=there[node]).remote() for node in names}
        addresses = {names[node["NodeID"]]: node["NodeManagerAddress"] for node in alive}
        workers = [names[node["NodeID"]] for node in alive if {"CPU", "GPU"} & node["Resources"].keys()]
        checks: dict[str, Callable[[], Finding]] = {
            "clocks": partial(check_clocks, peers),
            "connections": partial(check_connections, peers, addresses),
            "all-reduce": partial(check_all_reduce, {name: peers[name] for name in workers}, addresses),
        }
        if storage is not None:
            checks["storage"] = partial(check_shared_storage, storage)
        between |= {subject: attempt(check, 2 * TIME_LIMIT) for subject, check in checks.items()}
    return nodes | {CLUSTER: between}


def answer(reference: Any, seconds: float) -> Findings:
    """What a node found, or why it did not tell."""
    import ray

    try:
        return ray.get(reference, timeout=seconds)
    except ray.exceptions.RayError as error:
        return {"node": Finding(f"no answer: {type(error).__name__}", "look at the node, and at its logs in Ray's")}


def together(calls: Mapping[str, Any], seconds: float = TIME_LIMIT) -> dict[str, Any]:
    """Node -> result, or the exception that came instead."""
    import ray

    results: dict[str, Any] = {}
    deadline = time.monotonic() + seconds
    for name, reference in calls.items():
        try:
            results[name] = ray.get(reference, timeout=max(0.1, deadline - time.monotonic()))
        except Exception as error:
            results[name] = error
    return results


def check_access(dashboard: str) -> Finding:
    """Whether somebody without the token is answered: an open dashboard runs anybody's code."""
    if not dashboard:
        return Finding("no dashboard")
    try:
        with urllib.request.urlopen(f"http://{dashboard}/api/jobs/", timeout=10):
            advice = "export RAY_AUTH_MODE=token before `ray start` on every node, or anybody who reaches it runs code"
            return Finding(f"the dashboard at {dashboard} answers without a token", advice)
    except urllib.error.HTTPError as error:
        if error.code not in (401, 403):
            return Finding(f"the dashboard at {dashboard} answers {error.code}", "look at the head's dashboard.log")
    except OSError as error:
        return Finding(f"the dashboard at {dashboard} is not reached from here: {error}")
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()
    if not os.environ.get("RAY_AUTH_TOKEN") and token.exists() and token.stat().st_mode & 0o077:
        return Finding(f"{token} can be read by others on this machine", f"chmod 600 {token}")
    return Finding(f"the dashboard at {dashboard} asks for a token")


def check_object_store(recipe: str, nodes: list[dict[str, Any]]) -> Finding:
    """Whether the images that a recipe reads ahead fit into the object stores of the nodes."""
    from vladva.recipes import RECIPES

    if recipe not in RECIPES:
        return Finding(f"unknown recipe {recipe!r}", f"there are {', '.join(RECIPES)}")
    config = RECIPES[recipe]()
    needed = config.train.chunk_size * IMAGE_BYTES * CHUNKS_AHEAD * config.cluster.workers
    there = sum(node["Resources"].get("object_store_memory", 0) for node in nodes)
    found = (
        f"{there / 2**30:.1f} GiB; {recipe} reads {needed / 2**30:.1f} GiB ahead for {config.cluster.workers} workers"
    )
    trouble = "start Ray with a larger --object-store-memory, or with more nodes" if there < needed else ""
    return Finding(found, trouble, {"GiB": there / 2**30, "needed GiB": needed / 2**30})


def compare_devices(nodes: Mapping[str, Findings]) -> Finding:
    """Whether a node computes far slower than the others with the same device."""
    kinds: dict[str, dict[str, float]] = {}
    for node, findings in nodes.items():
        for device, rate in findings.get("devices", Finding("")).figures.items():
            kinds.setdefault(re.sub(r" \d+$", "", device), {})[f"{device} of {node}"] = rate
    kinds.pop("CPU", None)  # nodes of several kinds, each busy with other things
    troubles = [trouble for rates in kinds.values() if (trouble := slow_device(rates))]
    count = sum(map(len, kinds.values()))
    return Finding(f"{count} GPUs, alike in speed" if count else "no GPUs", "; ".join(troubles))


def check_clocks(peers: Mapping[str, Any]) -> Finding:
    """How far the nodes' clocks are from the driver's, at the least."""
    import ray

    off: dict[str, float] = {}
    for name, peer in peers.items():
        bounds = []
        for _ in range(5):
            before = time.time()
            there = ray.get(peer.time.remote(), timeout=TIME_LIMIT)
            bounds.append(max(0.0, before - there, there - time.time()))
        off[name] = min(bounds)
    return judge_clocks(off)


def judge_clocks(off: Mapping[str, float]) -> Finding:
    """off: node -> seconds that its clock is off, at the least."""
    worst = max(off, key=lambda name: off[name])
    wrong = [f"{name} by {seconds:.1f} s" for name, seconds in off.items() if seconds > MAX_SKEW]
    trouble = f"set the clock of {', '.join(wrong)}: chronyd or systemd-timesyncd" if wrong else ""
    return Finding(f"at most {off[worst]:.2f} s apart from the driver's", trouble, {"seconds": off[worst]})


def check_connections(peers: Mapping[str, Any], addresses: Mapping[str, str]) -> Finding:
    """Whether every node reaches every other, on a port as Ray's workers and process groups take them."""
    ports = together({name: peer.listen.remote() for name, peer in peers.items()})
    listening = {name: (addresses[name], port) for name, port in ports.items() if isinstance(port, int)}
    refused = together(
        {
            name: peer.connect.remote({other: at for other, at in listening.items() if other != name})
            for name, peer in peers.items()
        },
        TIME_LIMIT + 5 * len(peers),
    )
    troubles = []
    for name, result in refused.items():
        if isinstance(result, Exception):
            troubles.append(f"{name} does not answer: {type(result).__name__}")
        else:
            troubles += [f"{name} does not reach {other}: {reason}" for other, reason in result.items()]
    pairs = len(peers) * (len(peers) - 1)
    advice = "; ".join(troubles[:8]) + ": open all ports between the nodes" if troubles else ""
    return Finding(f"{pairs - min(pairs, len(troubles))} of {pairs} directions", advice)


def check_all_reduce(peers: Mapping[str, Any], addresses: Mapping[str, str]) -> Finding:
    """How fast the nodes that train sum a vector, which they do at every step."""
    import ray

    if len(peers) < 2:
        return Finding("one node")
    first = next(iter(peers))
    port = ray.get(peers[first].free_port.remote(), timeout=TIME_LIMIT)
    calls = {
        name: peer.all_reduce.remote(addresses[first], port, rank, len(peers))
        for rank, (name, peer) in enumerate(peers.items())
    }
    results = together(calls, 1.5 * TIME_LIMIT)
    failed = {name: result for name, result in results.items() if isinstance(result, Exception)}
    if failed:
        name, error = next(iter(failed.items()))
        reason = (str(getattr(error, "cause", error)).strip().splitlines() or [type(error).__name__])[-1]
        advice = "open all ports between the nodes; GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME name the interface"
        return Finding(f"fails on {name}: {reason[:300]}", advice)
    rate = min(results.values())
    slow = f"slower than {SLOW_NETWORK} GB/s: gradients would wait for the network"
    return Finding(f"{rate:.2f} GB/s over {len(peers)} nodes", slow if rate < SLOW_NETWORK else "", {"GB/s": rate})


def check_shared_storage(uri: str) -> Finding:
    """Whether what one node writes is there for the others."""
    from vladva.core.shared_path import check_paths

    try:
        check_paths(writes=[("--storage", uri)])
    except ValueError as error:
        return Finding("not the same on every node", str(error))
    return Finding("what the driver writes every node reads")


if __name__ == "__main__":
    main()
