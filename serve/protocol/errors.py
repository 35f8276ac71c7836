"""Errors: one shape, `{"error": {message, type, param, code}}`, for every status that is not a success.

A refusal is a value, `Failure`. Between deployments it is returned, never raised, because Serve writes a traceback into
its log for everything raised in a replica; inside the ingress `ApiError` carries it to the handlers below.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger("ray.serve")

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: {"Retry-After": "1"}, 503: {"Retry-After": "1"}}
FULL_HEADER = "x-vladva-full-s"  # to the proxy: refuse what comes to this path by yourself, for so many seconds
SHOWN_CHARACTERS = 500  # of a message: a client's own field names and model names may be of any length


class ErrorBody(BaseModel):
    """What went wrong: text for people, its kind, the field it is about, and a code for programs."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """The body of every reply that is not a success."""

    error: ErrorBody


# What OpenAPI says of every route.
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorReply, "description": HTTPStatus(status).phrase}
    for status in (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
}


@dataclass(frozen=True)
class Failure:
    """Why a request, or one item of it, is not answered: HTTP status, text for people, code for programs, field.

    `retry_after`: seconds after which it may be sent again, where more is known than that it may be soon. `full_s`: for
    how long anybody would be refused, whatever he asked for, by the engine `full_by`.
    """

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: int | None = None
    full_s: float | None = None
    full_by: str = ""

    def body(self) -> dict[str, Any]:
        """The value of `error` in the reply."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        param = None if self.param is None else printable(self.param)
        return {"message": printable(self.message), "type": kind, "param": param, "code": self.code}

    def with_param(self, param: str) -> "Failure":
        """The same refusal, naming the field it is about."""
        return replace(self, param=param, message=f"{param}: {self.message}")


class ApiError(Exception):
    """A refusal on its way to the client."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message, code, param)
        self.failure = Failure(status, message, code, param)

    @classmethod
    def of(cls, failure: Failure) -> "ApiError":
        """The exception for a refusal that came as a value."""
        error = cls(failure.status, failure.message, failure.code, failure.param)
        error.failure = failure
        return error


def printable(text: str) -> str:
    """Text that any JSON encoder takes, cut where nobody reads on: half a surrogate pair is no character."""
    shown = text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 3]}..."
    return shown.encode("utf-8", "replace").decode()


INTERNAL = Failure(500, "internal error; the log has the details under this x-request-id", "internal_error")

# What a replica says that was started with other arguments than the ingress that asks: an update is under way.
REPLICA_OUTDATED = Failure(503, "the application is being updated; try again later", "unavailable")


def reply(failure: Failure, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The HTTP reply for a refusal."""
    when = {} if failure.retry_after is None else {"Retry-After": str(failure.retry_after)}
    full = {} if failure.full_s is None else {FULL_HEADER: f"{failure.full_s:.3f}"}
    every = {**HEADERS.get(failure.status, {}), **when, **full, **(headers or {})}
    return JSONResponse({"error": failure.body()}, failure.status, headers=every)


def handle_errors(app: FastAPI) -> None:
    """Give every error that FastAPI knows of the one shape."""

    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return reply(error.failure)

    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = code_of(error.status_code)
        allowed = Headers(error.headers or {}).get("allow")
        message = f"this path takes {allowed}, not {request.method}" if allowed else str(error.detail)
        return reply(Failure(error.status_code, message, code), error.headers)

    async def on_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        errors = [{**one, "loc": one["loc"][1:]} for one in error.errors()]  # without "query", "path"
        return reply(validation_failure(errors))

    app.exception_handler(ApiError)(on_api_error)
    app.exception_handler(HTTPException)(on_http_error)
    app.exception_handler(RequestValidationError)(on_validation_error)


def code_of(status: int) -> str:
    """A status as a code: 404 is `not_found`."""
    return HTTPStatus(status).phrase.lower().replace(" ", "_").replace("-", "_")


def validation_failure(errors: Sequence[Mapping[str, Any]]) -> Failure:
    """Name the field that is wrong and what would be accepted; never echo what was sent.

    Of the alternatives of a union, pydantic reports every one; the deepest is the one the caller meant, or one of whose
    kind the value is.
    """
    error = max(errors, key=lambda error: (len(error["loc"]), not error["type"].endswith("_type")))
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"] if not _is_union_tag(part)]
    field = "".join(parts).removeprefix(".") or "body"
    message = error["msg"].removeprefix("Value error, ")
    return Failure(422, f"{field}: {message}", "invalid_value", field)


def _is_union_tag(part: int | str) -> bool:
    """pydantic puts the alternative it tried (`str`, `list[str]`, `TextPart`) into the location."""
    return isinstance(part, str) and (part[:1].isupper() or part.partition("[")[0] in {"str", "list", "float"})


class LastResort:
    """ASGI middleware: an exception that nothing else handled is logged and answered, once, in the one shape."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except ApiError as error:
            await reply(error.failure)(scope, receive, send)
        except ClientDisconnect:  # nobody is there to be answered, and it is no fault of ours
            logger.debug("a client left while it sent %s", scope["path"])
        except Exception:
            logger.exception("unhandled error on %s", scope["path"])
            if not started:
                await reply(INTERNAL)(scope, receive, send)
