"""JSON route: a POST whose body is one pydantic model, and whose reply is one JSON value.

FastAPI parses, validates and encodes in the event loop, and walks through every number of a reply in Python. Here a
large body is read in a thread, and a reply is encoded piece by piece by pydantic.
"""

import inspect
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic_core import to_json

from serve.protocol.bodies import large_body, off_loop, parse_body
from serve.protocol.errors import RESPONSES

LARGE_REPLY = 256  # entries; encoding more of them would keep others waiting


class JsonRoute(APIRoute):
    """A route whose function takes `body`, where it has such an argument, and nothing else."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """What turns a request into a response."""
        parameters = inspect.signature(self.endpoint, eval_str=True).parameters
        if "body" not in parameters:
            return super().get_route_handler()
        assert list(parameters) == ["body"], f"{self.path}: a function of a JSON route takes `body` alone"
        model: type[BaseModel] = parameters["body"].annotation

        async def handle(request: Request) -> Response:
            body = await off_loop(parse_body, await request.body(), model)
            answer = await self.endpoint(body)
            return answer if isinstance(answer, Response) else await json_response(answer)

        return handle


def json_router() -> APIRouter:
    """A router of such routes, with the errors that all of them may answer with."""
    return APIRouter(route_class=JsonRoute, responses=RESPONSES)


def expect_entries(count: int) -> None:
    """Say how many entries the reply will have: the work for many is done in a thread, as that of a large body is."""
    if count > LARGE_REPLY:
        large_body.set(True)


async def json_response(answer: dict[str, Any]) -> Response:
    """A reply, encoded."""
    return Response(await off_loop(encoded_reply, answer), media_type="application/json")


def encoded_reply(answer: dict[str, Any]) -> bytes:
    """The JSON of a reply, list entry by list entry, so that a thread that does this lets the others run meanwhile."""
    return b"".join(json_pieces(answer))  # once: every copy of a large reply keeps the others waiting


def json_pieces(answer: dict[str, Any]) -> Iterator[bytes]:
    """The JSON of an object, the entries of its lists one by one."""
    before = b"{"
    for name, value in answer.items():
        yield before + to_json(name) + b":"
        before = b","
        match value:
            case list():
                yield b"["
                for number, entry in enumerate(value):
                    yield (b"," if number else b"") + to_json(entry)
                yield b"]"
            case dict():
                yield from json_pieces(value)
            case _:
                yield to_json(value)
    yield b"}" if answer else b"{}"
