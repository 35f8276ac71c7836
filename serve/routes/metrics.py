"""Metrics: GET /metrics, what this application and Serve count, of all nodes, in Prometheus's text format.

Ray has one endpoint on each node, on a port of its own; scrape those where there are many nodes.
"""

import asyncio
import urllib.request
from collections.abc import Iterable

import ray
from fastapi import APIRouter, Response

from serve.deployments.client import Backend
from serve.protocol.json_route import json_router

SHOWN_METRICS = ("ray_vladva_", "ray_serve_", "vladva_", "serve_")
NODE_S = 10.0


def routes(backend: Backend) -> APIRouter:
    """The route for Prometheus."""
    router = json_router()

    @router.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        texts = await asyncio.gather(*[asyncio.to_thread(metrics_of, address) for address in node_addresses()])
        return Response(merged(texts), media_type="text/plain; version=0.0.4")

    return router


def node_addresses() -> list[str]:
    """Where the nodes of this cluster that are up show their metrics."""
    return [f"{n['NodeManagerAddress']}:{n['MetricsExportPort']}" for n in ray.nodes() if n["Alive"]]


def metrics_of(address: str) -> str:
    """The text of one node; nothing where it does not answer."""
    try:
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=NODE_S) as response:
            return response.read().decode()
    except OSError:
        return ""


def merged(texts: Iterable[str]) -> str:
    """The shown families of several texts, each with its `HELP` and `TYPE` once, as the format wants it."""
    families: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.splitlines():
            if line.startswith("# "):
                name = line.split(" ", 3)[2]
            if name.startswith(SHOWN_METRICS):
                lines = families.setdefault(name, [])
                if not line.startswith("# ") or line not in lines:
                    lines.append(line)
    return "\n".join(line for lines in families.values() for line in lines) + "\n"
