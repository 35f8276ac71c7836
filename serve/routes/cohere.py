"""Cohere: POST /v2/embed and /v2/rerank, as `cohere.ClientV2(base_url=...)` sends them and reads the answers."""

import base64
import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from pydantic import JsonValue

from serve.deployments.client import Backend
from serve.deployments.embedding import ItemEmbedding
from serve.protocol.bodies import off_loop
from serve.protocol.items import ItemOptions, as_list, parse_items
from serve.protocol.json_route import expect_entries, json_router
from serve.protocol.schema import CohereEmbedRequest, CohereRerankRequest
from serve.protocol.vectors import shortened, with_numbers
from serve.routes.embeddings import check_dimensions, embed_all, maker_of, usage_of
from serve.routes.scores import ranked


def routes(backend: Backend) -> APIRouter:
    """The routes that speak Cohere's second API."""
    router = json_router()

    @router.post("/v2/embed")
    async def embed(body: CohereEmbedRequest) -> dict[str, Any]:
        served = await backend.served()
        served.check_embedding(body.model)
        check_dimensions(served, body.output_dimension, untrained=False, field="output_dimension")
        field, values = source_of(body)
        options = ItemOptions("image" if field == "images" else "text", body.truncate)
        items = await off_loop(parse_items, values, field, await backend.limits(), options)
        results = await embed_all(backend, items, [f"{field}[{i}]" for i in range(len(items))])
        expect_entries(len(results))
        kinds = body.embedding_types
        tokens = usage_of(results)["total_tokens"]
        return {
            "id": str(uuid.uuid4()),
            "response_type": "embeddings_by_type",
            "model": served.embedding_model,
            "fingerprint": maker_of(results),
            "embeddings": {kind: await off_loop(vectors, results, body.output_dimension, kind) for kind in kinds},
            "texts": body.texts or [],
            "meta": meta(tokens, images=len(body.images or [])),
        }

    @router.post("/v2/rerank")
    async def rerank(body: CohereRerankRequest) -> dict[str, Any]:
        served = await backend.served()
        served.check_embedding(body.model)
        best, made = await ranked(backend, body.query, as_list(body.documents), body.top_n, ItemOptions(truncate="end"))
        return {
            "id": str(uuid.uuid4()),
            "results": [{"index": i, "relevance_score": score} for i, score in best],
            "fingerprint": made["fingerprint"],
            "meta": meta(made["usage"]["total_tokens"]),
        }

    return router


def source_of(body: CohereEmbedRequest) -> tuple[str, Sequence[JsonValue]]:
    """The name and the items of the list that was sent."""
    if body.texts is not None:
        return "texts", [{"text": text} for text in body.texts]
    if body.images is not None:
        return "images", [*body.images]
    assert body.inputs is not None
    return "inputs", body.inputs


def vectors(results: Sequence[ItemEmbedding], dimensions: int | None, kind: str) -> list[Any]:
    """The vectors in numbers of one kind; `base64` is that of their float32 numbers."""
    short = [shortened(result.vector, dimensions) for result in results]
    if kind == "base64":
        return [base64.b64encode(vector.tobytes()).decode() for vector in short]
    return [with_numbers(vector, kind).tolist() for vector in short]  # type: ignore[arg-type]


def meta(tokens: int, images: int = 0) -> dict[str, Any]:
    """What Cohere says of a request beside its result."""
    return {"api_version": {"version": "2"}, "billed_units": {"input_tokens": tokens, "images": images}}
