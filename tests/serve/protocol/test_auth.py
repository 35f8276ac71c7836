"""Who is let in: keys, loopback, kinds of bodies; admission by tokens, deadlines."""

from __future__ import annotations

import asyncio
import os
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from serve.protocol.auth import Auth, key_digest
from serve.protocol.errors import ApiError, LastResort
from tests.support.wire import KEY, OTHER_KEY, error_of

LONG = "word " * 200


def test_every_route_but_health_and_the_page_wants_a_key(strict: httpx.Client) -> None:
    for header in ("", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}{OTHER_KEY}"):
        for method, path in [("GET", "/v1/models"), ("GET", "/ready"), ("POST", "/v1/embeddings")]:
            response = strict.request(method, path, headers={"Authorization": header}, json={"input": "a"})
            error_of(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/health", "/v1/health/live", "/"):
        assert strict.get(path, headers={"Authorization": ""}).status_code == 200
    for key in (KEY, OTHER_KEY):
        assert strict.get("/v1/models", headers={"Authorization": f"Bearer {key}"}).status_code == 200


def request_from(
    host: str, keys: list[str], headers: dict[str, str], path: str = "/v1/models", write_keys: tuple[str, ...] = ()
) -> int:
    """Status that a guarded application gives to a caller at `host`."""
    statuses: list[int] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def receive() -> Any:
        raise AssertionError("nothing is read")

    raw = [(name.encode(), value.encode()) for name, value in headers.items()]
    scope = {"type": "http", "method": "GET", "path": path, "client": (host, 1234), "headers": raw}
    digests, write_digests = ([key_digest(key) for key in some] for some in (keys, write_keys))
    asyncio.run(LastResort(Auth(application, digests, write_digests))(scope, receive, send))
    return statuses[0]


def test_without_a_key_only_this_machine_is_served() -> None:
    assert request_from("127.0.0.1", [], {}) == request_from("::1", [], {}) == 200
    assert request_from("192.0.2.7", [], {}) == 403
    assert request_from("192.0.2.7", ["k"], {}) == 401
    assert request_from("192.0.2.7", ["k"], {"authorization": "Bearer k"}) == 200


def test_where_there_are_keys_to_write_the_others_may_only_read() -> None:
    for path, key, write_keys, status in (
        ("/v1/index/upsert", "k", (), 200),
        ("/v1/index/upsert", "k", ("w", "x"), 403),
        ("/v1/index/delete", "k", ("w", "x"), 403),
        ("/v1/index/delete", "w", ("w", "x"), 200),
        ("/v1/search", "w", ("w", "x"), 200),
        ("/v1/search", "k", ("w", "x"), 200),
        ("/v1/index/upsert", "other", ("w", "x"), 401),
    ):
        assert request_from("192.0.2.7", ["k"], {"authorization": f"Bearer {key}"}, path, write_keys) == status


def test_kinds_of_bodies(strict: httpx.Client) -> None:
    json_type = {"Content-Type": "application/json"}
    error_of(strict.post("/v1/embeddings", content=b"input=a"), 415, "unsupported_media_type")
    error_of(strict.post("/v1/embeddings", data={"input": "a"}), 415, "unsupported_media_type")
    error_of(strict.post("/v1/embeddings", content=b"", headers=json_type), 422, "invalid_value")
    for body in (b"{bad", b"\xff\xfe", b"[1, 2", b'{"input": "a"} x', b'{"input": ' + b"7" * 5000 + b"}"):
        error_of(strict.post("/v1/embeddings", content=body, headers=json_type), 400, "invalid_json")
    error_of(strict.post("/v1/embeddings", content=b"[" * 100_000, headers=json_type), 400, "invalid_json")
    many = b'{"input": [' + b"0, " * 400_000 + b"0]}"
    error_of(strict.post("/v1/embeddings", content=many, headers=json_type), 413, "body_too_large")
    assert strict.post("/v1/embeddings", content=b'{"input": "a"}', headers=json_type).status_code == 200


def test_a_large_body_is_refused_whether_it_says_its_size_or_not(strict: httpx.Client) -> None:
    def chunks(number: int) -> Any:
        yield b'{"input": "a"'
        for _ in range(number):
            yield b" " * 100_000
        yield b"}"

    json_type = {"Content-Type": "application/json"}
    error_of(strict.post("/v1/embeddings", content=b" " * 2_100_000, headers=json_type), 413, "body_too_large")
    error_of(strict.post("/v1/embeddings", content=chunks(25), headers=json_type), 413, "body_too_large")
    assert strict.post("/v1/embeddings", content=chunks(3), headers=json_type).status_code == 200


def texts(number: int) -> list[str]:
    """Texts of about 215 tokens each, all different."""
    return [f"{LONG} {i}" for i in range(number)]


def test_work_beyond_the_budget_is_refused(client: httpx.Client) -> None:
    """Counting the second request's tokens takes a tenth of the time that the first one's work takes."""
    body = {"input": texts(200)}  # of a budget of 65,536, a quarter of which is left to small requests
    with ThreadPoolExecutor(2) as pool:
        answered, refused = sorted(
            pool.map(lambda _: client.post("/v1/embeddings", json=body), range(2)), key=lambda reply: reply.status_code
        )
    assert answered.status_code == 200
    error_of(refused, 429, "overloaded")
    assert int(refused.headers["retry-after"]) >= 1
    assert client.post("/v1/embeddings", json={"input": "a"}).status_code == 200
    error_of(client.post("/v1/embeddings", json={"input": texts(400)}), 413, "request_too_large")


def test_late_work_is_cancelled_and_its_place_freed(strict: httpx.Client) -> None:
    error_of(strict.post("/v1/embeddings", json={"input": texts(1320)}), 408, "deadline_exceeded")
    deadline = time.monotonic() + 60
    while strict.post("/v1/embeddings", json={"input": texts(150)}).status_code == 429:  # 1,320 + 150 do not fit
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_refusals_are_raised_as_one_kind() -> None:
    error = ApiError(409, "message", "code", "field")
    assert error.failure.body() == {
        "message": "message",
        "type": "invalid_request_error",
        "param": "field",
        "code": "code",
    }


@pytest.fixture(autouse=True)
def no_key_left_in_the_environment() -> None:
    """The fixtures clean up after themselves."""
    assert "VLADVA_API_KEYS" not in os.environ
