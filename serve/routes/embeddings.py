"""Embeddings: POST /v1/embeddings."""

import base64
from typing import Any

import numpy as np
from fastapi import APIRouter

from serve.deployments.client import Backend
from serve.deployments.embedding import ItemEmbedding
from serve.protocol.errors import ApiError, Failure
from serve.protocol.items import as_list, parse_conversations, parse_items
from serve.protocol.schema import EmbeddingRequest


def routes(backend: Backend) -> APIRouter:
    """The route that embeds texts and images."""
    router = APIRouter()

    @router.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        served = await backend.served()
        model = served.check_embedding(body.model)
        full = served.description["dimension"]
        if body.dimensions and body.dimensions > full:
            raise ApiError(422, f"dimensions: send 1 to {full}", "invalid_value", "dimensions")
        limits = backend.args.limits
        if body.messages is None:
            field, items = "input", parse_items(as_list(body.input), "input", limits, body.modality)
        else:
            field, items = "messages", parse_conversations(body.conversations(), limits)
        results = await backend.embed(items, [f"{field}[{i}]" for i in range(len(items))])
        failures = [result for result in results if isinstance(result, Failure)]
        if failures and not body.partial:
            raise ApiError.of(failures[0])
        tokens = sum(result.tokens for result in results if isinstance(result, ItemEmbedding))
        return {
            "object": "list",
            "model": model,
            "data": [entry(i, result, body.dimensions, body.encoding_format) for i, result in enumerate(results)],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    return router


def entry(index: int, result: ItemEmbedding | Failure, dimensions: int | None, encoding: str) -> dict[str, Any]:
    """One element of `data`."""
    if isinstance(result, Failure):
        return {"object": "embedding", "index": index, "embedding": None, "error": result.body()}
    vector = shortened(result.vector, dimensions)
    if encoding == "base64":
        return {"object": "embedding", "index": index, "embedding": base64.b64encode(vector.tobytes()).decode()}
    return {"object": "embedding", "index": index, "embedding": vector.tolist()}


def shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` numbers, of unit norm again; little-endian float32."""
    vector = vector[:dimensions]
    return (vector / np.linalg.norm(vector)).astype("<f4") if dimensions else vector.astype("<f4")
