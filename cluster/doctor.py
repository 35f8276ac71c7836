#!/usr/bin/env python3
"""Doctor: what this node has, and what is wrong with it.

    cluster/doctor.py                                     this machine
    cluster/doctor.py --storage s3://bucket/runs          and whether it can write, read and delete there
    cluster/doctor.py --all-nodes                         every node of the running Ray cluster
    ray job submit --working-dir . --runtime-env cluster/runtime_env.yaml -- python cluster/doctor.py --all-nodes

Exit status 0 when nothing is wrong; otherwise 1, and a line for each trouble that says what to do. It needs nothing but
Python to start, so that it can say what is missing.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import resource
import secrets
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import distributions
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[1] / "constraints.txt"
MODULES = ("torch", "ray", "transformers", "peft", "deepspeed", "pyarrow", "lance", "lance_ray", "vladva")
MIN_SHARED_MEMORY = 1 << 30  # bytes; a container without --shm-size gets 64 MiB, and Ray's object store goes to disk
MIN_OPEN_FILES = 8192


@dataclass(frozen=True)
class Finding:
    """What a check found; `trouble` says what to do, and is empty when nothing is wrong."""

    found: str
    trouble: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--storage", help="folder or s3:// URI to try")
    parser.add_argument("--constraints", type=Path, default=CONSTRAINTS, help="the versions to compare with")
    parser.add_argument("--all-nodes", action="store_true", help="ask every node of the running Ray cluster")
    args = parser.parse_args()
    if not args.constraints.is_file():
        sys.exit(f"doctor: there is no {args.constraints}; --constraints takes the repository's constraints.txt")
    pins = read_pins(args.constraints.read_text())
    nodes = examine_cluster(pins, args.storage) if args.all_nodes else {platform.node(): examine(pins, args.storage)}
    sys.exit(report(nodes))


def report(nodes: dict[str, dict[str, Finding]]) -> int:
    """Prints what was found on each node; returns the exit status."""
    troubles = 0
    for node, findings in nodes.items():
        print(f"node {node}")
        for subject, finding in findings.items():
            print(f"  {'TROUBLE' if finding.trouble else 'ok':9}{subject:15}{finding.found}")
            if finding.trouble:
                print(f"{'':26}-> {finding.trouble}")
                troubles += 1
    print(f"{troubles or 'no'} troubles on nodes: {len(nodes)}")
    return int(troubles > 0)


def examine(pins: dict[str, str], storage: str | None) -> dict[str, Finding]:
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
    return {subject: attempt(check) for subject, check in checks.items()}


def attempt(check: Callable[[], Finding]) -> Finding:
    """The check's finding, or which import kept it from finding anything."""
    try:
        return check()
    except ImportError as error:
        return Finding("not examined", f"needs an import that fails: {error}")


def examine_cluster(pins: dict[str, str], storage: str | None) -> dict[str, dict[str, Finding]]:
    """Node -> its findings, for every live node of the Ray cluster that this machine belongs to."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    try:
        ray.init(address="auto", log_to_driver=False)
    except ConnectionError:
        sys.exit("doctor: no Ray cluster runs here; start one, submit this as a job, or leave out --all-nodes")
    task = ray.remote(num_cpus=0)(examine)
    pending = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            name = f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"
            pending[name] = task.options(scheduling_strategy=there).remote(pins, storage)
    return dict(zip(pending, ray.get(list(pending.values())), strict=True))


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
    import torch

    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        found = ", ".join(f"{device.name} {device.total_memory / 2**30:.0f} GiB" for device in devices)
        return Finding(found, "" if torch.cuda.is_bf16_supported() else "no bfloat16 here: train and embed in float32")
    if shutil.which("nvidia-smi") and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        return Finding("nvidia-smi, but torch sees no GPU", "install a CUDA build of torch, check the driver")
    return Finding(f"CPU, {torch.get_num_threads()} threads")


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
    try:
        accelerator.create_op_builder("ShareMemCommBuilder").load(verbose=False)
    except (RuntimeError, OSError) as error:
        return Finding(f"does not compile: {str(error).strip().splitlines()[0]}", "check the compiler and ninja")
    return Finding("compiled")


def check_storage(uri: str) -> Finding:
    """Writes a small object at `uri`, reads it back, deletes it."""
    from vladva.core.storage import join, open_storage, read_bytes, write_bytes_atomically

    probe = join(uri, f"doctor-{secrets.token_hex(8)}")
    written = secrets.token_bytes(1024)
    try:
        write_bytes_atomically(probe, written)
        read = read_bytes(probe)
        filesystem, path = open_storage(probe)
        filesystem.delete_file(path)
    except OSError as error:
        return Finding(f"{uri}: {error}", "check the URI, the AWS_* variables and the node's rights")
    return Finding(
        f"{uri}: written, read, deleted", "" if read == written else "other bytes came back than were written"
    )


if __name__ == "__main__":
    main()
