"""Search: POST /v1/search, over the index that the application was started with."""

from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import JsonValue

from serve.deployments.client import Backend
from serve.deployments.served_index import Found
from serve.protocol.errors import ApiError
from serve.protocol.items import EmbedItem, Limits, parse_item
from serve.protocol.schema import SearchRequest


def routes(backend: Backend) -> APIRouter:
    """The route that searches."""
    router = APIRouter()

    @router.post("/v1/search")
    async def search(body: SearchRequest) -> dict[str, Any]:
        served = await backend.served()
        model = served.check_embedding(body.model)
        name = check_index(backend, body.index)
        query = parse_query(body.query, backend.args.limits, body.modality)
        found: Found = await backend.call("search", query, body.k, body.filter, body.version)
        return {
            "object": "list",
            "model": model,
            "index": name,
            "version": found.version,
            "fingerprint": served.description["fingerprint"],
            "data": [{"object": "hit", **hit} for hit in found.hits],
            "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
        }

    return router


def check_index(backend: Backend, asked: str | None) -> str:
    """The name of the index that is served. Raises ApiError where there is none, or another is asked for."""
    name = backend.args.index_name
    if name is None:
        raise ApiError(404, "no index is served; start the application with index=FOLDER", "index_not_found")
    if asked not in (None, name):
        raise ApiError(404, f"index: no {asked!r} here; send {name}", "index_not_found", "index")
    return name


def parse_query(value: JsonValue, limits: Limits, modality: str) -> EmbedItem | np.ndarray:
    """A text, an image, or a vector [D], which is given unit norm."""
    if not isinstance(value, list):
        return parse_item(value, "query", limits, modality)
    numbers = value if all(isinstance(x, int | float) and not isinstance(x, bool) for x in value) else []
    try:
        vector = np.array(numbers, np.float64)
    except OverflowError:  # JSON has integers that no float can hold
        vector = np.zeros(0)
    length = np.linalg.norm(vector)
    if not 0 < length < np.inf:
        raise ApiError(422, "query: a vector is a list of finite numbers, not all 0", "invalid_value", "query")
    return (vector / length).astype(np.float32)
