"""Embeddings: POST /v1/embeddings."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

from fastapi import APIRouter

from serve.deployments.client import Backend
from serve.deployments.embedding import ItemEmbedding
from serve.deployments.served_models import Served
from serve.protocol.bodies import off_loop
from serve.protocol.errors import ApiError, Failure
from serve.protocol.items import EmbedItem, ItemOptions, as_list, parse_items
from serve.protocol.json_route import expect_entries, json_router
from serve.protocol.schema import EmbeddingRequest, EmbedOptions
from serve.protocol.vectors import embedding_object


def routes(backend: Backend) -> APIRouter:
    """The route that embeds texts and images."""
    router = json_router()

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        served = await backend.served()
        model = served.check_embedding(body.model)
        check_dimensions(served, body.dimensions, untrained=body.allow_untrained_dimensions)
        field, value = ("messages", body.messages) if body.input is None else ("input", body.input)
        limits, options = await backend.limits(), item_options(body)
        if body.truncate_prompt_tokens is not None:
            options = replace(options, truncate=truncation(body.truncate_prompt_tokens, served))
        items = await off_loop(parse_items, as_list(value), field, limits, options)
        results = await backend.embed(items, [f"{field}[{i}]" for i in range(len(items))])
        failures = [result for result in results if isinstance(result, Failure)]
        if failures and not body.partial:
            raise ApiError.of(failures[0])
        expect_entries(len(results))
        return {
            "object": "list",
            "model": model,
            "fingerprint": maker_of(results) or served.description["fingerprint"],
            "data": await off_loop(embedding_objects, results, body),
            "usage": usage_of(results),
        }

    return router


def item_options(body: EmbedOptions) -> ItemOptions:
    """How the items of a request are to be taken."""
    return ItemOptions(body.modality, body.truncate, body.instruction)


def truncation(tokens: int, served: Served) -> Literal["end"]:
    """What vLLM's `truncate_prompt_tokens` asks for. Raises ApiError where it is less than the model takes."""
    context = served.description["context"]
    if tokens not in (-1, context):
        name = "truncate_prompt_tokens"
        raise ApiError(422, f"{name}: texts are cut at {context} tokens; send that, or -1", "invalid_value", name)
    return "end"


def check_dimensions(served: Served, dimensions: int | None, *, untrained: bool, field: str = "dimensions") -> None:
    """Raise ApiError where vectors of this length are not what the model was trained for, unless that is wanted."""
    full = served.description["dimension"]
    trained = sorted({full, *(served.description.get("matryoshka_dimensions") or ())})
    if dimensions is None or dimensions in trained:
        return
    lengths = " or ".join(map(str, trained))
    if dimensions > full or not untrained:
        message = f"{field}: the model was trained for {lengths}, not {dimensions}"
        if dimensions < full:
            message = f"{message}; send allow_untrained_dimensions: true to cut its vectors nevertheless"
        raise ApiError(422, message, "invalid_value", field)


def embedding_objects(results: Sequence[ItemEmbedding | Failure], body: EmbeddingRequest) -> list[dict[str, Any]]:
    """The elements of `data`."""
    vectors = [result if isinstance(result, Failure) else result.vector for result in results]
    return [
        embedding_object(i, vector, body.dimensions, body.dtype, body.encoding_format)
        for i, vector in enumerate(vectors)
    ]


def maker_of(results: Sequence[ItemEmbedding | Failure]) -> str | None:
    """The model that made the vectors; None where none was made."""
    return next((result.fingerprint for result in results if isinstance(result, ItemEmbedding)), None)


def usage_of(results: Sequence[ItemEmbedding | Failure]) -> dict[str, int]:
    """The tokens that embedding took."""
    tokens = sum(result.tokens for result in results if isinstance(result, ItemEmbedding))
    return {"prompt_tokens": tokens, "total_tokens": tokens}


async def embed_all(
    backend: Backend, items: Sequence[EmbedItem | Failure], fields: Sequence[str]
) -> list[ItemEmbedding]:
    """Embeddings where every item must have one. Raises ApiError for the first that has none."""
    good = []
    for result in await backend.embed(items, fields):
        if isinstance(result, Failure):
            raise ApiError.of(result)
        good.append(result)
    return good
