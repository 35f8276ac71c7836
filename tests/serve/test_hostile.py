"""A few hundred hostile requests; tests/bench/hostile.py sends thousands, and small ones beside them."""

from __future__ import annotations

import asyncio
from collections import Counter

import httpx
import ray

from tests.support.hostile_requests import complaint, exchange, hostile_requests, http_request

REQUESTS, AT_A_TIME = 300, 12


def replicas() -> set[str]:
    """The actors of the application; one that dies is replaced by one of another name."""
    return {one["name"] for one in ray.util.list_named_actors(all_namespaces=True) if "vladva#" in one["name"]}


def test_every_hostile_request_is_answered_and_nothing_dies(client: httpx.Client) -> None:
    host, port = client.base_url.host, client.base_url.port
    assert port is not None
    before = replicas()

    async def all_of_them() -> list[str]:
        places = asyncio.Semaphore(AT_A_TIME)

        async def one(sent: bytes) -> str | None:
            async with places:
                return complaint(await exchange(host, port, sent))

        requests = list(hostile_requests(seed=7, count=REQUESTS))
        found = await asyncio.gather(*[one(request.sent) for request in requests])
        return [f"{what} after {r.sent[:300]!r}" for what, r in zip(found, requests, strict=True) if what]

    complaints = asyncio.run(all_of_them())
    assert not complaints, Counter(complaints).most_common(3)
    assert replicas() == before
    assert client.get("/ready").status_code == 200


def test_a_complaint_is_made_of_what_is_wrong(client: httpx.Client) -> None:
    """The negative control: answers of other servers would be noticed."""
    right = b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}'

    def answer(status: str, body: bytes, kind: str = "application/json") -> bytes:
        return f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\nx-request-id: 1\r\n\r\n".encode() + body

    assert complaint(answer("422 x", right)) is None
    assert complaint(answer("200 x", b"anything", "text/plain")) is None
    assert complaint(answer("404 x", right.replace(b'"m"', b'"no model ../../etc/passwd"'))) is None
    assert complaint(b"") == "no answer"
    for wrong in (
        answer("500 x", right),
        answer("200 x", b"root:x:0:0:root:/root:/bin/bash", "text/plain"),
        answer("422 x", right, "text/plain"),
        answer("422 x", b'{"detail": []}'),
        answer("422 x", right.replace(b'"m"', b'"no /tmp/x"')),
        answer("422 x", right.replace(b'"m"', b'"' + b"m" * 1000 + b'"')),
    ):
        assert complaint(wrong)
    assert http_request("GET", "/", b"").startswith(b"GET / HTTP/1.1\r\n")
