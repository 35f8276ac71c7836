"""Proxy: what stands around Serve's own HTTP proxy, so that clients see one error shape and no dead ingress.

- Errors that the proxy answers by itself, as plain text, get the one shape.
- So does what is not HTTP at all, which uvicorn answers before any middleware sees it.
- A request whose ingress died before it answered is sent to another one; what may not be done twice is not.
- A request is passed on when its body is there, or much of it: bodies that stop cost the ingress nothing.
- Where an answer says that anybody would be refused for a moment, requests to the same path are refused here meanwhile:
  under overload a refusal otherwise takes a fifth of what an answer does, from those who make answers.

Serve loads `middlewares` into every proxy where the environment of its controller says
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.protocol.proxy_errors:middlewares. `serve.app` sets it.
"""

import asyncio
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.protocol import bodies
from serve.protocol.bodies import SlowBodies
from serve.protocol.errors import FULL_HEADER, INTERNAL, Failure, reply
from serve.protocol.request_metrics import request_counter

CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ENVIRONMENT = {
    CALLBACK: "serve.protocol.proxy_errors:middlewares",
    # A proxy that has died is replaced after three failed checks: 6 seconds rather than 30 in which nobody answers.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "2",
    # One that is not up within five seconds is killed by default, which on a busy machine ends the start.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
}
FAILURES = {
    404: Failure(404, "nothing is served under this path", "not_found"),
    408: Failure(408, "not answered in time; the work was cancelled", "deadline_exceeded"),
    429: Failure(429, "the queue is full; try again later", "overloaded"),
    503: Failure(503, "the application is not available at the moment; try again later", "unavailable"),
}
RETRY_AFTER_S = (0.1, 0.5, 2.0, 5.0)  # an ingress is replaced within seconds
RETRIED = {500, 503}
FULL_PATHS = ("/v1/embeddings", "/v2/embed", "/v1/chat/completions")  # where every request waits in the same queue
ONCE_PATHS = ("/v1/files", "/v1/batches")  # a second try would make a second one
KEPT_BYTES = 16 << 20  # of a request's body, for another try
FIRST_BYTES = 256 << 10  # of those, with which a request is passed on before the rest is there


def middlewares() -> list[Middleware]:
    """What Serve puts around its proxy."""
    H11Protocol.send_400_response = refuse_connection  # type: ignore[method-assign, assignment]
    HttpToolsProtocol.send_400_response = refuse_connection  # type: ignore[method-assign, assignment]
    return [Middleware(OneShape)]


def refuse_connection(protocol: "H11Protocol | HttpToolsProtocol", message: str) -> None:
    """Answer what is not HTTP, and hang up. `message` is uvicorn's own, and the same for everything."""
    failure = Failure(400, "the request is not valid HTTP", "invalid_http")
    response = reply(failure, {"x-request-id": str(uuid.uuid4()), "connection": "close"})
    lines = [b"HTTP/1.1 400 Bad Request", *(name + b": " + value for name, value in response.raw_headers)]
    if not protocol.transport.is_closing():
        protocol.transport.write(b"\r\n".join([*lines, b"", bytes(response.body)]))
        protocol.transport.close()


class OneShape:
    """ASGI middleware: an error that is not JSON is the proxy's own. It is tried again, or answered as JSON."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.slow = SlowBodies()
        self.full = FullPaths()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await refuse_websocket(scope, receive, send)
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body = KeptBody(receive)
        if scope["method"] != "POST" or await body.arrives(bodies.SLOW_AFTER_S):
            if body.complete and (full := self.full.refusal(scope)):
                await reply(full, {"x-request-id": request_id(scope)})(scope, receive, send)
            else:
                await self.answered(scope, body, send)
            return
        client = scope["client"][0] if scope.get("client") else ""
        if refusal := self.slow.refusal(client):
            headers = {"x-request-id": request_id(scope), "connection": "close"}
            await reply(refusal, headers)(scope, receive, send)
            return
        with self.slow.one_more(client):
            await self.answered(scope, body, send)

    async def answered(self, scope: Scope, body: "KeptBody", send: Send) -> None:
        """Pass the request on, again where its ingress dies."""
        once = scope["method"] == "POST" and scope["path"].startswith(ONCE_PATHS)
        for wait in (*RETRY_AFTER_S, None):
            error = await self.attempt(scope, body.from_the_start(), send)
            if error is None or body.left:
                return
            if wait is None or once or not body.whole or error["status"] not in RETRIED:
                await self.answer(error, scope, body.receive, send)
                return
            await asyncio.sleep(wait)

    async def attempt(self, scope: Scope, receive: Receive, send: Send) -> Message | None:
        """Pass the request on. Returns the start of an error of the proxy's own, of which nothing has been sent."""
        error: Message | None = None
        started = False

        async def watch(message: Message) -> None:
            nonlocal error, started
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = MutableHeaders(scope=message)
                kind = headers.get("content-type", "")
                if FULL_HEADER in headers:
                    self.full.note(scope, headers)
                if not kind.startswith("application/json"):
                    error = message
            if error is None:
                started = True
                await send(message)

        await self.app(scope, receive, watch)
        if error is None and not started:  # what the proxy calls a 500 it does not answer at all: uvicorn does
            return {"type": "http.response.start", "status": INTERNAL.status, "headers": []}
        return error

    async def answer(self, error: Message, scope: Scope, receive: Receive, send: Send) -> None:
        """Send an error of the proxy's own in the one shape."""
        headers = MutableHeaders(scope=error)
        kept = {name: headers[name] for name in ("retry-after", "x-request-id") if name in headers}
        kept.setdefault("x-request-id", str(uuid.uuid4()))
        await reply(FAILURES.get(error["status"], INTERNAL), kept)(scope, receive, send)


class FullPaths:
    """Paths on which anybody would be refused, and until when."""

    def __init__(self) -> None:
        self.until: dict[str, float] = {}
        self.requests: Any = None  # the counter that the ingress has, too

    def note(self, scope: Scope, headers: MutableHeaders) -> None:
        """Read, and take from an answer, what it says of others than its own request."""
        seconds = float(headers[FULL_HEADER])
        del headers[FULL_HEADER]
        if scope["method"] == "POST" and scope["path"].endswith(FULL_PATHS):
            self.until[scope["path"]] = time.monotonic() + seconds

    def refusal(self, scope: Scope) -> Failure | None:
        """What a request is refused with, or None where it is passed on.

        That of a page is always passed on: its browser wants headers that the ingress knows.
        """
        path = scope["path"]
        if time.monotonic() >= self.until.get(path, 0.0) or scope["method"] != "POST":
            return None
        if "origin" in Headers(scope=scope):
            return None
        self.count(path)
        return FAILURES[429]

    def count(self, path: str) -> None:
        """Count a refusal where the ingress counts its own."""
        if self.requests is None:
            self.requests = request_counter()
        self.requests.inc(1, {"route": path, "status": "429", "code": FAILURES[429].code})


def request_id(scope: Scope) -> str:
    """The caller's, or a new one."""
    return Headers(scope=scope).get("x-request-id") or str(uuid.uuid4())


async def refuse_websocket(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer who wants to speak another protocol: there is none here."""
    await receive()  # the request to connect
    if "websocket.http.response" not in scope.get("extensions", {}):
        await send({"type": "websocket.close", "code": 1008})
        return
    response = reply(FAILURES[404], {"x-request-id": str(uuid.uuid4())})
    start = {"type": "websocket.http.response.start", "status": response.status_code, "headers": response.raw_headers}
    await send(start)
    await send({"type": "websocket.http.response.body", "body": bytes(response.body)})


class KeptBody:
    """The messages of a request, kept so that they can be given out again."""

    def __init__(self, receive: Receive) -> None:
        self.receive = receive
        self.messages: list[Message] = []
        self.bytes = 0
        self.whole = True  # nothing has been left out
        self.left = False  # the client has gone
        self.complete = False  # the last message is there

    async def arrives(self, seconds: float) -> bool:
        """Whether the body is there within this time, or its first FIRST_BYTES."""
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        take = self.from_the_start()
        try:
            while not self.left and self.bytes < FIRST_BYTES:
                message = await asyncio.wait_for(take(), end - loop.time())
                if not message.get("more_body", False):
                    break
        except asyncio.TimeoutError:
            return False
        return True

    def from_the_start(self) -> Receive:
        """A `receive` that begins with the first message."""
        position = 0

        async def next_message() -> Message:
            nonlocal position
            if position < len(self.messages):
                position += 1
                return self.messages[position - 1]
            message = await self.receive()
            if message["type"] == "http.disconnect":
                self.left = True
                return message
            self.complete = not message.get("more_body", False)
            self.bytes += len(message.get("body", b""))
            if self.bytes <= KEPT_BYTES and self.whole:
                self.messages.append(message)
                position += 1
            else:
                self.messages, self.whole = [], False
            return message

        return next_message


def controller_options() -> dict[str, Any]:
    """Options of `serve.start` that turn this on."""
    return {"runtime_env": {"env_vars": ENVIRONMENT}}
