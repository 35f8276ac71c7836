"""Request metrics: how many requests of each route were answered with which status, for which reason, and how fast.

They go to Ray's Prometheus endpoint, as those of Serve itself do; GET /metrics shows both.
"""

import json
import time
from collections.abc import Collection
from typing import TYPE_CHECKING

from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

if TYPE_CHECKING:
    from ray.util.metrics import Counter

LATENCY_BUCKETS_S = [0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120]


def request_counter() -> "Counter":
    """Counts requests, in the ingress and where the proxy refuses by itself."""
    from ray.util.metrics import Counter

    return Counter("vladva_requests", "Requests by route, status and reason", ("route", "status", "code"))


class RequestMetrics:
    """ASGI middleware: counts what passes. Paths that are no routes are one: `other`."""

    def __init__(self, app: ASGIApp, routes: Collection[str]) -> None:
        from ray.util.metrics import Histogram

        self.app = app
        self.routes = {path for path in routes if "{" not in path}
        self.patterns = [(compile_path(path)[0], path) for path in routes if "{" in path]
        self.requests = request_counter()
        self.seconds = Histogram("vladva_request_seconds", "Time to the whole answer", LATENCY_BUCKETS_S, ("route",))
        self.first_byte = Histogram(
            "vladva_first_byte_seconds", "Time to the answer's first byte", LATENCY_BUCKETS_S, ("route",)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = {"route": self.route_of(path)}
        began, status, code = time.monotonic(), 0, ""

        async def watch(message: Message) -> None:
            nonlocal status, code
            if message["type"] == "http.response.start":
                status = message["status"]
            elif not code and message.get("body"):
                self.first_byte.observe(time.monotonic() - began, route)
                code = "ok" if status < 400 else code_in(message["body"])
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:  # without a status, the client has gone
            self.seconds.observe(time.monotonic() - began, route)
            self.requests.inc(1, {**route, "status": str(status), "code": code or "left"})

    def route_of(self, path: str) -> str:
        """The route of a path, by the name under which it is counted."""
        if path in self.routes:
            return path
        return next((name for pattern, name in self.patterns if pattern.match(path)), "other")


def code_in(body: bytes) -> str:
    """The reason that an error's body names."""
    try:
        return str(json.loads(body)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "unknown"
