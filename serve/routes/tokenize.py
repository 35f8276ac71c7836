"""Tokenize: POST /v1/tokenize, what items would cost, image tokens included, before they are sent."""

from typing import Any

from fastapi import APIRouter

from serve.deployments.client import Backend
from serve.protocol.bodies import off_loop
from serve.protocol.errors import ApiError, Failure
from serve.protocol.items import as_list, only_items, parse_items
from serve.protocol.json_route import expect_entries, json_router
from serve.protocol.schema import TokenizeRequest
from serve.routes.embeddings import item_options


def routes(backend: Backend) -> APIRouter:
    """The route that counts."""
    router = json_router()

    @router.post("/tokenize", include_in_schema=False)
    @router.post("/v1/tokenize")
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        served = await backend.served()
        model = served.check_embedding(body.model)
        field, value = ("messages", body.messages) if body.input is None else ("input", body.input)
        items = await off_loop(parse_items, as_list(value), field, await backend.limits(), item_options(body))
        costs: list[tuple[int, int] | Failure] = await backend.call("costs", only_items(items))
        data = []
        for i, cost in enumerate(costs):
            if isinstance(cost, Failure):
                raise ApiError.of(cost.with_param(f"{field}[{i}]"))
            data.append({"index": i, "tokens": cost[0], "cost": cost[1]})
        expect_entries(len(data))
        count = sum(one["tokens"] for one in data)
        return {
            "object": "list",
            "model": model,
            "data": data,
            "count": count,
            "max_model_len": served.description["context"],
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }

    return router
