"""OpenAI's batch API with the `openai` client: upload, create, poll, download; what goes wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from serve.deployments.batch_jobs import NAMESPACE, parse_lines
from serve.protocol.batch_files import BatchFiles, new_batch
from serve.protocol.errors import ApiError
from serve.protocol.items import Limits
from tests.support.wire import data_uri, error_of, noise_image
from vladva.core.item_content import ItemContent
from vladva.embed.table import embedding_matrix

if TYPE_CHECKING:
    from openai import OpenAI

    from vladva.models.embedder import Embedder

LIMITS = Limits(items=10, image_bytes=1 << 20, image_pixels=1 << 20)


def line(custom_id: str, body: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A request as a line of an input file."""
    return {"custom_id": custom_id, "method": "POST", "url": "/v1/embeddings", "body": body} | changes


def jsonl(*lines: dict[str, Any]) -> bytes:
    """An input file."""
    return "\n".join(map(json.dumps, lines)).encode()


def wait_for(client: OpenAI, name: str) -> Any:
    """The batch once it is done."""
    deadline = time.monotonic() + 900
    while (batch := client.batches.retrieve(name)).status not in ("completed", "failed", "cancelled"):
        assert time.monotonic() < deadline, batch
        time.sleep(1)
    return batch


def test_a_batch_is_embedded_by_the_job(openai_client: OpenAI, client: httpx.Client, embedder: Embedder) -> None:
    texts = ["a red circle", "two small stars"]
    content = jsonl(
        line("texts", {"input": texts}),
        line("image", {"input": data_uri(noise_image(3)), "encoding_format": "float"}),
        line("too long", {"input": "word " * 600}),
        line("some", {"input": ["a red circle", "word " * 600], "partial": True}),
        line("wrong", {"inputs": "a"}),
        line("both", {"input": {"image": data_uri(noise_image(3)), "text": texts[0]}, "instruction": "Find it."}),
    )
    uploaded = openai_client.files.create(file=("in.jsonl", content), purpose="batch")
    assert openai_client.files.content(uploaded.id).content == content
    created = openai_client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/embeddings", completion_window="24h", metadata={"for": "tests"}
    )
    assert created.status == "validating"
    batch = wait_for(openai_client, created.id)
    assert (batch.status, batch.metadata) == ("completed", {"for": "tests"})
    assert batch.request_counts.model_dump() == {"total": 6, "completed": 4, "failed": 2}
    assert batch.id in [one.id for one in openai_client.batches.list()]

    answers = {one["custom_id"]: one["response"] for one in read_lines(openai_client, batch.output_file_id)}
    assert answers.keys() == {"texts", "image", "some", "both"}
    vectors = [one["embedding"] for one in answers["texts"]["body"]["data"]]
    np.testing.assert_allclose(vectors, embedder.embed_texts(texts), atol=1e-5)
    [image] = answers["image"]["body"]["data"]
    np.testing.assert_allclose(image["embedding"], embedder.embed_images([noise_image(3)])[0], atol=1e-5)
    [both] = answers["both"]["body"]["data"]
    expected = embedder.embed_items([ItemContent(texts[0], noise_image(3), "Find it.")])[0]
    np.testing.assert_allclose(both["embedding"], expected, atol=1e-5)
    online = client.post("/v1/embeddings", json={"input": texts}).json()
    assert answers["texts"]["body"]["usage"] == online["usage"]
    assert answers["texts"]["body"]["fingerprint"] == online["fingerprint"]
    assert [one.get("error", {}).get("code") for one in answers["some"]["body"]["data"]] == [
        None,
        "context_length_exceeded",
    ]
    refused = {one["custom_id"]: one["response"] for one in read_lines(openai_client, batch.error_file_id)}
    assert {name: (one["status_code"], one["body"]["error"]["code"]) for name, one in refused.items()} == {
        "too long": (422, "context_length_exceeded"),
        "wrong": (422, "invalid_value"),
    }
    openai_client.files.delete(uploaded.id)
    error_of(client.get(f"/v1/files/{uploaded.id}"), 404, "not_found")


def read_lines(client: OpenAI, name: str) -> list[dict[str, Any]]:
    """The lines of an output file."""
    return [json.loads(one) for one in client.files.content(name).text.splitlines()]


def test_a_killed_batch_goes_on_with_what_it_had(
    openai_client: OpenAI, embedder: Embedder, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Killed once some of its vectors are written, asked after again: nothing is embedded twice, nothing is lost."""
    texts = [[f"item {i} {j} {'word ' * (j % 90)}" for j in range(250)] for i in range(8)]
    uploaded = openai_client.files.create(
        file=("in.jsonl", jsonl(*(line(f"{i}", {"input": one}) for i, one in enumerate(texts)))), purpose="batch"
    )
    created = openai_client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/embeddings", completion_window="24h"
    )
    # pytest has a link to the newest folder of each name.
    [about] = {path.resolve() for path in tmp_path_factory.getbasetemp().glob(f"*/batches/{created.id}.json")}
    parts = about.with_suffix("") / "_parts"
    deadline = time.monotonic() + 300
    while not any(whole(parts)):
        assert time.monotonic() < deadline, openai_client.batches.retrieve(created.id)
        time.sleep(0.01)
    ray.kill(ray.get_actor(created.id, NAMESPACE))
    kept = {name for path in whole(parts) for name in negate(path)}  # what is used again is known again
    batch = wait_for(openai_client, created.id)
    assert batch.request_counts.model_dump() == {"total": 8, "completed": 8, "failed": 0}
    answers = {one["custom_id"]: one["response"]["body"] for one in read_lines(openai_client, batch.output_file_id)}
    assert answers.keys() == {f"{i}" for i in range(8)}
    again = set()
    for i, one in enumerate(texts):
        expected = embedder.embed_texts(one)
        found = np.array([entry["embedding"] for entry in answers[f"{i}"]["data"]])
        np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-5)
        again |= {f"{i}#{j}" for j in np.flatnonzero((found * expected).sum(axis=1) < 0)}
    assert again == kept, "what was there was computed again"
    assert len(kept) < sum(map(len, texts)), "the batch was done before it was killed"


def whole(parts: Path) -> list[Path]:
    """The files of a table in progress that are written to their end."""
    return [path for path in parts.glob("*/*.parquet") if path.stem.isalnum()]


def negate(path: Path) -> list[str]:
    """Change the sign of all vectors of a table's file. Returns the ids."""
    table = pq.read_table(path)
    place = table.schema.get_field_index("embedding")
    field = table.schema.field(place)
    vectors = pa.array((-embedding_matrix(table)).tolist(), field.type)
    pq.write_table(table.set_column(place, field, vectors), path)
    return table["id"].to_pylist()


def test_what_is_no_batch_is_refused(openai_client: OpenAI, client: httpx.Client, strict: httpx.Client) -> None:
    for name in ("file-0", "..%2f..%2fetc%2fpasswd", "file-" + "0" * 32):
        error_of(client.get(f"/v1/files/{name}"), 404, "not_found")
    body = {"input_file_id": "file-" + "0" * 32, "endpoint": "/v1/embeddings", "completion_window": "24h"}
    error_of(client.post("/v1/batches", json=body), 404, "not_found")
    error_of(client.post("/v1/batches", json=body | {"endpoint": "/v1/chat/completions"}), 422, "invalid_value")
    error_of(client.post("/v1/files", json={}), 415, "unsupported_media_type")
    error_of(client.post("/v1/files", files={"x": b"a"}), 422, "invalid_value")
    error_of(strict.get("/v1/batches"), 404, "not_found")
    uploaded = openai_client.files.create(file=("in.jsonl", b"no JSON"), purpose="batch")
    created = openai_client.batches.create(
        input_file_id=uploaded.id, endpoint="/v1/embeddings", completion_window="24h"
    )
    batch = wait_for(openai_client, created.id)
    assert batch.status == "failed"
    assert "line 1" in batch.errors.data[0].message
    error_of(client.post(f"/v1/batches/{batch.id}/cancel"), 409, "batch_is_done")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 requests"),
        (b"\n\n", "0 requests"),
        (b"{", "line 1"),
        (jsonl(line("a", {"input": "a"}), {"body": {}}), "line 2: send"),
        (jsonl(line("a", {"input": "a"}), line("a", {"input": "b"})), "'a' is there twice"),
        (jsonl(line("a", {"input": "a"}, method="GET")), "line 1: send"),
    ],
)
def test_a_file_that_cannot_be_answered_fails_as_a_whole(content: bytes, message: str) -> None:
    with pytest.raises(ApiError) as error:
        parse_lines(content, LIMITS)
    assert message in error.value.failure.message


def test_files_and_batches_are_listed_the_newest_first(tmp_path: Path) -> None:
    files = BatchFiles(str(tmp_path))
    assert files.listing("batch") == []
    batches = [new_batch(files.new_id("batch"), "file", "/v1/embeddings", "24h", None) for _ in range(2)]
    for age, batch in enumerate(batches):
        files.write_batch(batch, created_at=age)
    (tmp_path / "batches" / batches[0]["id"]).mkdir()
    (tmp_path / "batches" / batches[0]["id"] / "_table.json").write_text("{}")  # of its embeddings table
    assert [one["id"] for one in files.listing("batch")] == [batches[1]["id"], batches[0]["id"]]
    assert files.listing("file") == []


def test_a_line_that_cannot_be_answered_fails_alone() -> None:
    lines = parse_lines(
        jsonl(
            line("good", {"input": ["a", "b"]}),
            line("elsewhere", {"input": "a"}, url="/v1/chat/completions"),
            line("many", {"input": ["a"] * 11}),
        ),
        LIMITS,
    )
    assert [one.failure and one.failure.code for one in lines] == [None, "invalid_value", "invalid_value"]
    assert [len(one.items) for one in lines] == [2, 0, 0]
