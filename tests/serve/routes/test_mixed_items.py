"""An image with words, and instructions, on every route that embeds, against the embedder in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from serve.deployments.yes_or_no import question
from serve.protocol.items import EmbedItem, Limits, parse_items
from tests.support.wire import data_uri, error_of, noise_image
from vladva.core.item_content import ItemContent

if TYPE_CHECKING:
    from vladva.models.embedder import Embedder

WORDS, ASKED = "but in blue", "Find the same with this change."
IMAGE = data_uri(noise_image(0))
TEXT_PART, IMAGE_PART = {"type": "text", "text": WORDS}, {"type": "image_url", "image_url": {"url": IMAGE}}
BOTH = ItemContent(WORDS, noise_image(0))
BOTH_ASKED = ItemContent(WORDS, noise_image(0), ASKED)


@pytest.fixture(scope="module")
def expected(embedder: Embedder) -> dict[str, np.ndarray]:
    """Vectors by what was asked."""
    items = {"both": BOTH, "asked": BOTH_ASKED, "text": ItemContent(WORDS, instruction=ASKED)}
    items["image"] = ItemContent(image=noise_image(0), instruction=ASKED)
    vectors = dict(zip(items, embedder.embed_items(list(items.values())), strict=True))
    vectors["plain text"] = embedder.embed_texts([WORDS])[0]
    vectors["plain image"] = embedder.embed_images([noise_image(0)])[0]
    cosines = np.stack(list(vectors.values())) @ np.stack(list(vectors.values())).T
    assert cosines[~np.eye(len(cosines), dtype=bool)].max() < 0.9999  # a server that mixes them up is noticed
    return vectors


def test_every_form_of_an_image_with_words(client: httpx.Client, expected: dict[str, np.ndarray]) -> None:
    asked = {"role": "system", "content": ASKED}
    forms: list[tuple[str, dict[str, Any]]] = [
        ("both", {"input": {"text": WORDS, "image": IMAGE}}),
        ("both", {"input": [{"content": [IMAGE_PART, TEXT_PART]}]}),
        ("both", {"input": [{"content": [TEXT_PART, IMAGE_PART]}]}),
        ("both", {"messages": [{"role": "user", "content": [IMAGE_PART, TEXT_PART]}]}),
        ("asked", {"input": {"text": WORDS, "image": IMAGE, "instruction": ASKED}}),
        ("asked", {"input": {"text": WORDS, "image": IMAGE}, "instruction": ASKED}),
        ("asked", {"input": {"text": WORDS, "image": IMAGE, "instruction": ASKED}, "instruction": "Something else."}),
        ("asked", {"messages": [asked, {"role": "user", "content": [IMAGE_PART, TEXT_PART]}]}),
        ("text", {"input": {"text": WORDS, "instruction": f" {ASKED} "}}),
        ("text", {"input": [WORDS], "instruction": ASKED}),
        ("image", {"input": IMAGE, "instruction": ASKED}),
        ("plain text", {"input": {"text": WORDS, "image": None, "instruction": None}}),
        ("plain image", {"input": {"text": "", "image": IMAGE, "instruction": ""}}),
    ]
    for name, body in forms:
        response = client.post("/v1/embeddings", json=body)
        assert response.status_code == 200, response.text
        np.testing.assert_allclose(response.json()["data"][0]["embedding"], expected[name], atol=1e-5, err_msg=name)


def test_what_it_costs_is_told_and_limited(client: httpx.Client, embedder: Embedder) -> None:
    item = {"text": WORDS, "image": IMAGE, "instruction": ASKED}
    told = client.post("/v1/tokenize", json={"input": [item]}).json()["data"][0]["tokens"]
    used = client.post("/v1/embeddings", json={"input": [item]}).json()["usage"]["prompt_tokens"]
    assert told == used == embedder.count_item_tokens(BOTH_ASKED)
    long = {"image": IMAGE, "text": "word " * 600}
    error = error_of(client.post("/v1/embeddings", json={"input": [long]}), 422, "context_length_exceeded")
    assert "the item takes" in error["message"]
    cut = client.post("/v1/embeddings", json={"input": [long, {"image": IMAGE}], "truncate": "end"}).json()
    vectors = np.array([one["embedding"] for one in cut["data"]])
    assert cut["usage"]["prompt_tokens"] > 500 > vectors[0] @ vectors[1]  # the image and its prompt stay whole
    for bad, code in (
        ({"image": IMAGE, "text": "a", "instruction": "x" * 4001}, "invalid_value"),
        ({"image": IMAGE, "text": "a", "instruction": 3}, "invalid_value"),
        ({"image": IMAGE, "text": " \0"}, "invalid_value"),
        ({"image": "data:image/png;base64,AAAA", "text": "a"}, "invalid_image"),
        ({"instruction": "Find it."}, "invalid_value"),
    ):
        error_of(client.post("/v1/embeddings", json={"input": [bad]}), 422, code)


def test_cohere_sends_both_in_one_input(client: httpx.Client, expected: dict[str, np.ndarray]) -> None:
    body = {"inputs": [{"content": [TEXT_PART, IMAGE_PART]}], "embedding_types": ["float"]}
    reply = client.post("/v2/embed", json=body).json()
    np.testing.assert_allclose(reply["embeddings"]["float"][0], expected["both"], atol=1e-5)
    ranked = client.post("/v2/rerank", json={"query": WORDS, "documents": [IMAGE, body["inputs"][0]]}).json()["results"]
    by_index = {one["index"]: one["relevance_score"] for one in ranked}
    assert by_index[1] == pytest.approx(expected["plain text"] @ expected["both"], abs=1e-5)


def test_an_instruction_is_for_the_query_and_not_for_what_is_ranked(
    client: httpx.Client, expected: dict[str, np.ndarray]
) -> None:
    query, documents = {"image": IMAGE, "text": WORDS}, [WORDS, {"text": WORDS, "image": IMAGE}]
    scores = [expected["asked"] @ expected[name] for name in ("plain text", "both")]
    body = {"query": query, "documents": documents, "instruction": ASKED}
    results = client.post("/v1/rerank", json=body).json()["results"]
    assert {one["index"]: one["relevance_score"] for one in results} == pytest.approx(dict(enumerate(scores)), abs=1e-5)
    assert {one["index"]: one["document"] for one in results} == {0: {"text": WORDS}, 1: {"text": WORDS}}
    body = {"queries": query, "documents": documents, "instruction": ASKED}
    reply = client.post("/v1/score", json=body).json()
    assert [one["score"] for one in reply["data"]] == pytest.approx(scores, abs=1e-5)
    own = [{"text": WORDS, "instruction": ASKED}]  # of the document itself
    reply = client.post("/v1/score", json={"queries": query, "documents": own}).json()
    assert reply["data"][0]["score"] == pytest.approx(expected["both"] @ expected["text"], abs=1e-5)


def test_search_by_an_image_with_words(client: httpx.Client, expected: dict[str, np.ndarray]) -> None:
    query = {"image": IMAGE, "text": WORDS}
    for body, name in (({"query": query}, "both"), ({"query": query, "instruction": ASKED}, "asked")):
        found = client.post("/v1/search", json={**body, "k": 3}).json()
        by_vector = client.post("/v1/search", json={"query": expected[name].tolist(), "k": 3}).json()
        assert [hit["id"] for hit in found["data"]] == [hit["id"] for hit in by_vector["data"]]
        scores = [hit["score"] for hit in by_vector["data"]]
        assert [hit["score"] for hit in found["data"]] == pytest.approx(scores, abs=1e-4)


def test_the_generator_is_asked_about_all_of_an_item(client: httpx.Client) -> None:
    query = EmbedItem(text=WORDS, image=b"x", size=(64, 64), instruction=ASKED)
    messages, images = question(query, EmbedItem(image=b"y", size=(64, 64)))
    assert [item.image for item in images] == [b"x", b"y"]
    words = "".join(part.get("text", "<image>") for part in messages[0]["content"])
    assert words.startswith(f"Query: <image>{ASKED}\n{WORDS}\nDocument: <image>\n")
    body = {"query": {"image": IMAGE, "text": WORDS}, "documents": [IMAGE, WORDS], "mode": "generative"}
    results = client.post("/v1/rerank", json=body).json()["results"]
    assert all(0 < one["relevance_score"] < 1 for one in results)


def test_who_takes_one_kind_only_says_so() -> None:
    limits = Limits(items=8, image_bytes=1 << 20, image_pixels=1 << 20).of_model(77, cuts=True, mixes=False)
    values: list[Any] = [{"image": IMAGE, "text": WORDS}, {"text": WORDS, "instruction": ASKED}, WORDS, IMAGE]
    found = parse_items(values, "input", limits)
    assert [getattr(one, "code", None) for one in found] == ["unsupported", "unsupported", None, None]
    assert "not both in one, and no instruction" in found[0].message  # type: ignore[union-attr]
