"""Status: is it alive, is it ready, what does it serve; and a page to try it."""

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter
from fastapi.responses import FileResponse

from serve.deployments.client import Backend, call
from serve.protocol.errors import ApiError
from serve.protocol.json_route import json_router

PROBE_S = 5.0  # a deployment that does not say within this time that it is ready is not


def routes(backend: Backend) -> APIRouter:
    """The routes that cost nothing."""
    router = json_router()
    created = int(time.time())

    @router.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @router.get("/ready")
    async def ready() -> dict[str, Any]:
        deployments = {"discriminative": backend.discriminative, "generative": backend.generative}
        # Their constructors embed and generate for real, so an answer of any kind means that they have done it.
        probes = [call(handle.describe, deadline_s=PROBE_S) for handle in deployments.values()]
        answers = await asyncio.gather(*probes, return_exceptions=True)
        missing = [name for name, answer in zip(deployments, answers, strict=True) if isinstance(answer, Exception)]
        if missing:
            raise ApiError(503, f"not ready yet: {', '.join(missing)}", "not_ready")
        return {"status": "ready", "deployments": list(deployments)}

    @router.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": (await backend.served()).cards(created)}

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        cards = {card["id"]: card for card in (await backend.served()).cards(created)}
        if model not in cards:
            raise ApiError(404, f"model: no {model!r} here; send {' or '.join(cards)}", "model_not_found", "model")
        return cards[model]

    @router.get("/", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(Path(__file__).with_name("page.html"), media_type="text/html")

    return router
