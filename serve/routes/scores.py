"""Scores: POST /v1/score, /v1/rerank and /v1/classify, from the cosine similarity of embeddings.

The first two also by the generator, with `mode: generative`: the probability that it says yes when it is asked whether
a document matches the query, the adapter off.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import JsonValue

from serve.deployments.client import Backend
from serve.protocol.bodies import off_loop
from serve.protocol.errors import ApiError, Failure
from serve.protocol.items import (
    EmbedItem,
    ItemOptions,
    Limits,
    as_list,
    check_number,
    only_items,
    parse_items,
    sent_texts,
    too_long,
    too_much,
)
from serve.protocol.json_route import expect_entries, json_router
from serve.protocol.schema import ClassifyRequest, RerankRequest, ScoreRequest
from serve.routes.embeddings import embed_all, item_options, maker_of, usage_of

ASKED = ("queries", "query", "input")  # lists that the request's own instruction is for; an item may have its own
CLIP_SCALE = 100.0  # CLIP's logit scale: turns cosine similarities of labels into probabilities


def routes(backend: Backend) -> APIRouter:
    """The routes that compare."""
    router = json_router()

    @router.post("/score", include_in_schema=False)
    @router.post("/v1/score")
    async def score(body: ScoreRequest) -> dict[str, Any]:
        served = await backend.served()
        queries, documents = as_list(body.queries, parts_apart=True), as_list(body.documents, parts_apart=True)
        if len(queries) not in (1, len(documents)):
            text = f"queries: {len(queries)} of them for {len(documents)} documents; send one, or one for each document"
            raise ApiError(422, text, "invalid_value", "queries")
        lists = {"queries": queries, "documents": documents}
        if body.mode == "generative":
            model = served.check_judge(body.model)
            scores_N, made = await judged(backend, lists, item_options(body))
        else:
            model = served.check_embedding(body.model)
            [queries_QD, documents_ND], made = await embed_lists(backend, lists, item_options(body))
            scores_N = (queries_QD * documents_ND).sum(axis=1)
        expect_entries(len(scores_N))
        return {
            "object": "list",
            "model": model,
            "data": [{"index": i, "object": "score", "score": float(score)} for i, score in enumerate(scores_N)],
            **made,
        }

    @router.post("/rerank", include_in_schema=False)
    @router.post("/v1/rerank")
    async def rerank(body: RerankRequest) -> dict[str, Any]:
        served, documents = await backend.served(), as_list(body.documents, parts_apart=True)
        if body.mode == "generative":
            model = served.check_judge(body.model)
            lists = {"query": [body.query], "documents": documents}
            scores_N, made = await judged(backend, lists, item_options(body))
            best = best_first(scores_N, body.top_n)
        else:
            model = served.check_embedding(body.model)
            best, made = await ranked(backend, body.query, documents, body.top_n, item_options(body))
        results: list[dict[str, Any]] = [{"index": i, "relevance_score": score} for i, score in best]
        for result in results if body.return_documents else ():
            result["document"] = document_object(documents[result["index"]])
        return {"model": model, "results": results, **made}

    @router.post("/v1/classify")
    async def classify(body: ClassifyRequest) -> dict[str, Any]:
        model = (await backend.served()).check_embedding(body.model)
        lists = {"input": as_list(body.input), "labels": labels_in(body, await backend.limits())}
        [inputs_ND, labels_LD], made = await embed_lists(backend, lists, item_options(body))
        expect_entries(len(inputs_ND) * len(labels_LD))
        data = await off_loop(classified, body.labels, inputs_ND, labels_LD)
        return {"object": "list", "model": model, "data": data, **made}

    return router


def labels_in(body: ClassifyRequest, limits: Limits) -> list[JsonValue]:
    """The labels in their template, as items. Raises ApiError where they are too many or too long, unwritten."""
    check_number(len(body.labels), "labels", limits)
    places, characters = body.template.count("{}"), len(body.template)
    lengths = [characters + places * (len(label) - 2) for label in body.labels]
    if max(lengths) > limits.text_characters:
        raise ApiError.of(too_long(max(lengths), limits).with_param("labels"))
    if sum(lengths) > limits.all_characters:
        raise too_much(limits)
    return [{"text": body.template.replace("{}", label)} for label in body.labels]


def classified(labels: Sequence[str], inputs_ND: np.ndarray, labels_LD: np.ndarray) -> list[dict[str, Any]]:
    """The elements of `data`: the probability of every label for each input, and the best label."""
    data = []
    for i, probabilities_L in enumerate(softmax(CLIP_SCALE * inputs_ND @ labels_LD.T)):
        best = labels[int(probabilities_L.argmax())]
        data.append({"index": i, "label": best, "probs": probabilities_L.tolist(), "num_classes": len(labels)})
    return data


async def ranked(
    backend: Backend, query: JsonValue, documents: list[JsonValue], top_n: int | None, options: ItemOptions
) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """(index, similarity to the query) of the documents, best first; and the reply's `fingerprint` and `usage`."""
    lists = {"query": [query], "documents": documents}
    [query_1D, documents_ND], made = await embed_lists(backend, lists, options)
    scores_N = documents_ND @ query_1D[0]
    return best_first(scores_N, top_n), made


def best_first(scores_N: np.ndarray, top_n: int | None) -> list[tuple[int, float]]:
    """(index, score), the highest first."""
    best = np.argsort(-scores_N, kind="stable")[:top_n]
    expect_entries(len(best))
    return [(int(i), float(scores_N[i])) for i in best]


async def judged(
    backend: Backend, lists: dict[str, list[JsonValue]], options: ItemOptions
) -> tuple[np.ndarray, dict[str, Any]]:
    """P(yes) [N] of every document with its query, or the one there is; and the reply's `usage`.

    Raises ApiError for the first bad item.
    """
    limits = await backend.limits()
    items = [
        only_items(await off_loop(parse_items, values, name, limits, for_list(name, options)))
        for name, values in lists.items()
    ]
    results = []
    for i, result in enumerate(await backend.judge(*items)):
        if isinstance(result, Failure):
            raise ApiError.of(result.with_param(f"documents[{i}]"))
        results.append(result)
    tokens = sum(result.tokens for result in results)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    return np.array([result.probability for result in results]), {"usage": usage}


async def embed_lists(
    backend: Backend, lists: dict[str, list[JsonValue]], options: ItemOptions
) -> tuple[list[np.ndarray], dict[str, Any]]:
    """Embeddings [N, D] of each list, all in one call; and the reply's `fingerprint` and `usage`.

    Raises ApiError for the first bad item.
    """
    limits = await backend.limits()
    items: list[EmbedItem | Failure] = []
    for field, values in lists.items():
        items += await off_loop(parse_items, values, field, limits, for_list(field, options))
    fields = [f"{field}[{i}]" for field, values in lists.items() for i in range(len(values))]
    results = await embed_all(backend, items, fields)
    vectors = np.stack([result.vector for result in results])
    ends = np.cumsum([len(values) for values in lists.values()])[:-1]
    return np.split(vectors, ends), {"fingerprint": maker_of(results), "usage": usage_of(results)}


def for_list(field: str, options: ItemOptions) -> ItemOptions:
    """The options for a list: what is compared with the queries is embedded without their instruction."""
    return options if field in ASKED else replace(options, instruction=None)


def document_object(document: JsonValue) -> dict[str, JsonValue]:
    """The words of a document; its image is not sent back."""
    text = sent_texts(document)
    return {} if text is None else {"text": text}


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities over the last axis."""
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)
