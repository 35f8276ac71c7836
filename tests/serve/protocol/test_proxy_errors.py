"""What stands around Serve's proxy: its own errors are tried again or reshaped, an application's pass unchanged."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from serve.protocol import bodies, proxy_errors
from serve.protocol.errors import FULL_HEADER
from serve.protocol.proxy_errors import OneShape


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other without waiting."""
    monkeypatch.setattr(proxy_errors, "RETRY_AFTER_S", (0, 0))


SILENT = 0  # the proxy gives no answer, which uvicorn then does


def ask(
    answers: list[tuple[int, str]], *, method: str = "POST", path: str = "/v1/embeddings", parts: int = 2
) -> tuple[int, bytes, list[bytes]]:
    """(status, body, bodies that the proxy saw) where the proxy gives one after the other of some (status, kind)."""
    seen: list[bytes] = []
    sent: list[Any] = []
    left = iter([{"type": "http.request", "body": b"part", "more_body": i + 1 < parts} for i in range(parts)])
    coming = iter(answers)

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        seen.append(body)
        status, kind = next(coming)
        if status == SILENT:
            return
        await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", kind.encode())]})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> Any:
        return next(left)

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(OneShape(proxy)({"type": "http", "method": method, "path": path}, receive, send))
    start, *bodies = sent
    return start["status"], b"".join(one.get("body", b"") for one in bodies), seen


PLAIN, JSON = "text/plain", "application/json"


class Ingress:
    """What is behind the proxy: it answers 429, and says for how long anybody would be refused."""

    def __init__(self, full_s: str | None) -> None:
        self.full_s = full_s
        self.asked = 0
        self.proxy = OneShape(self)
        self.counted: list[str] = []
        self.proxy.full.count = self.counted.append  # type: ignore[method-assign]  # no Ray here

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.asked += 1
        headers = [(b"content-type", b"application/json"), (b"retry-after", b"3")]
        if self.full_s is not None:
            headers.append((FULL_HEADER.encode(), self.full_s.encode()))
        await send({"type": "http.response.start", "status": 429, "headers": headers})
        await send({"type": "http.response.body", "body": b"{}"})

    async def post(
        self, path: str = "/v1/embeddings", headers: Any = (), method: str = "POST", *, more: bool = False
    ) -> tuple[int, Any, Any]:
        """(status, headers, body) of an answer; with `more` to a body of which only much is there."""
        sent: list[Any] = []
        body = b"x" * proxy_errors.FIRST_BYTES if more else b"{}"

        async def receive() -> Any:
            return {"type": "http.request", "body": body, "more_body": more}

        async def send(message: Any) -> None:
            sent.append(message)

        await self.proxy({"type": "http", "method": method, "path": path, "headers": list(headers)}, receive, send)
        return sent[0]["status"], dict(sent[0]["headers"]), json.loads(sent[1]["body"])


def test_while_anybody_would_be_refused_nobody_is_asked() -> None:
    """Only on that path, only what is posted, and not what a browser's page sends."""

    async def work() -> None:
        ingress = Ingress("0.2")
        status, headers, _ = await ingress.post()
        assert (status, ingress.asked) == (429, 1)
        assert FULL_HEADER.encode() not in headers  # it is the proxy's own business
        status, headers, body = await ingress.post()
        assert (status, body["error"]["code"], headers[b"retry-after"]) == (429, "overloaded", b"1")
        assert b"x-request-id" in headers
        assert (ingress.asked, ingress.counted) == (1, ["/v1/embeddings"])
        await ingress.post("/v2/embed")
        await ingress.post(headers=[(b"origin", b"https://a.example")])
        await ingress.post(method="GET")
        await ingress.post(more=True)  # its body has to be read first
        assert (ingress.asked, len(ingress.counted)) == (5, 1)
        await asyncio.sleep(0.25)
        await ingress.post("/v1/embeddings")
        assert (ingress.asked, len(ingress.counted)) == (6, 1)

    asyncio.run(work())


@pytest.mark.parametrize(("full_s", "path"), [(None, "/v1/embeddings"), ("5.0", "/v1/rerank")])
def test_a_refusal_of_one_request_is_no_refusal_of_others(full_s: str | None, path: str) -> None:
    """Which does not say so, or is of a path whose requests wait in different queues."""

    async def work() -> int:
        ingress = Ingress(full_s)
        for _ in range(3):
            await ingress.post(path)
        return ingress.asked

    assert asyncio.run(work()) == 3


def test_a_request_whose_ingress_died_is_answered_by_another() -> None:
    assert ask([(500, PLAIN), (503, PLAIN), (200, JSON)]) == (200, b"{}", [b"partpart"] * 3)


def test_a_request_whose_ingress_died_in_silence_is_answered_by_another() -> None:
    assert ask([(SILENT, ""), (200, JSON)]) == (200, b"{}", [b"partpart"] * 2)
    status, body, seen = ask([(SILENT, "")] * 3)
    assert (status, json.loads(body)["error"]["code"], len(seen)) == (500, "internal_error", 3)
    assert len(ask([(SILENT, "")], path="/v1/batches")[2]) == 1


def test_when_none_answers_the_error_has_the_one_shape() -> None:
    status, body, seen = ask([(500, PLAIN)] * 3)
    assert (status, json.loads(body)["error"]["code"], len(seen)) == (500, "internal_error", 3)


def test_an_applications_own_answers_pass_unchanged() -> None:
    assert ask([(500, JSON)]) == (500, b"{}", [b"partpart"])
    assert ask([(422, "application/json; charset=utf-8")]) == (422, b"{}", [b"partpart"])


@pytest.mark.parametrize("status", [404, 408, 429])
def test_what_is_no_fault_of_an_ingress_is_not_tried_again(status: int) -> None:
    answered, body, seen = ask([(status, PLAIN)])
    assert (answered, len(seen)) == (status, 1)
    assert json.loads(body)["error"]["code"] != "internal_error"


def test_what_may_not_be_done_twice_is_not() -> None:
    assert len(ask([(500, PLAIN)], path="/v1/batches")[2]) == 1
    assert len(ask([(500, PLAIN), (200, JSON)], path="/v1/batches/b", method="GET")[2]) == 2


def test_a_body_too_large_to_keep_is_sent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_errors, "KEPT_BYTES", 7)
    monkeypatch.setattr(proxy_errors, "FIRST_BYTES", 4)
    status, body, seen = ask([(500, PLAIN)])
    assert (status, json.loads(body)["error"]["code"], len(seen)) == (500, "internal_error", 1)


def test_bodies_that_stop_are_refused_before_they_reach_an_ingress(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SLOW_AFTER_S", 0.1)
    monkeypatch.setattr(bodies, "SLOW_PER_CLIENT", 3)
    passed_on: list[str] = []
    refused: list[str] = []

    async def proxy(scope: Any, receive: Any, send: Any) -> None:
        passed_on.append(scope["client"][0])
        await asyncio.sleep(0.2)
        await send({"type": "http.response.start", "status": 408, "headers": [(b"content-type", JSON.encode())]})
        await send({"type": "http.response.body", "body": b"{}"})

    middleware = OneShape(proxy)

    async def one(client: str, parts: list[Any]) -> None:
        left = iter(parts)

        async def receive() -> Any:
            body, more = next(left, (None, True))
            await asyncio.sleep(3600 if body is None else 0)
            return {"type": "http.request", "body": body, "more_body": more}

        async def send(message: Any) -> None:
            if message.get("status") == 429:
                assert (b"connection", b"close") in message["headers"]
                refused.append(client)

        scope = {"type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [], "client": (client, 1)}
        await middleware(scope, receive, send)

    async def all_of_them() -> None:
        stalled = [one("stalled", [(b"{", True)]) for _ in range(10)]
        whole = [one("whole", [(b"{", True), (b"}", False)]) for _ in range(10)]
        large = [one("large", [(b"x" * proxy_errors.FIRST_BYTES, True)]) for _ in range(10)]
        await asyncio.gather(*stalled, *whole, *large)

    asyncio.run(all_of_them())
    assert {name: passed_on.count(name) for name in ("stalled", "whole", "large")} == {
        "stalled": 3,
        "whole": 10,
        "large": 10,
    }
    assert refused == ["stalled"] * 7
    assert middleware.slow.counts.total() == 0
