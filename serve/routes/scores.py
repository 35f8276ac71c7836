"""Scores: POST /v1/score, /v1/rerank and /v1/classify, all from the cosine similarity of embeddings."""

from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import JsonValue

from serve.deployments.client import Backend
from serve.protocol.errors import ApiError, Failure
from serve.protocol.items import as_list, parse_items
from serve.protocol.schema import ClassifyRequest, RerankRequest, ScoreRequest

CLIP_SCALE = 100.0  # CLIP's logit scale: turns cosine similarities of labels into probabilities


def routes(backend: Backend) -> APIRouter:
    """The routes that compare."""
    router = APIRouter()

    @router.post("/v1/score")
    async def score(body: ScoreRequest) -> dict[str, Any]:
        model = (await backend.served()).check_embedding(body.model)
        queries, documents = as_list(body.queries), as_list(body.documents)
        if len(queries) not in (1, len(documents)):
            text = f"queries: {len(queries)} of them for {len(documents)} documents; send one, or one for each document"
            raise ApiError(422, text, "invalid_value", "queries")
        [queries_QD, documents_ND], usage = await embed_lists(backend, {"queries": queries, "documents": documents})
        data = [
            {"index": i, "object": "score", "score": float(score)}
            for i, score in enumerate((queries_QD * documents_ND).sum(axis=1))
        ]
        return {"object": "list", "model": model, "data": data, "usage": usage}

    @router.post("/v1/rerank")
    async def rerank(body: RerankRequest) -> dict[str, Any]:
        model = (await backend.served()).check_embedding(body.model)
        [query_1D, documents_ND], usage = await embed_lists(
            backend, {"query": [body.query], "documents": body.documents}
        )
        scores_N = documents_ND @ query_1D[0]
        best = np.argsort(-scores_N, kind="stable")[: body.top_n]
        results = [
            {"index": int(i), "document": document_object(body.documents[i]), "relevance_score": float(scores_N[i])}
            for i in best
        ]
        return {"model": model, "results": results, "usage": usage}

    @router.post("/v1/classify")
    async def classify(body: ClassifyRequest) -> dict[str, Any]:
        model = (await backend.served()).check_embedding(body.model)
        inputs = [{body.modality: value} if isinstance(value, str) else value for value in as_list(body.input)]
        labels = [body.template.replace("{}", label) for label in body.labels]
        [inputs_ND, labels_LD], usage = await embed_lists(backend, {"input": inputs, "labels": labels})
        data = []
        for i, probabilities_L in enumerate(softmax(CLIP_SCALE * inputs_ND @ labels_LD.T)):
            best = body.labels[int(probabilities_L.argmax())]
            data.append({"index": i, "label": best, "probs": probabilities_L.tolist(), "num_classes": len(labels)})
        return {"object": "list", "model": model, "data": data, "usage": usage}

    return router


async def embed_lists(backend: Backend, lists: dict[str, list[JsonValue]]) -> tuple[list[np.ndarray], dict[str, int]]:
    """Embeddings [N, D] of each list, all in one call, and the tokens used. Raises ApiError for the first bad item."""
    items = [item for field, values in lists.items() for item in parse_items(values, field, backend.args.limits)]
    fields = [f"{field}[{i}]" for field, values in lists.items() for i in range(len(values))]
    results = await backend.embed(items, fields)
    for result in results:
        if isinstance(result, Failure):
            raise ApiError.of(result)
    vectors = np.stack([result.vector for result in results])
    tokens = sum(result.tokens for result in results)
    ends = np.cumsum([len(values) for values in lists.values()])[:-1]
    return np.split(vectors, ends), {"prompt_tokens": tokens, "total_tokens": tokens}


def document_object(document: JsonValue) -> JsonValue:
    """A document as an object, also where it was sent as a string."""
    return {"text": document} if isinstance(document, str) else document


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
