"""Shared paths: what a job reads and writes must be the same on every node of its cluster, and outlive the job.

A path such as /data/runs exists on every machine, and is another disk on each of them unless it is a mount that all
have. A run on such a path never ends: its workers save checkpoints where the driver does not look. So before any work
the driver writes a small file there, and every node reads it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from vladva.core import storage

ANSWER_WITHIN_S = 180.0  # seconds; a node may have to fetch the job's code first
UPLOADED = "/runtime_resources/working_dir_files/"  # where Ray unpacks the working directory of a submitted job
ADVICE = "use s3://... or a folder that every node has mounted"


class Probe(NamedTuple):
    """A file that every node should see as the driver does."""

    field: str  # that the user gave: `--out`, `storage`
    uri: str  # what the field was set to
    file: str  # URI of the file
    content: bytes | None  # of the file; None: only `size` is compared
    size: int


def check_paths(*, reads: Iterable[tuple[str, str]] = (), writes: Iterable[tuple[str, str]] = ()) -> None:
    """Raise ValueError unless every node of the cluster that this process has joined sees these paths: (field, URI).

    reads: paths that must be there already; those that are not are left to the job's own message.
    writes: paths that the job makes. One in the copy of the working directory of a submitted job is refused anywhere.
    """
    reads, writes = ([(field, uri) for field, uri in each if _is_storage(uri)] for each in (reads, writes))
    for field, uri in writes:
        refuse_temporary(field, uri)
    nodes = _other_nodes()
    if not nodes:
        return
    probes = [probe for field, uri in reads if (probe := _existing(field, uri)) is not None]
    written = [_write(field, uri) for field, uri in writes]
    try:
        troubles = _ask(nodes, [*probes, *written])
    finally:
        for probe in written:
            _remove(probe)
    if troubles:
        raise ValueError("\n".join(troubles))


def _is_storage(uri: str) -> bool:
    """Not a server's address, nor left empty."""
    return bool(uri) and uri.partition("://")[0] in (uri, "file", "s3")


def refuse_temporary(field: str, uri: str) -> None:
    """Raise ValueError for a path in the copy of the working directory of a submitted job: Ray deletes it later."""
    if "://" not in uri and UPLOADED in os.path.abspath(uri):
        raise ValueError(
            f"{field} {uri!r} is in the uploaded copy of the working directory of a submitted job, which Ray deletes "
            f"after the job; {ADVICE}"
        )


def _other_nodes() -> dict[str, str]:
    """Node id -> address, of the nodes that can take work and are not the driver's; none without a cluster."""
    import ray

    if not ray.is_initialized():
        return {}
    own = ray.get_runtime_context().get_node_id()
    return {
        node["NodeID"]: node["NodeManagerAddress"]
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] != own and {"CPU", "GPU"} & node["Resources"].keys()
    }


def _existing(field: str, uri: str) -> Probe | None:
    """One file at or below a path of this machine; None for what is not there. Object storage: whether it is there."""
    path = storage.absolute(uri)
    if path.startswith("s3://"):
        return Probe(field, uri, path, None, -1) if storage.exists(path) else None
    if os.path.isfile(path):
        return Probe(field, uri, path, None, os.path.getsize(path))
    for folder, _, files in os.walk(path):
        for name in sorted(files):
            return Probe(field, uri, os.path.join(folder, name), None, os.path.getsize(os.path.join(folder, name)))
    return Probe(field, uri, path, None, -1) if os.path.isdir(path) else None


def _write(field: str, uri: str) -> Probe:
    path, content = storage.absolute(uri), secrets.token_bytes(32)
    file = storage.join(path, f"_probe-{secrets.token_hex(8)}")
    try:
        storage.write_bytes_atomically(file, content)
    except OSError as error:
        raise ValueError(f"{field} {uri!r} cannot be written: {error}") from error
    return Probe(field, uri, file, content, len(content))


def _remove(probe: Probe) -> None:
    storage.delete_file(probe.file)
    if not probe.file.startswith("s3://"):
        with suppress(OSError):  # not empty: it was there before
            os.rmdir(os.path.dirname(probe.file))


def _ask(nodes: Mapping[str, str], probes: list[Probe]) -> list[str]:
    """A line for each path that a node does not see."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    look = ray.remote(num_cpus=0, max_retries=0)(unseen)
    answers = {
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(probes): address
        for node, address in nodes.items()
    }
    ready, late = ray.wait(list(answers), num_returns=len(answers), timeout=ANSWER_WITHIN_S)
    troubles = [f"node {answers[one]} did not answer within {ANSWER_WITHIN_S:.0f} s" for one in late]
    missing: dict[int, list[str]] = {}
    reasons: dict[int, str] = {}
    for one in ready:
        try:
            found = ray.get(one)
        except ray.exceptions.RayError:  # the node has gone meanwhile: the job goes on without it
            if any(node["Alive"] and node["NodeManagerAddress"] == answers[one] for node in ray.nodes()):
                raise
            continue
        for number, reason in found.items():
            missing.setdefault(number, []).append(answers[one])
            reasons[number] = reason
    for number, addresses in sorted(missing.items()):
        probe = probes[number]
        advice = "check that node's keys and endpoint" if probe.file.startswith("s3://") else ADVICE
        troubles.append(
            f"{probe.field} {probe.uri!r} is not the same on every node: what the driver sees there is not seen on "
            f"{', '.join(sorted(addresses))} ({reasons[number]}); {advice}"
        )
    return troubles


def unseen(probes: list[Probe]) -> dict[int, str]:
    """Position -> reason, of the probes that this machine does not see as the driver does."""
    reasons = {}
    for number, probe in enumerate(probes):
        try:
            if probe.content is not None:
                seen = storage.read_bytes(probe.file) == probe.content
            elif probe.size < 0:
                seen = storage.exists(probe.file)
            else:
                seen = storage.file_info(probe.file).size == probe.size
            reason = "" if seen else "another content, or none"
        except OSError as error:
            reason = "no such file" if isinstance(error, FileNotFoundError) else str(error)
        if reason:
            reasons[number] = reason
    return reasons
