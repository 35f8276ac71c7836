"""Auth and limits: what is checked before a body is parsed: who asks, what kind of body it is, and how large."""

import hashlib
import hmac
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.protocol.errors import ApiError

OPEN_PATHS = {"/health"}
WRITE_PATHS = "/v1/index/"


def key_digest(key: str) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode()).digest()


class AuthAndLimits:
    """ASGI middleware: API key (401), loopback only without one (403), JSON only (415), body cap (413).

    write_digests: of the keys that may change the index as well (403 for the others); without any, every key may.
    """

    def __init__(
        self, app: ASGIApp, key_digests: Sequence[bytes], max_body_bytes: int, write_digests: Sequence[bytes] = ()
    ) -> None:
        self.app = app
        self.key_digests = [*key_digests, *write_digests]
        self.write_digests = write_digests
        self.max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path not in OPEN_PATHS:
                self.check_caller(scope, headers, writes=path.startswith(WRITE_PATHS))
            if scope["method"] == "POST":
                self.check_kind(headers)
                receive = await self.bounded(headers, receive)
        await self.app(scope, receive, send)

    def check_caller(self, scope: Scope, headers: Headers, *, writes: bool) -> None:
        """Refuse a caller without a key; where no key is configured, every caller that is not on this machine.

        One who `writes` needs a key for that, where there are such.
        """
        if not self.key_digests:
            if not ip_address(scope["client"][0]).is_loopback:
                raise ApiError(403, "no API key is configured, so only this machine is served", "loopback_only")
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        presented = key_digest(key.strip())
        # Compare with every key, each in constant time, so that the time taken says nothing about any of them.
        matches = [hmac.compare_digest(presented, known) for known in self.key_digests]
        if scheme.lower() != "bearer" or not any(matches):
            raise ApiError(401, "a valid API key is needed: `Authorization: Bearer KEY`", "invalid_api_key")
        if writes and self.write_digests and not any(matches[-len(self.write_digests) :]):
            raise ApiError(403, "this API key may search the index, not change it", "read_only_api_key")

    def check_kind(self, headers: Headers) -> None:
        """Refuse what is not JSON before reading it."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, "send `Content-Type: application/json`", "unsupported_media_type")

    async def bounded(self, headers: Headers, receive: Receive) -> Receive:
        """Read the body, at most `max_body_bytes` of it, and give it out again as one message."""
        declared = headers.get("content-length", "")
        if declared.isdigit() and int(declared) > self.max_body_bytes:
            raise self.too_large()
        body, more = bytearray(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                break
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.max_body_bytes:
                raise self.too_large()
        pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        return replay

    def too_large(self) -> ApiError:
        """The refusal of a body beyond the cap."""
        return ApiError(413, f"the body is larger than {self.max_body_bytes:,} bytes", "body_too_large")
