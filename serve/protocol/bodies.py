"""Bodies: how a request's JSON comes in. Limits come before work, each before the work that it bounds:

1. bytes, while they arrive: a cap, a time limit, and few unfinished bodies per client, so that slow ones hold no place;
2. values and nesting, before parsing: counted in the raw bytes;
3. lists, before their elements are looked at.

A large body is parsed in a thread. The scan works in chunks and gives the interpreter free between them.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import numpy as np
from pydantic import BaseModel, JsonValue, ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.protocol.errors import ApiError, Failure, validation_failure

P = ParamSpec("P")
T = TypeVar("T")
Request = TypeVar("Request", bound=BaseModel)

MAX_VALUES = 250_000  # in one body
MAX_JSON_NESTING = 32
LARGE_BYTES = 64 << 10  # a body of more is parsed beside the event loop
CHUNK_BYTES = 1 << 20
SLOW_AFTER_S = 1.0  # a body that has not arrived by then is slow
SLOW_PER_CLIENT = 32
SLOW_IN_ALL = 256
BODIES_IN_MEMORY = 8  # of the largest size allowed, together
QUOTE, COMMA, OPENING, CLOSING = ord('"'), ord(","), (ord("["), ord("{")), (ord("]"), ord("}"))
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")

large_body: ContextVar[bool] = ContextVar("large_body", default=False)


async def off_loop(work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
    """The result of some work: of a large body in a thread, else at once, because a thread costs more than it saves."""
    return await asyncio.to_thread(work, *args, **options) if large_body.get() else work(*args, **options)


@dataclass(frozen=True)
class BodyLimits:
    """What a body may take: bytes, seconds from first to last byte, seconds without any byte."""

    bytes: int
    whole_s: float = 60
    silent_s: float = 10


class BoundedBodies:
    """ASGI middleware: reads the body of a POST, and refuses what is too large (413), too slow (408), or one too many.

    Bodies that have not arrived after a second are counted by client: beyond SLOW_PER_CLIENT of them the next one is
    refused (429), so that one client's stalled uploads leave the places of the ingress to the others.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self.app = app
        self.limits = limits
        self.slow: Counter[str] = Counter()
        self.held = 0  # bytes of all bodies that are being read or answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        client = scope["client"][0] if scope.get("client") else ""
        try:
            await self.read(Headers(scope=scope), client, receive, body)
            large_body.set(len(body) > LARGE_BYTES)
            pending: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

            async def replay() -> Message:
                if pending:
                    return pending.pop()
                try:
                    return await receive()
                except Exception:  # Serve raises where the client has gone, rather than saying so
                    return {"type": "http.disconnect"}

            await self.app(scope, replay, send)
        finally:
            self.held -= len(body)

    async def read(self, headers: Headers, client: str, receive: Receive, body: bytearray) -> None:
        """Fill `body`. Raises ApiError for one that is refused, ClientDisconnect where the client has gone."""
        declared = headers.get("content-length", "")
        if declared.isdecimal() and (len(declared) > 18 or int(declared) > self.limits.bytes):
            raise self.too_large()
        loop = asyncio.get_running_loop()
        start = last = loop.time()
        slow, more = False, True
        receiving: asyncio.Future[Message] = asyncio.ensure_future(receive())
        try:
            while more:
                end = min(start + self.limits.whole_s, last + self.limits.silent_s)
                wake = end if slow else min(end, start + SLOW_AFTER_S)
                await asyncio.wait({receiving}, timeout=max(wake - loop.time(), 0))
                if not receiving.done():
                    if wake == end:
                        raise ApiError(408, "the body did not arrive in time", "body_timeout")
                    self.check_slow(client)
                    slow = True
                    self.slow[client] += 1
                    continue
                try:
                    message, last = receiving.result(), loop.time()
                except Exception as error:  # Serve raises where the client has gone, rather than saying so
                    raise ClientDisconnect from error
                if message["type"] == "http.disconnect":
                    raise ClientDisconnect
                more = message.get("more_body", False)
                self.keep(body, message.get("body", b""))
                if more:
                    receiving = asyncio.ensure_future(receive())
        finally:
            receiving.cancel()
            if slow:
                self.slow[client] -= 1
                self.slow += Counter()  # drops those at 0

    def keep(self, body: bytearray, part: bytes) -> None:
        """Add a part to the body. Raises ApiError where this is too much, for it or for all bodies together."""
        body += part
        self.held += len(part)
        if len(body) > self.limits.bytes:
            raise self.too_large()
        if self.held > BODIES_IN_MEMORY * self.limits.bytes:
            raise ApiError(429, "too many large bodies are on their way; try again later", "overloaded")

    def check_slow(self, client: str) -> None:
        """Refuse one more slow body of a client that has many, and any where all clients together have."""
        if self.slow[client] >= SLOW_PER_CLIENT or self.slow.total() >= SLOW_IN_ALL:
            raise ApiError(429, "too many bodies arrive slowly; send them one after the other", "overloaded")

    def too_large(self) -> ApiError:
        """The refusal of a body beyond the cap."""
        return ApiError(413, f"the body is larger than {self.limits.bytes:,} bytes", "body_too_large")


def shape_of(body: bytes) -> tuple[int, int]:
    """(values, nesting) of a JSON text, or more: counted from its punctuation outside strings, nothing parsed."""
    values, depth, deepest, inside, rest = 1, 0, 0, 0, b""
    for start in range(0, len(body), CHUNK_BYTES):
        chunk = rest + body[start : start + CHUNK_BYTES]
        whole = chunk.rstrip(b"\\")  # a backslash escapes what comes next, which may be in the next chunk
        rest = b"\\" if (len(chunk) - len(whole)) % 2 else b""
        if b"\\" in whole:
            whole = whole.replace(b"\\\\", b"").replace(b'\\"', b"")
        if not whole:
            continue
        characters = np.frombuffer(whole, np.uint8)
        quotes = np.cumsum(characters == QUOTE, dtype=np.uint8)  # modulo 256 keeps odd and even apart
        outside = characters[(quotes + inside) % 2 == 0]
        inside = int(quotes[-1] + inside) % 2
        opening, closing = np.isin(outside, OPENING), np.isin(outside, CLOSING)
        values += int(np.count_nonzero(outside == COMMA) + np.count_nonzero(opening))
        if opening.any() or closing.any():
            depths = depth + np.cumsum(opening.astype(np.int8) - closing.astype(np.int8), dtype=np.int64)
            depth, deepest = int(depths[-1]), max(deepest, int(depths.max()))
    return values, deepest


def json_value(body: bytes) -> JsonValue:
    """The value of a JSON text. Raises ApiError where it is none (400), or one of too many parts (413)."""
    values, nesting = shape_of(body)
    if values > MAX_VALUES:
        raise ApiError(413, f"the body holds more than {MAX_VALUES:,} values; send several requests", "body_too_large")
    if nesting > MAX_JSON_NESTING:
        raise ApiError(400, f"the body is nested deeper than {MAX_JSON_NESTING} levels", "invalid_json")
    try:
        value: JsonValue = json.loads(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 at byte {error.start}", "invalid_json") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}", "invalid_json") from None
    except ValueError:  # Python's own limit
        raise ApiError(400, "the body holds a number of thousands of digits", "invalid_json") from None
    if SURROGATE.search(body):
        check_characters(value, "")
    return value


def check_characters(value: JsonValue, place: str) -> None:
    """Raise ApiError where a text holds half a surrogate pair, which is no character and cannot be written anywhere."""
    match value:
        case str():
            if any("\ud800" <= character <= "\udfff" for character in value):
                reason = "the text holds half a surrogate pair, which is no character"
                raise ApiError.of(Failure(422, reason, "invalid_value").with_param(place or "body"))
        case list():
            for i, one in enumerate(value):
                check_characters(one, f"{place}[{i}]")
        case dict():
            for name, one in value.items():
                check_characters(name, place)
                # One bad input of many is dealt with where inputs are taken apart: `partial` may ask for the others.
                if place or name != "input":
                    check_characters(one, f"{place}.{name}" if place else name)


def parse_body(body: bytes, model: type[Request]) -> Request:
    """A request of the given kind. Raises ApiError naming the field that is wrong."""
    value = json_value(body) if body else {}
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ApiError.of(validation_failure(error.errors(include_url=False, include_input=False))) from None
