"""Proxy: gives the errors that Serve's HTTP proxy answers by itself, as plain text, the one shape too.

There are two kinds: those of Serve, which pass a middleware, and a request that is not HTTP, which uvicorn answers
before any middleware sees it.

Serve loads `middlewares` into every proxy where the environment of its controller says
RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=serve.protocol.proxy_errors:middlewares. `serve.app.start` sets it.
"""

import uuid
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.protocol.errors import INTERNAL, Failure, reply

FAILURES = {
    404: Failure(404, "nothing is served under this path", "not_found"),
    408: Failure(408, "not answered in time; the work was cancelled", "deadline_exceeded"),
    429: Failure(429, "the queue is full; try again later", "overloaded"),
    503: Failure(503, "the application is not available at the moment; try again later", "unavailable"),
}


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
    """ASGI middleware: an error that is not JSON is replaced by one that is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced = False

        async def reshape(message: Message) -> None:
            nonlocal replaced
            if message["type"] == "http.response.start" and message["status"] >= 400:
                headers = MutableHeaders(scope=message)
                replaced = not headers.get("content-type", "").startswith("application/json")
                if replaced:
                    request_id = {"x-request-id": headers.get("x-request-id", "")}
                    await reply(FAILURES.get(message["status"], INTERNAL), request_id)(scope, receive, send)
            if not replaced:
                await send(message)

        await self.app(scope, receive, reshape)


def controller_options() -> dict[str, Any]:
    """Options of `serve.start` that turn this on."""
    path = "serve.protocol.proxy_errors:middlewares"
    return {"runtime_env": {"env_vars": {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": path}}}
