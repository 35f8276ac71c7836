"""Changes: POST /v1/index/upsert and /v1/index/delete. Both may be sent again: the second time changes nothing."""

from typing import Any

from fastapi import APIRouter

from serve.deployments.client import Backend
from serve.deployments.served_index import Changed, IndexEntry, repeated
from serve.protocol.bodies import off_loop
from serve.protocol.errors import ApiError
from serve.protocol.items import EmbedItem, Limits, parse_item
from serve.protocol.json_route import json_router
from serve.protocol.schema import DeleteRequest, UpsertItem, UpsertRequest
from serve.routes.search import check_index


def routes(backend: Backend) -> APIRouter:
    """The routes that change the index."""
    router = json_router()

    @router.post("/v1/index/upsert")
    async def upsert(body: UpsertRequest) -> dict[str, Any]:
        model = (await backend.served()).check_embedding(body.model)
        name = check_index(backend, body.index)
        limits = await backend.limits()
        if len(body.items) > limits.items:
            raise ApiError(422, f"items: {len(body.items)}; send 1 to {limits.items}", "invalid_value", "items")
        items = await off_loop(embed_items, body.items, limits)
        entries = [index_entry(one) for one in body.items]
        if twice := repeated([(entry.id, entry.kind) for entry in entries]):
            raise ApiError(422, f"items: the {twice[1]} {twice[0]!r} is there twice", "invalid_value", "items")
        changed: Changed = await backend.call("upsert", items, entries)
        return {
            "object": "index.upsert",
            "model": model,
            "index": name,
            "version": changed.version,
            "fingerprint": changed.fingerprint,
            "upserted": changed.count,
            "usage": {"prompt_tokens": changed.tokens, "total_tokens": changed.tokens},
        }

    @router.post("/v1/index/delete")
    async def delete(body: DeleteRequest) -> dict[str, Any]:
        name = check_index(backend, body.index)
        changed: Changed = await backend.call("delete", body.ids)
        return {"object": "index.delete", "index": name, "version": changed.version, "deleted": changed.count}

    return router


def embed_items(items: list[UpsertItem], limits: Limits) -> list[EmbedItem]:
    """What is to be embedded. Raises ApiError for the first bad item."""
    return [parse_item(one.content(), f"items[{i}]", limits) for i, one in enumerate(items)]


def index_entry(item: UpsertItem) -> IndexEntry:
    """The row of an item. What an index carries of a text is the text itself, unless the item says otherwise."""
    return IndexEntry(item.id, "image" if item.text is None else "text", item.columns)
