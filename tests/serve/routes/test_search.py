"""POST /v1/search against dot products computed here."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.support.wire import ADAPTER, CAPTIONS, data_uri, error_of, noise_image

if TYPE_CHECKING:
    from vladva.models.embedder import Embedder


@pytest.fixture(scope="module")
def gallery(embedder: Embedder) -> np.ndarray:
    """Embeddings [N, D] of the indexed images."""
    return embedder.embed_images([noise_image(i) for i in range(len(CAPTIONS))])


def search(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """A reply, after checking that it is one."""
    response = client.post("/v1/search", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def ids(reply: dict[str, Any]) -> list[str]:
    """The hits' ids."""
    return [hit["id"] for hit in reply["data"]]


def test_hits_are_the_nearest_rows(client: httpx.Client, embedder: Embedder, gallery: np.ndarray) -> None:
    vector = embedder.embed_texts(["a red circle"])[0]
    queries = [
        ({"query": "a red circle"}, vector),
        ({"query": {"text": "a red circle"}}, vector),
        ({"query": {"image": data_uri(noise_image(3))}}, gallery[3]),
        ({"query": data_uri(noise_image(3)), "modality": "image"}, gallery[3]),
        ({"query": vector.tolist()}, vector),
        ({"query": (5 * vector).tolist()}, vector),
    ]
    for body, query in queries:
        reply = search(client, k=3, **body)
        cosines = gallery @ query
        best = np.argsort(-cosines)[:3]
        assert [hit["score"] for hit in reply["data"]] == pytest.approx(cosines[best], abs=1e-4)
        assert ids(reply) == [f"g#{i}" for i in best]
    assert ids(search(client, query={"image": data_uri(noise_image(3))}, k=1)) == ["g#3"]


def test_the_reply_says_what_was_searched(client: httpx.Client, embedder: Embedder) -> None:
    reply = search(client, query="a red circle")
    assert (reply["model"], reply["index"], reply["fingerprint"]) == (ADAPTER, "gallery", embedder.fingerprint)
    assert len(reply["data"]) == len(CAPTIONS)  # k is 10
    assert reply["usage"]["prompt_tokens"] == embedder.count_text_tokens(["a red circle"])[0]
    columns = {hit["id"]: hit["columns"] for hit in reply["data"]}
    assert columns["g#2"]["caption"] == CAPTIONS[2]
    assert (columns["g#2"]["size"], columns["g#0"]["size"]) == (2.0, None)  # JSON has no NaN


def test_versions_stay_as_they_were(client: httpx.Client) -> None:
    def caption(**version: Any) -> tuple[str, int]:
        reply = search(client, query=data_uri(noise_image(0)), modality="image", k=1, **version)
        return reply["data"][0]["columns"]["caption"], reply["version"]

    newest, number = caption()
    assert newest == "changed"
    assert caption(version=number) == (newest, number)
    first, first_number = caption(version="first")
    assert first == CAPTIONS[0]
    assert first_number < number


def test_filters_are_applied_before_the_search(client: httpx.Client) -> None:
    reply = search(client, query="a red circle", k=3, filter="caption IN ('image number 6', 'image number 7')")
    assert sorted(ids(reply)) == ["g#6", "g#7"]


def test_a_hit_has_a_thumbnail_of_bounded_size(client: httpx.Client, strict: httpx.Client) -> None:
    response = client.get("/v1/search/image", params={"id": "g#3", "size": 32})
    assert response.headers["content-type"] == "image/jpeg"
    thumbnail = Image.open(io.BytesIO(response.content))
    assert thumbnail.size == (32, 32)
    expected = noise_image(3).resize((32, 32))
    assert np.abs(np.asarray(thumbnail, float) - np.asarray(expected, float)).mean() < 20  # a JPEG, and not another
    for params, status, code in (
        ({"id": "g#99"}, 404, "image_not_found"),
        ({"id": "' OR 1 = 1 --"}, 404, "image_not_found"),
        ({"id": "g#3", "size": 100_000}, 422, "invalid_value"),
        ({}, 422, "invalid_value"),
    ):
        error_of(client.get("/v1/search/image", params=params), status, code)
    error_of(strict.get("/v1/search/image", params={"id": "g#3"}), 404, "index_not_found")


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"query": ""}, 422, "invalid_value"),
        ({"query": []}, 422, "invalid_value"),
        ({"query": [1.0, 2.0]}, 422, "invalid_value"),
        ({"query": [0.0] * 192}, 422, "invalid_value"),
        ({"query": [True] * 192}, 422, "invalid_value"),
        ({"query": {"image": "file:///etc/passwd"}}, 422, "invalid_image"),
        ({"query": {"image": data_uri(b"no image")}}, 422, "invalid_image"),
        ({"k": 0}, 422, "invalid_value"),
        ({"filter": "no_such_column = 1"}, 422, "invalid_value"),
        ({"filter": "caption = '"}, 422, "invalid_value"),
        ({"filter": "caption = caption OR"}, 422, "invalid_value"),
        ({"filter": "1 = 1; DROP TABLE gallery"}, 422, "invalid_value"),
        ({"filter": "id IN (SELECT id FROM gallery)"}, 422, "invalid_value"),
        ({"filter": "read_file('/etc/passwd') = ''"}, 422, "invalid_value"),
        ({"version": 99}, 422, "invalid_value"),
        ({"version": -1}, 422, "invalid_value"),
        ({"version": 2**64}, 422, "invalid_value"),
        ({"version": ""}, 422, "invalid_value"),
        ({"version": "no such tag"}, 422, "invalid_value"),
        ({"index": "other"}, 404, "index_not_found"),
        ({"model": "gpt"}, 404, "model_not_found"),
        ({"filters": "x"}, 422, "invalid_value"),
    ],
)
def test_what_cannot_be_searched_is_refused(
    client: httpx.Client, change: dict[str, Any], status: int, code: str
) -> None:
    error_of(client.post("/v1/search", json={"query": "a red circle", **change}), status, code)


def test_numbers_too_large_for_a_vector(client: httpx.Client) -> None:
    for number in ("NaN", "Infinity", "1e999", "1" + "0" * 400):
        body = '{"query": [' + ", ".join([number] * 192) + "]}"
        response = client.post("/v1/search", content=body, headers={"Content-Type": "application/json"})
        error_of(response, 422, "invalid_value")


def test_an_index_of_another_model_is_refused_and_both_are_named(foreign_index: str, embedder: Embedder) -> None:
    from serve.config import ServeArgs
    from serve.deployments.served_index import IndexEntry, ServedIndex

    index = ServedIndex(ServeArgs(index=foreign_index), embedder.description())
    vector = embedder.embed_texts(["a late text"])
    for refused in (
        index.search(vector[0], 3, None, None),
        index.upsert([IndexEntry("new#0", "text", {})], vector),
        index.delete(["g#0"]),
    ):
        assert (refused.status, refused.code) == (409, "fingerprint_mismatch")
        assert embedder.fingerprint in refused.message
        assert "0123456789abcdef" in refused.message
