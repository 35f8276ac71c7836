"""Forgiving: what clients get slightly wrong or do on the side: a slash at the end, HEAD, pages of other origins."""

from collections.abc import Sequence

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Forgiving:
    """ASGI middleware: `/v1/embeddings/` is `/v1/embeddings` (a redirect would lose the body), and HEAD is GET."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        root = scope.get("root_path", "")
        path = root + (scope["path"].removeprefix(root).rstrip("/") or "/")
        if scope["method"] != "HEAD":
            await self.app({**scope, "path": path}, receive, send)
            return

        async def without_body(message: Message) -> None:
            await send({**message, "body": b""} if message["type"] == "http.response.body" else message)

        await self.app({**scope, "path": path, "method": "GET"}, receive, without_body)


def with_origins(app: ASGIApp, origins: Sequence[str]) -> ASGIApp:
    """The application, which pages of these web origins may call; `*` stands for all."""
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["Authorization", "Content-Type", "x-request-id"],
        expose_headers=["x-request-id", "Retry-After"],
    )
