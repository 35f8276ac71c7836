"""POST /v1/index/upsert and /v1/index/delete, seen through searches; what a replica with a pinned version sees."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.wire import CAPTIONS, data_uri, error_of, noise_image

if TYPE_CHECKING:
    from vladva.models.embedder import Embedder


@pytest.fixture(autouse=True)
def clean(client: httpx.Client) -> Iterator[None]:
    """Rows that these tests add are taken away: the other tests count what is in the index."""
    yield
    change(client, "delete", ids=[f"new#{i}" for i in range(100)])


def change(client: httpx.Client, verb: str, **body: Any) -> dict[str, Any]:
    """A reply, after checking that it is one."""
    response = client.post(f"/v1/index/{verb}", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def best(client: httpx.Client, **body: Any) -> dict[str, Any]:
    """The reply's first hit."""
    response = client.post("/v1/search", json={"k": 1, **body})
    assert response.status_code == 200, response.text
    return response.json()["data"][0]


def test_what_is_written_is_found_by_the_next_search(client: httpx.Client, embedder: Embedder) -> None:
    items = [
        {"id": "new#0", "image": data_uri(noise_image(40)), "columns": {"caption": "the fortieth", "size": 7}},
        {"id": "new#1", "text": "a green square"},
    ]
    reply = change(client, "upsert", items=items)
    assert (reply["upserted"], reply["index"]) == (2, "gallery")
    assert reply["usage"]["prompt_tokens"] > embedder.count_text_tokens(["a green square"])[0]
    hit = best(client, query={"image": data_uri(noise_image(40))})
    nowhere = {"shard": None, "offset": None, "length": None}
    assert (hit["id"], hit["columns"]) == (
        "new#0",
        {"kind": "image", "caption": "the fortieth", "size": 7.0, **nowhere},
    )
    missing = client.get("/v1/search/image", params={"id": "new#0"})  # what came over HTTP is not kept
    error_of(missing, 404, "image_not_found")
    assert hit["score"] == pytest.approx(1, abs=1e-5)
    hit = best(client, query="a green square")
    assert (hit["id"], hit["columns"]["kind"], hit["columns"]["caption"]) == ("new#1", "text", None)

    again = change(client, "upsert", items=[{"id": "new#1", "text": "another text"}])
    assert again["version"] > reply["version"]
    assert best(client, query="another text")["score"] == pytest.approx(1, abs=1e-5)
    assert best(client, query="a green square", version=reply["version"])["score"] == pytest.approx(1, abs=1e-5)

    gone = change(client, "delete", ids=["new#0", "new#1", "nobody"])
    assert (gone["deleted"], gone["version"] > again["version"]) == (2, True)
    assert best(client, query={"image": data_uri(noise_image(40))})["id"].startswith("g#")
    assert change(client, "delete", ids=["new#0"])["deleted"] == 0


def test_writers_at_the_same_time_lose_nothing(client: httpx.Client) -> None:
    def write(number: int) -> None:
        change(client, "upsert", items=[{"id": f"new#{number}", "text": f"text number {number}"}])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(12)))
    reply = client.post("/v1/search", json={"query": "text", "k": 1000, "filter": "kind = 'text'"}).json()
    assert {hit["id"] for hit in reply["data"]} == {f"new#{number}" for number in range(12)}


TEXT = {"id": "new#0", "text": "a"}


@pytest.mark.parametrize(
    ("verb", "body", "status", "code", "said"),
    [
        ("upsert", {"items": []}, 422, "invalid_value", "items"),
        ("upsert", {"items": [{"id": "", "text": "a"}]}, 422, "invalid_value", "items[0].id"),
        ("upsert", {"items": [{"id": "new#0"}]}, 422, "invalid_value", "either `text` or `image`"),
        ("upsert", {"items": [TEXT | {"image": data_uri(noise_image(1))}]}, 422, "invalid_value", "either"),
        ("upsert", {"items": [TEXT, {"id": "new#1", "text": " "}]}, 422, "invalid_value", "items[1]"),
        ("upsert", {"items": [TEXT, {"id": "new#1", "image": data_uri(b"no")}]}, 422, "invalid_image", "items[1]"),
        ("upsert", {"items": [TEXT, TEXT]}, 422, "invalid_value", "twice"),
        ("upsert", {"items": [TEXT | {"columns": {"colour": 1}}]}, 422, "invalid_value", "carries caption, size"),
        ("upsert", {"items": [TEXT | {"columns": {"size": "big"}}]}, 422, "invalid_value", "'size' holds double"),
        ("upsert", {"items": [TEXT | {"embedding": [1]}]}, 422, "invalid_value", "embedding"),
        ("upsert", {"items": [TEXT], "index": "other"}, 404, "index_not_found", "gallery"),
        ("upsert", {"items": [TEXT], "model": "gpt"}, 404, "model_not_found", "model"),
        ("delete", {"ids": []}, 422, "invalid_value", "ids"),
        ("delete", {"ids": ["a"], "filter": "1 = 1"}, 422, "invalid_value", "filter"),
        ("delete", {"ids": ["a"], "index": "other"}, 404, "index_not_found", "gallery"),
    ],
)
def test_what_cannot_be_written_is_refused(
    client: httpx.Client, verb: str, body: dict[str, Any], status: int, code: str, said: str
) -> None:
    error = error_of(client.post(f"/v1/index/{verb}", json=body), status, code)
    assert said in error["message"]
    reply = client.post("/v1/search", json={"query": "a", "k": 1000}).json()
    assert len(reply["data"]) == len(CAPTIONS)


def test_a_pinned_replica_stays_and_another_follows(index: str, embedder: Embedder, tmp_path: Path) -> None:
    from serve.config import ServeArgs
    from serve.deployments.served_index import IndexEntry, ServedIndex

    uri = shutil.copytree(index, tmp_path / "gallery")
    pinned, follower, writer = (
        ServedIndex(ServeArgs(index=str(uri), index_version=version), embedder.description())
        for version in ("first", None, None)
    )
    vector = embedder.embed_texts(["a late text"])[0]
    before = [pinned.search(vector, 3, None, None), follower.search(vector, 3, None, None)]
    changed = writer.upsert([IndexEntry("new#0", "text", {})], vector[None])
    assert pinned.search(vector, 3, None, None) == before[0]
    after = follower.search(vector, 3, None, None)
    assert (after.version, after.hits[0]["id"]) == (changed.version, "new#0")
    assert pinned.search(vector, 3, None, changed.version).hits == after.hits
    assert follower.search(vector, 3, None, before[1].version) == before[1]
