"""Chat: POST /v1/chat/completions, whole or as server-sent events."""

import json
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serve.deployments.client import Backend
from serve.deployments.generation import Conversation, Finished, Sampling, Started, WholeAnswer
from serve.protocol.bodies import off_loop
from serve.protocol.errors import INTERNAL, ApiError, Failure, logger
from serve.protocol.items import EmbedItem, Limits, parse_image, too_long
from serve.protocol.json_route import json_router
from serve.protocol.schema import PART_FIELDS, ChatRequest, Message


def routes(backend: Backend) -> APIRouter:
    """The route that answers conversations."""
    router = json_router()

    @router.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Response:
        for name in body.unsupported():
            raise ApiError(422, f"{name}: this server does not support it", "unsupported", name)
        model, adapter = (await backend.served()).check_generation(body.model)
        conversation = await off_loop(parse_conversation, body.messages, await backend.limits())
        max_tokens = body.max_completion_tokens or body.max_tokens
        sampling = Sampling(max_tokens, body.temperature, body.top_p, body.seed, body.stop, adapter)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        if not body.stream:
            return JSONResponse(completion(head, await backend.whole_answer(conversation, sampling)))
        answer = backend.answer(conversation, sampling)
        # The first event says whether the request is accepted, so a refusal still gets its own status.
        started = await anext(answer)
        if isinstance(started, Failure):
            raise ApiError.of(started)
        events = server_sent_events(head, started, answer, body.stream_options.include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})

    return router


def completion(head: dict[str, Any], answer: WholeAnswer) -> dict[str, Any]:
    """The whole answer as one object."""
    message = {"role": "assistant", "content": answer.text}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answer.finished.reason}
    made = usage(answer.started, answer.finished)
    return {**head, "object": "chat.completion", "choices": [choice], "usage": made}


async def server_sent_events(
    head: dict[str, Any], started: Started, answer: AsyncGenerator[Any, None], include_usage: bool
) -> AsyncIterator[str]:
    """The answer in OpenAI's chunks. A later error is a chunk of its own, and `[DONE]` does not follow it."""
    head = {**head, "object": "chat.completion.chunk"}

    def chunk(delta: dict[str, str], reason: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
        return event_of({**head, "choices": [choice], **({"usage": None} if include_usage else {})})

    try:
        async with aclosing(answer):
            yield chunk({"role": "assistant", "content": ""})
            async for event in answer:
                yield chunk({}, event.reason) if isinstance(event, Finished) else chunk({"content": event})
        if include_usage:
            yield event_of({**head, "choices": [], "usage": usage(started, event)})
        yield "data: [DONE]\n\n"
    except ApiError as error:
        yield event_of({"error": error.failure.body()})
    except Exception:
        logger.exception("an answer broke off")
        yield event_of({"error": INTERNAL.body()})


def event_of(data: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(data)}\n\n"


def usage(started: Started, finished: Finished) -> dict[str, int]:
    """Tokens of prompt and answer."""
    total = started.prompt_tokens + finished.completion_tokens
    return {
        "prompt_tokens": started.prompt_tokens,
        "completion_tokens": finished.completion_tokens,
        "total_tokens": total,
    }


def parse_conversation(messages: list[Message], limits: Limits) -> Conversation:
    """The conversation in Hugging Face's form. Raises ApiError for a bad image, naming its part."""
    texts = [part.words for message in messages for part in message.parts() if part.is_text]
    if (length := sum(map(len, texts))) > limits.text_characters:
        raise ApiError.of(too_long(length, limits).with_param("messages"))
    turns: list[dict[str, Any]] = []
    images: list[EmbedItem] = []
    for i, message in enumerate(messages):
        content = []
        for j, part in enumerate(message.parts()):
            if part.is_text:
                content.append({"type": "text", "text": part.words})
                continue
            if message.role != "user":  # chat templates leave it out
                place = f"messages[{i}].content[{j}]"
                raise ApiError(422, f"{place}: only the user's turns may have images", "invalid_value", place)
            image = parse_image(part.image_data, f"messages[{i}].content[{j}].{PART_FIELDS[part.type]}", limits)
            if isinstance(image, Failure):
                raise ApiError.of(image)
            content.append({"type": "image"})
            images.append(image)
        turns.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    if sum(image.pixels for image in images) > limits.image_pixels:
        text = f"messages: the images have more than {limits.image_pixels:,} pixels together"
        raise ApiError(422, text, "invalid_image", "messages")
    return Conversation(turns, [one.image for one in images if one.image], [one.size for one in images])
