"""Errors: one shape, `{"error": {message, type, param, code}}`, for every status that is not a success.

A refusal is a value, `Failure`. Between deployments it is returned, never raised, because Serve writes a traceback into
its log for everything raised in a replica; inside the ingress `ApiError` carries it to the handlers below.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
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


@dataclass(frozen=True)
class Failure:
    """Why a request, or one item of it, is not answered: HTTP status, text for people, code for programs, field."""

    status: int
    message: str
    code: str
    param: str | None = None

    def body(self) -> dict[str, Any]:
        """The value of `error` in the reply."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": self.message, "type": kind, "param": self.param, "code": self.code}

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
        return cls(failure.status, failure.message, failure.code, failure.param)


INTERNAL = Failure(500, "internal error; the log has the details under this x-request-id", "internal_error")


def reply(failure: Failure, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The HTTP reply for a refusal."""
    return JSONResponse(
        {"error": failure.body()}, failure.status, headers={**HEADERS.get(failure.status, {}), **(headers or {})}
    )


def handle_errors(app: FastAPI) -> None:
    """Give every error that FastAPI knows of the one shape."""

    async def on_api_error(_: Request, error: ApiError) -> JSONResponse:
        return reply(error.failure)

    async def on_http_error(request: Request, error: HTTPException) -> JSONResponse:
        code = HTTPStatus(error.status_code).phrase.lower().replace(" ", "_")
        message = f"{request.method} {request.url.path}: {error.detail}"
        return reply(Failure(error.status_code, message, code), error.headers)

    async def on_validation_error(_: Request, error: RequestValidationError) -> JSONResponse:
        return reply(validation_failure(error.errors()))

    async def on_exception(_: Request, error: Exception) -> JSONResponse:
        return reply(INTERNAL)

    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_validation_error)
    app.add_exception_handler(Exception, on_exception)


def validation_failure(errors: list[dict[str, Any]]) -> Failure:
    """Name the field that is wrong and what would be accepted; never echo what was sent.

    Of the alternatives of a union, pydantic reports every one; the deepest is the one the caller meant.
    """
    error = max(errors, key=lambda error: len(error["loc"]))
    if error["type"] == "json_invalid":
        return Failure(400, f"the body is not JSON: {error['ctx']['error']}", "invalid_json")
    parts = [
        f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"][1:] if not _is_union_tag(part)
    ]
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
        except Exception:
            logger.exception("unhandled error on %s", scope["path"])
            if not started:
                await reply(INTERNAL)(scope, receive, send)
