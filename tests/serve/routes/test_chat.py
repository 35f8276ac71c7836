"""POST /v1/chat/completions against `generate` in this process, with the `openai` client and with plain HTTP."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.wire import ADAPTER, data_uri, error_of, noise_image
from vladva.data.scenes.corpus import held_out_scenes
from vladva.data.scenes.scene import render

if TYPE_CHECKING:
    from openai import OpenAI

    from vladva.models.embedder import Embedder

QUESTION = "Describe the image in detail."
IMAGE_PART = {"type": "image_url", "image_url": {"url": data_uri(noise_image(3))}}
MESSAGES = [{"role": "user", "content": [IMAGE_PART, {"type": "text", "text": QUESTION}]}]


def expected(embedder: Embedder, **options: Any) -> str:
    """What the model says in this process."""
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    return "".join(embedder.generate([{"role": "user", "content": content}], [noise_image(3)], **options))


def test_the_base_model_answers_unless_the_adapter_is_named(openai_client: OpenAI, embedder: Embedder) -> None:
    base = openai_client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=24)
    assert base.choices[0].message.content == expected(embedder, max_tokens=24)
    assert base.model == "tiny"
    adapted = openai_client.chat.completions.create(model=ADAPTER, messages=MESSAGES, max_tokens=24)
    assert adapted.choices[0].message.content == expected(embedder, max_tokens=24, adapter=True)
    assert adapted.choices[0].message.content != base.choices[0].message.content
    # and the adapter is off again
    again = openai_client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=24)
    assert again.choices[0].message.content == base.choices[0].message.content


def test_usage_and_finish_reason(openai_client: OpenAI, embedder: Embedder) -> None:
    # Of noise the generator may go on until it is cut.
    [(scene, _, _)] = held_out_scenes(1, 0)
    part = {"type": "image_url", "image_url": {"url": data_uri(render(scene))}}
    messages: Any = [{"role": "user", "content": [part, {"type": "text", "text": QUESTION}]}]
    whole = openai_client.chat.completions.create(model="tiny", messages=messages)
    assert whole.choices[0].finish_reason == "stop"
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = len(embedder.preprocessor.render([{"role": "user", "content": content}], [(64, 64)]))
    assert whole.usage.prompt_tokens == prompt
    assert whole.usage.total_tokens == prompt + whole.usage.completion_tokens
    cut = openai_client.chat.completions.create(model="tiny", messages=messages, max_tokens=2)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage.completion_tokens == 2
    assert whole.choices[0].message.content.startswith(cut.choices[0].message.content)


def test_streaming_gives_the_same_text_in_pieces(openai_client: OpenAI) -> None:
    whole = openai_client.chat.completions.create(model=ADAPTER, messages=MESSAGES, max_tokens=16)
    chunks = list(
        openai_client.chat.completions.create(
            model=ADAPTER, messages=MESSAGES, max_tokens=16, stream=True, stream_options={"include_usage": True}
        )
    )
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 3
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_server_sent_events_on_the_wire(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: ") for event in events[:-1])
    first = json.loads(events[0].removeprefix("data: "))
    assert first["object"] == "chat.completion.chunk"
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "usage" not in first  # only where it was asked for


def test_seed_makes_sampling_repeatable(openai_client: OpenAI) -> None:
    def say(seed: int) -> str:
        reply = openai_client.chat.completions.create(
            model=ADAPTER, messages=MESSAGES, max_tokens=24, temperature=1.5, top_p=0.95, seed=seed
        )
        return reply.choices[0].message.content

    assert say(1) == say(1)
    assert len({say(seed) for seed in range(1, 6)}) > 1


def test_stop_words_end_the_answer(openai_client: OpenAI, embedder: Embedder) -> None:
    text = expected(embedder, max_tokens=24, adapter=True)
    word = text.split()[2]
    reply = openai_client.chat.completions.create(model=ADAPTER, messages=MESSAGES, max_tokens=24, stop=[word])
    assert reply.choices[0].message.content == text[: text.index(word)]
    assert reply.choices[0].finish_reason == "stop"


def test_a_client_that_goes_away_frees_the_replica(client: httpx.Client) -> None:
    body = {"model": ADAPTER, "messages": MESSAGES, "max_tokens": 400, "temperature": 2.0, "stream": True}
    for _ in range(3):
        with client.stream("POST", "/v1/chat/completions", json=body) as response:
            next(response.iter_lines())  # and leave
    reply = client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 3})
    assert reply.status_code == 200


def test_clients_that_leave_leave_no_traceback(client: httpx.Client) -> None:
    import ray

    logs = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve"

    def tracebacks() -> int:
        return sum(file.read_text(errors="replace").count("Traceback") for file in logs.glob("*.log"))

    before = tracebacks()
    streamed = {"model": ADAPTER, "messages": MESSAGES, "max_tokens": 400, "temperature": 2.0, "stream": True}
    with client.stream("POST", "/v1/chat/completions", json=streamed) as response:
        next(response.iter_lines())
    whole = {"model": ADAPTER, "messages": MESSAGES, "max_tokens": 400, "temperature": 2.0}
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/chat/completions", json=whole, timeout=0.05)
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/embeddings", json={"input": [f"word {i} " * 50 for i in range(200)]}, timeout=0.05)
    host, port = client.base_url.host, client.base_url.port
    with socket.create_connection((host, port or 80)) as connection:  # in the middle of its body
        connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n")
        connection.sendall(b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.5)
    assert client.post("/v1/chat/completions", json={"messages": MESSAGES, "max_tokens": 3}).status_code == 200
    assert tracebacks() == before


def test_text_alone_and_several_turns(client: httpx.Client) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_image", "image_url": data_uri(noise_image(3))}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "user", "content": [{"type": "input_text", "text": "What is it?"}]},
        {"role": "assistant", "content": "an image"},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ]
    nothing = {"tool_choice": "auto", "tools": [], "response_format": {"type": "text"}, "frequency_penalty": 0}
    options = {"max_tokens": 3, "seed": None, "stop": "Observation:", **nothing}
    for messages in (turns, [{"role": "user", "content": "Hello"}]):
        reply = client.post("/v1/chat/completions", json={"messages": messages, **options})
        assert reply.status_code == 200, reply.text


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"n": 2}, "n", "invalid_value"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported"),
        ({"temperature": 3}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 5000}, "messages", "context_length_exceeded"),
        ({"stop": [""]}, "stop[0]", "invalid_value"),
        ({"stop": ["x" * 257]}, "stop[0]", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice", "unsupported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported"),
        ({"top_logprobs": 2}, "top_logprobs", "unsupported"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "user", "content": "word " * 100_000}]}, "messages", "context_length_exceeded"),
        ({"messages": [0] * 20_000}, "messages[0]", "invalid_value"),
        ({"messages": [{"role": "assistant", "content": [IMAGE_PART]}]}, "messages[0].content[0]", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "http://localhost/a.png"}]}]},
            "messages[0].content[0].image_url",
            "invalid_image",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(client: httpx.Client, change: dict[str, Any], param: str, code: str) -> None:
    for stream in (False, True):
        response = client.post("/v1/chat/completions", json={"messages": MESSAGES, "stream": stream, **change})
        assert error_of(response, 422, code)["param"] == param


def test_special_tokens_in_a_conversation_are_text(client: httpx.Client, embedder: Embedder) -> None:
    """They are answered as the model in this process answers them, and count as the text that they are."""
    for text in ("an <image>", "<|assistant|> a </s> ring", "<|vladva_text_0|> what?"):
        messages = [{"role": "user", "content": text}]
        reply = client.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 4}).json()
        assert reply["usage"]["prompt_tokens"] == len(embedder.preprocessor.render(messages))
        expected = "".join(embedder.generate(messages, max_tokens=4))
        assert reply["choices"][0]["message"]["content"] == expected


def test_half_a_surrogate_pair_is_refused(client: httpx.Client) -> None:
    body = rb'{"messages": [{"role": "user", "content": [{"type": "text", "text": "a \udc00"}]}]}'
    response = client.post("/v1/chat/completions", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response, 422, "invalid_value")["param"] == "messages[0].content[0].text"


def test_an_unknown_model_is_refused(client: httpx.Client) -> None:
    body = {"messages": MESSAGES, "model": "gpt"}
    message = error_of(client.post("/v1/chat/completions", json=body), 404, "model_not_found")["message"]
    assert "tiny" in message
    assert ADAPTER in message
