"""Auth: what is checked before a body is read: who asks, and what kind of body it is."""

import hashlib
import hmac
from collections.abc import Sequence
from ipaddress import ip_address

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve.protocol.errors import ApiError

OPEN_PATHS = {"/health", "/v1/health/live", "/"}  # the page holds nothing, and asks for the key
WRITE_PATHS = "/v1/index/"
UPLOAD_PATH = "/v1/files"


def key_digest(key: str) -> bytes:
    """What is kept of an API key."""
    return hashlib.sha256(key.encode()).digest()


class Auth:
    """ASGI middleware: API key (401), loopback only without one (403), JSON only (415).

    write_digests: of the keys that may change the index as well (403 for the others); without any, every key may.
    """

    def __init__(self, app: ASGIApp, key_digests: Sequence[bytes], write_digests: Sequence[bytes] = ()) -> None:
        self.app = app
        self.key_digests = [*key_digests, *write_digests]
        self.write_digests = write_digests

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            if path not in OPEN_PATHS:
                self.check_caller(scope, headers, writes=path.startswith(WRITE_PATHS))
            if scope["method"] == "POST":
                self.check_kind(path, headers)
        await self.app(scope, receive, send)

    def check_caller(self, scope: Scope, headers: Headers, *, writes: bool) -> None:
        """Refuse a caller without a key; where no key is configured, every caller that is not on this machine.

        One who `writes` needs a key for that, where there are such.
        """
        if not self.key_digests:
            if not is_loopback(scope):
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

    def check_kind(self, path: str, headers: Headers) -> None:
        """Refuse what is not JSON before reading it; only a file is uploaded as a form."""
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if path.endswith("/cancel") and not headers.get("content-length", "0").strip("0"):
            return  # OpenAI's clients send no body, and say so in no type
        wanted = "multipart/form-data" if path == UPLOAD_PATH else "application/json"
        if kind != wanted:
            raise ApiError(415, f"send `Content-Type: {wanted}`", "unsupported_media_type")


def is_loopback(scope: Scope) -> bool:
    """Whether a request comes from this machine; one from nowhere that can be named does not."""
    try:
        return ip_address(scope["client"][0]).is_loopback
    except (KeyError, TypeError, ValueError):
        return False
