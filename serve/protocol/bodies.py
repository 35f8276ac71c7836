"""Bodies: how a request's JSON comes in. Limits come before work, each before the work that it bounds:

1. bytes, while they arrive: a cap, a time limit, and few unfinished bodies per client, so that slow ones hold no place;
2. values, nesting and escapes, before parsing: counted in the raw bytes;
3. lists, before their elements are looked at.

A large body is parsed in a thread. The scan works in chunks and gives the interpreter free between them; what is one
call in C, such as parsing, keeps every other thread waiting until it ends, so it is bounded.
"""

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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
SWITCH_S = 0.001  # after which a thread asks for the interpreter; by default others wait for 5 ms, again and again
MAX_ESCAPES = 8_000_000  # backslashes in one body: each costs the parser as much as many plain characters
LARGE_BYTES = 64 << 10  # a body of more is parsed beside the event loop
CHUNK_BYTES = 1 << 20
SLOW_AFTER_S = 1.0  # a body that has not arrived by then is slow
SLOW_PER_CLIENT = 32
SLOW_IN_ALL = 256
DISCARDED_S, DISCARDED_SILENT_S, DISCARDED_BODIES = 2.0, 0.3, 2  # of a body that is refused; times the largest size
BODIES_IN_MEMORY = 8  # of the largest size allowed, together
QUOTE, COMMA, OPENING, CLOSING = ord('"'), ord(","), (ord("["), ord("{")), (ord("]"), ord("}"))
TOO_LARGE = "body_too_large"
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


class SlowBodies:
    """Bodies that have not arrived after SLOW_AFTER_S, counted by client.

    Beyond SLOW_PER_CLIENT of them the next one is refused, so that one client's stalled uploads leave the places to the
    others.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def refusal(self, client: str) -> Failure | None:
        """Why one more of this client is too many, or None where it is not."""
        if self.counts[client] < SLOW_PER_CLIENT and self.counts.total() < SLOW_IN_ALL:
            return None
        return Failure(429, "too many bodies arrive slowly; send them one after the other", "overloaded")

    @contextmanager
    def one_more(self, client: str) -> Iterator[None]:
        """Count one while the block runs."""
        self.counts[client] += 1
        try:
            yield
        finally:
            self.counts[client] -= 1
            self.counts += Counter()  # drops those at 0


class BoundedBodies:
    """ASGI middleware: reads the body of a POST, and refuses what is too large (413), too slow (408), or one too many.

    Slow bodies are counted here as well as in front of Serve's proxy (proxy_errors.py): not everybody has that.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self.app = app
        self.limits = limits
        self.slow = SlowBodies()
        self.held = 0  # bytes of all bodies that are being read or answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body = bytearray()
        client = scope["client"][0] if scope.get("client") else ""
        headers = Headers(scope=scope)
        try:
            try:
                await self.read(headers, client, receive, body)
            except ApiError as refused:
                if refused.failure.code == TOO_LARGE and "100-continue" not in headers.get("expect", "").lower():
                    self.held -= len(body)
                    body.clear()
                    await self.discard(receive)
                raise
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
        counted = ExitStack()
        try:
            while more:
                end = min(start + self.limits.whole_s, last + self.limits.silent_s)
                wake = end if slow else min(end, start + SLOW_AFTER_S)
                await asyncio.wait({receiving}, timeout=max(wake - loop.time(), 0))
                if not receiving.done():
                    if wake == end:
                        raise ApiError(408, "the body did not arrive in time", "body_timeout")
                    if refusal := self.slow.refusal(client):
                        raise ApiError.of(refusal)
                    slow = True
                    counted.enter_context(self.slow.one_more(client))
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
            counted.close()

    async def discard(self, receive: Receive) -> None:
        """Take in the rest of a body that is refused, within bounds, before its client is told.

        A connection that ends while its client still sends is reset, and the answer may be lost with it.
        """
        loop = asyncio.get_running_loop()
        end, left, more = loop.time() + DISCARDED_S, DISCARDED_BODIES * self.limits.bytes, True
        while more and left >= 0 and loop.time() < end:
            try:
                message = await asyncio.wait_for(receive(), DISCARDED_SILENT_S)
            except Exception:  # nothing comes, or, as Serve says it, the client has gone
                return
            left -= len(message.get("body", b""))
            more = message["type"] == "http.request" and message.get("more_body", False)

    def keep(self, body: bytearray, part: bytes) -> None:
        """Add a part to the body. Raises ApiError where this is too much, for it or for all bodies together."""
        body += part
        self.held += len(part)
        if len(body) > self.limits.bytes:
            raise self.too_large()
        if self.held > BODIES_IN_MEMORY * self.limits.bytes:
            raise ApiError(429, "too many large bodies are on their way; try again later", "overloaded")

    def too_large(self) -> ApiError:
        """The refusal of a body beyond the cap."""
        return ApiError(413, f"the body is larger than {self.limits.bytes:,} bytes", TOO_LARGE)


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
        raise ApiError(413, f"the body holds more than {MAX_VALUES:,} values; send several requests", TOO_LARGE)
    if nesting > MAX_JSON_NESTING:
        raise ApiError(400, f"the body is nested deeper than {MAX_JSON_NESTING} levels", "invalid_json")
    if body.count(b"\\") > MAX_ESCAPES:
        raise ApiError(413, f"the body holds more than {MAX_ESCAPES:,} backslashes", TOO_LARGE)
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
            if not value.isascii() and has_surrogate(value):
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


def has_surrogate(text: str) -> bool:
    """Whether half a surrogate pair is in a text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def parse_body(body: bytes, model: type[Request]) -> Request:
    """A request of the given kind. Raises ApiError naming the field that is wrong."""
    value = json_value(body) if body else {}
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise ApiError.of(validation_failure(error.errors(include_url=False, include_input=False))) from None
