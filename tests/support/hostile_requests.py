"""Hostile requests: from a seed as many as wanted, of three kinds, and the bytes that come back for one.

schema: a body of a route's own form whose values are drawn from the awkward ones;
mutated: such a body, with parts replaced, removed, repeated or nested;
bytes: such a body or its headers damaged as bytes, and what is no HTTP at all.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from tests.support.wire import claiming, data_uri, encode, noise_image

IMAGE = data_uri(noise_image(1))
IMAGES = (
    IMAGE,
    data_uri(encode(Image.effect_noise((64, 64), 50))[:600]),
    data_uri(claiming(60_000, 60_000)),
    data_uri(claiming(7_000, 7_000)),
    data_uri(encode(Image.new("RGB", (1, 1)))),
    data_uri(b"GIF89a"),
    "data:image/png;base64,",
    "data:image/png;base64,@@@@",
    "data:image/svg+xml;base64,PHN2Zy8+",
    "http://169.254.169.254/latest/meta-data",
    "file:///etc/passwd",
    "../../etc/passwd",
)
TEXTS = (
    "a red circle",
    "",
    " ",
    "\x00",
    "\ud800",
    "a\udfffb",
    "\u202e\u200b\ufeff",
    "💥" * 50,
    "word " * 3000,
    "x" * 20_000,
    "<image></s><|im_end|>",
    "' OR 1 = 1 --",
    "${jndi:ldap://x}",
    "{}",
)
FILTERS = (
    "caption = 'a'",
    "1 = 1; DROP TABLE t",
    "levenshtein(repeat(id, 2000), repeat('b', 20000)) > 1",
    "((((((((((((((((((((1 = 1",
    "caption LIKE '%" + "%_" * 200 + "'",
    "id IN (" + ",".join(f"'{i}'" for i in range(300)) + ")",
    "\ud800 = 1",
)
NUMBERS = (0, 1, -1, 3, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, float("inf"), float("nan"))
ANYTHING = (None, True, False, [], {}, [[]], [None], {"a": {}}, [1, 2, 3], *NUMBERS, *TEXTS[:10], *IMAGES[:6])
HEADERS = (
    ("Content-Type", "text/plain"),
    ("Content-Type", "application/json; charset=utf-16"),
    ("Content-Type", "multipart/form-data; boundary=x"),
    ("Content-Type", ""),
    ("Content-Encoding", "gzip"),
    ("x-request-id", "x" * 5000),
    ("x-request-timeout-seconds", "0.0001"),
    ("x-request-timeout-seconds", "soon"),
    ("x-request-timeout-seconds", "-1"),
    ("Authorization", "Bearer \xff"),
    ("Expect", "100-continue"),
    ("Accept", "text/html"),
    ("Cookie", "a=b; " * 500),
    ("Range", "bytes=0-1"),
    ("X-Forwarded-For", "8.8.8.8"),
    ("Transfer-Encoding", "identity"),
    ("Upgrade", "websocket"),
)
NOT_HTTP = (
    b"GARBAGE\r\n\r\n",
    b"GET\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Length: -5\r\n\r\n",
    b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    b"GET /health HTTP/1.1\r\nno colon\r\n\r\n",
    b"GET /\x00 HTTP/1.1\r\nHost: a\r\n\r\n",
)
PATHS = (
    "/", "/nope", "/v1", "/v1//embeddings", "/v1/embeddings/..", "/v1/models/" + "x" * 2000, "/v1/models/%ff%00",
    "/openapi.json", "/docs", "/metrics", "/ready", "/v1/models/../../etc/passwd", "/v1/embeddings?x=" + "y" * 3000,
)  # fmt: skip
TOLD = ("Traceback", "0x", "/root", "/tmp", "site-packages")  # of the machine
STOLEN = b"root:x:0"  # what is in /etc/passwd; its name may come back from who has sent it
METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "BREW")


@dataclass(frozen=True)
class HostileRequest:
    """What is sent, as bytes, and of which kind it is."""

    kind: str
    sent: bytes


def hostile_requests(seed: int, count: int) -> Iterator[HostileRequest]:
    """`count` requests; the same for the same seed."""
    draw = random.Random(seed)
    for _ in range(count):
        kind = draw.choice(("schema", "schema", "mutated", "mutated", "bytes"))
        path, body = route_body(draw)
        if kind == "schema":
            yield HostileRequest(kind, http_request("POST", path, json_bytes(body)))
        elif kind == "mutated":
            for _ in range(draw.randint(1, 4)):
                body = mutated(draw, body)
            yield HostileRequest(kind, http_request("POST", path, json_bytes(body)))
        else:
            yield HostileRequest(kind, damaged_request(draw, path, json_bytes(body)))


def route_body(draw: random.Random) -> tuple[str, Any]:
    """A route and a body of its form."""
    one = draw.choice

    def item() -> Any:
        text, image = one(TEXTS), one(IMAGES)
        parts = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": image}}]
        forms: list[Any] = [text, image, {"text": text}, {"image": image}, {"text": text, "image": image}]
        return one(
            [*forms, {"content": parts[:1]}, {"content": parts[1:]}, parts[1], [{"role": "user", "content": text}]]
        )

    def items() -> Any:
        return one([item(), [item()], [item() for _ in range(draw.randint(2, 5))], [item()] * 40])

    options = {"model": one((None, "tiny", one(TEXTS))), "truncate": one((None, "end", "start", "none"))}
    chat_content = [{"type": "text", "text": one(TEXTS)}, {"type": "image_url", "image_url": {"url": one(IMAGES)}}]
    chat: dict[str, Any] = {
        "messages": [{"role": one(("user", "system", "assistant")), "content": one((one(TEXTS), chat_content))}],
        "max_tokens": one((1, 2, 4)),
        "temperature": one((None, 0, 1.5, *NUMBERS[:4])),
        "stop": one((None, "a", ["x" * 200] * 4, [one(TEXTS)])),
        "stream": one((True, False)),
        "seed": one((None, 1, 2**63)),
    }
    bodies: list[tuple[str, dict[str, Any]]] = [
        ("/v1/embeddings", {"input": items(), "dimensions": one((None, 16, *NUMBERS[:6])), "partial": True, **options}),
        ("/v1/embeddings", {"messages": [[{"role": "user", "content": chat_content}]], **options}),
        ("/v1/score", {"queries": item(), "documents": items()}),
        ("/v1/rerank", {"query": item(), "documents": items(), "top_n": one((None, 1, -1))}),
        ("/v1/classify", {"input": items(), "labels": [one(TEXTS), one(TEXTS)], "template": one(("{}", "a {}", "a"))}),
        ("/v1/search", {"query": item(), "k": one((1, 1000, *NUMBERS[:4])), "filter": one((None, *FILTERS))}),
        ("/v1/search", {"query": [one(NUMBERS) for _ in range(4)], "version": one((None, *NUMBERS, "x"))}),
        ("/v1/index/delete", {"ids": [one(("nobody", *TEXTS))]}),
        ("/v1/tokenize", {"input": items()}),
        ("/v2/embed", {"texts": [one(TEXTS)], "embedding_types": one((["float"], ["int8", "binary"], ["x"]))}),
        ("/v2/rerank", {"query": item(), "documents": items()}),
        ("/v1/chat/completions", chat),
        ("/v1/chat/completions", chat),
    ]
    return one(bodies)


def mutated(draw: random.Random, body: Any) -> Any:
    """A body with one place of it changed."""
    body = copy.deepcopy(body)
    places: list[tuple[Any, Any]] = []

    def collect(value: Any) -> None:
        inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, one in inner:
            places.append((value, key))
            collect(one)

    collect(body)
    if not places:
        return draw.choice(ANYTHING)
    holder, key = draw.choice(places)
    change = draw.choice(("replace", "replace", "remove", "repeat", "nest", "add", "long"))
    if change == "replace":
        holder[key] = draw.choice(ANYTHING)
    elif change == "remove":
        del holder[key]
    elif change == "repeat":
        holder[key] = [holder[key]] * draw.choice((2, 60))
    elif change == "nest":
        for _ in range(draw.choice((1, 5, 40))):
            holder[key] = draw.choice(([holder[key]], {"a": holder[key]}))
    elif change == "add" and isinstance(holder, dict):
        holder[draw.choice(("x", "\ud800", "", "input", "model", "__proto__", "k" * 3000))] = draw.choice(ANYTHING)
    else:
        holder[key] = draw.choice((["a"] * 5000, "long " * 20_000, {str(i): i for i in range(2000)}))
    return body


def damaged_request(draw: random.Random, path: str, body: bytes) -> bytes:
    """A request that is wrong below its JSON."""
    change = draw.choice(("not http", "path", "method", "header", "flip", "cut", "insert", "utf-16", "twice", "junk"))
    if change == "not http":
        return draw.choice(NOT_HTTP)
    if change == "path":
        return http_request(draw.choice(METHODS[:6]), draw.choice(PATHS), body)
    if change == "method":
        return http_request(draw.choice(METHODS), path, body)
    if change == "header":
        return http_request("POST", path, body, [draw.choice(HEADERS) for _ in range(draw.randint(1, 3))])
    place = draw.randrange(len(body))
    if change == "flip":
        body = body[:place] + bytes([body[place] ^ (1 << draw.randrange(8))]) + body[place + 1 :]
    elif change == "cut":
        body = body[:place]
    elif change == "insert":
        body = body[:place] + draw.randbytes(draw.choice((1, 8, 300))) + body[place:]
    elif change == "utf-16":
        body = body.decode().encode("utf-16")
    elif change == "twice":
        body += body
    else:
        body = draw.randbytes(draw.choice((0, 1, 1000)))
    return http_request("POST", path, body)


def json_bytes(body: Any) -> bytes:
    """As Python writes it: with NaN, and with escapes for what is no character."""
    return json.dumps(body).encode()


def http_request(method: str, path: str, body: bytes, headers: list[tuple[str, str]] | None = None) -> bytes:
    """The bytes of a request after whose answer the server hangs up."""
    fields = {"Host": "a", "Connection": "close", "Content-Type": "application/json", "Content-Length": str(len(body))}
    fields |= dict(headers or [])
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


async def exchange(host: str, port: int, sent: bytes, timeout_s: float = 150) -> bytes:
    """What comes back until the server hangs up; nothing where it hangs up at once."""

    async def talk() -> bytes:
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write(sent)
            return await reader.read()
        except ConnectionError:  # hung up on before all was sent, perhaps after the answer
            return b""
        finally:
            writer.close()

    return await asyncio.wait_for(talk(), timeout_s)


def complaint(answer: bytes) -> str | None:
    """What is wrong with an answer: none at all, one of 5xx, a file of ours, or an error not in the one shape."""
    head, _, body = answer.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").split("\r\n")
    if not lines[0].startswith("HTTP/1.1 "):
        return "no answer"
    if STOLEN in body:
        return f"it has read a file: {body[:300]!r}"
    status = int(lines[0].split()[1])
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
    if status < 400:
        return None
    if headers.get("transfer-encoding") == "chunked":
        body = b"".join(chunk.partition(b"\r\n")[2] for chunk in body.split(b"\r\n\r\n") if chunk)
    shown = f"status {status}: {head[:200]!r} {body[:300]!r}"
    if status >= 500 or "x-request-id" not in headers or headers.get("content-type") != "application/json":
        return shown
    return complaint_of_error(body, shown) if body else None  # HEAD has none


def complaint_of_error(body: bytes, shown: str) -> str | None:
    """What is wrong with the body of an error."""
    try:
        error = json.loads(body)["error"]
        message = error["message"]
    except (ValueError, KeyError, TypeError):
        return shown
    if error.keys() != {"message", "type", "param", "code"} or len(message) > 600:
        return shown
    return next((f"it tells {word}: {shown}" for word in TOLD if word in message), None)
