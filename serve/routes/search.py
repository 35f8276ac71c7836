"""Search: POST /v1/search, over the index that the application was started with."""

from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Response
from pydantic import JsonValue

from serve.deployments.client import Backend
from serve.deployments.served_index import Found
from serve.protocol.bodies import off_loop
from serve.protocol.errors import ApiError
from serve.protocol.items import EmbedItem, ItemOptions, Limits, parse_item
from serve.protocol.json_route import json_router
from serve.protocol.schema import SearchRequest
from serve.routes.embeddings import item_options

MAX_THUMBNAIL = 1024


def routes(backend: Backend) -> APIRouter:
    """The route that searches."""
    router = json_router()

    @router.post("/v1/search")
    async def search(body: SearchRequest) -> dict[str, Any]:
        model = (await backend.served()).check_embedding(body.model)
        name = check_index(backend, body.index)
        query = await off_loop(parse_query, body.query, await backend.limits(), item_options(body))
        found: Found = await backend.call("search", query, body.k, body.filter, body.version)
        return {
            "object": "list",
            "model": model,
            "index": name,
            "version": found.version,
            "fingerprint": found.fingerprint,
            "data": [{"object": "hit", **hit} for hit in found.hits],
            "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens},
        }

    @router.get("/v1/search/image")
    async def image(
        id: Annotated[str, Query(min_length=1, max_length=1000)],  # noqa: A002
        size: Annotated[int, Query(ge=16, le=MAX_THUMBNAIL)] = 256,
    ) -> Response:
        """The image of a hit, as a JPEG at most `size` pixels wide and high."""
        check_index(backend, None)
        jpeg: bytes = await backend.call("thumbnail", id, size)
        return Response(jpeg, media_type="image/jpeg", headers={"Cache-Control": "private, max-age=3600"})

    return router


def check_index(backend: Backend, asked: str | None) -> str:
    """The name of the index that is served. Raises ApiError where there is none, or another is asked for."""
    name = backend.args.index_name
    if name is None:
        raise ApiError(404, "no index is served; start the application with index=FOLDER", "index_not_found")
    if asked not in (None, name):
        raise ApiError(404, f"index: no {asked!r} here; send {name}", "index_not_found", "index")
    return name


def parse_query(value: JsonValue, limits: Limits, options: ItemOptions) -> EmbedItem | np.ndarray:
    """An item, or a vector [D], which is given unit norm."""
    match value:
        case [] | [int() | float(), *_]:
            return parse_vector(value)
    return parse_item(value, "query", limits, options)


def parse_vector(values: list[JsonValue]) -> np.ndarray:
    """A vector [D] of unit norm."""
    numbers = [value for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    try:
        vector = np.array(numbers if len(numbers) == len(values) else [], np.float64)
    except OverflowError:  # JSON has integers that no float can hold
        vector = np.zeros(0)
    length = np.linalg.norm(vector)
    if not 0 < length < np.inf:
        raise ApiError(422, "query: a vector is a list of finite numbers, not all 0", "invalid_value", "query")
    return (vector / length).astype(np.float32)
