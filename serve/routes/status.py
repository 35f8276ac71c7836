"""Status: is it alive, is it ready, what does it serve; and a page to try it."""

import asyncio
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse
from ray.serve.handle import DeploymentHandle

from serve.deployments.client import Backend, call, sleeping
from serve.protocol.errors import ApiError
from serve.protocol.json_route import json_router

PROBE_S = 5.0  # a deployment that does not say within this time that it is ready is not


def routes(backend: Backend) -> APIRouter:
    """The routes that cost nothing."""
    router = json_router()

    @router.get("/v1/health/live", include_in_schema=False)
    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/v1/health/ready", include_in_schema=False)
    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        states = await deployment_states(backend)
        missing = [name for name, state in states.items() if state == "missing"]
        if missing:
            raise ApiError(503, f"not ready yet: {', '.join(missing)}", "not_ready")
        return {
            "status": "ready",
            "deployments": list(states),
            "asleep": [n for n, s in states.items() if s == "asleep"],
        }

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        cards = (await backend.served_unwoken()).cards(backend.created)
        return {"object": "list", "data": cards, "index": backend.args.index_name}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        cards = {card["id"]: card for card in (await backend.served_unwoken()).cards(backend.created)}
        if model not in cards:
            raise ApiError(404, f"model: no {model!r} here; send {' or '.join(cards)}", "model_not_found", "model")
        return cards[model]

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"), media_type="text/html")

    return router


async def deployment_states(backend: Backend) -> dict[str, str]:
    """`ready`, `asleep` or `missing` for each deployment. One that sleeps is not woken by being asked after."""
    asleep = await sleeping()

    async def state(name: str, handle: DeploymentHandle) -> str:
        if handle.deployment_name in asleep:
            return "asleep"
        try:
            # Its constructor embeds and generates for real, so an answer of any kind means that it has done it.
            await call(handle.describe, deadline_s=PROBE_S)
        except Exception:
            return "missing"
        return "ready"

    handles = {"discriminative": backend.discriminative, "generative": backend.generative}
    states = await asyncio.gather(*[state(name, handle) for name, handle in handles.items()])
    return dict(zip(handles, states, strict=True))
