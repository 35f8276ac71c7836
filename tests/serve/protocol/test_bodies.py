"""Bodies are bounded before they cost anything: bytes, time, values, nesting; the scan agrees with a real parser."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic_core import to_json

from serve.protocol import bodies
from serve.protocol.bodies import BodyLimits, BoundedBodies, json_value, parse_body, shape_of
from serve.protocol.errors import ApiError, Failure
from serve.protocol.items import Limits, parse_items
from serve.protocol.json_route import encoded_reply
from serve.protocol.schema import ChatRequest, ClassifyRequest, ScoreRequest
from serve.routes.scores import labels_in

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('ab"\\[]{},: \n'), max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(st.sampled_from('a"\\,'), max_size=3), inner),
    max_leaves=20,
)


def counted(value: Any) -> tuple[int, int]:
    """(commas and opening brackets + 1, nesting) of a value, from the value itself."""
    if not isinstance(value, dict | list):
        return 1, 0
    inner = [counted(one) for one in (value.values() if isinstance(value, dict) else value)]
    below = sum(count - 1 for count, _ in inner)
    return 2 + below + max(len(inner) - 1, 0), 1 + max((depth for _, depth in inner), default=0)


@given(VALUES, st.integers(1, 7))
def test_the_scan_counts_what_the_parser_finds(value: Any, chunk: int) -> None:
    text = json.dumps(value).encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bodies, "CHUNK_BYTES", chunk)  # chunks end in strings, and between a backslash and its quote
        assert shape_of(text) == counted(value)


def test_what_has_too_many_parts_is_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("parsed"))
    for body, status in (
        (b"[" + b"0," * 250_000 + b"0]", 413),
        (b"[{}" + b",[]" * 130_000 + b"]", 413),
        (b"[" * 33, 400),
    ):
        with pytest.raises(ApiError) as refused:
            json_value(body)
        assert refused.value.failure.status == status


def test_a_body_of_escapes_is_refused_unparsed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "loads", lambda text: pytest.fail("parsed"))
    with pytest.raises(ApiError) as refused:
        json_value(b'{"input": "' + b"\\n" * (bodies.MAX_ESCAPES + 1) + b'"}')
    assert refused.value.failure.status == 413


def test_half_a_surrogate_pair_is_found_in_a_long_text() -> None:
    text = "a" * 5_000_000
    assert json_value(json.dumps({"text": text + "\U0001f600"}).encode()) == {"text": text + "\U0001f600"}
    with pytest.raises(ApiError) as refused:
        json_value(json.dumps({"a": [text, text + "\ud800"]}).encode())
    assert refused.value.failure.param == "a[1]"


@pytest.mark.parametrize(
    ("body", "model"),
    [
        ({"queries": "a", "documents": "b"}, ScoreRequest),
        ({"messages": [{"role": "user", "content": "a"}]}, ChatRequest),
    ],
)
def test_an_object_of_very_many_fields_is_one_error(body: dict[str, Any], model: type[BaseModel]) -> None:
    with pytest.raises(ApiError) as refused:
        parse_body(json.dumps(body | {f"x{i}": i for i in range(100_000)}).encode(), model)
    assert "an object of 100,00" in refused.value.failure.message


def test_very_long_conversations_are_refused() -> None:
    turn, part = {"role": "user", "content": "a"}, {"type": "text", "text": "a"}
    for messages in ([turn] * 3000, [{"role": "user", "content": [part] * 3000}]):
        with pytest.raises(ApiError) as refused:
            parse_body(json.dumps({"messages": messages}).encode(), ChatRequest)
        assert "at most 2048 items" in refused.value.failure.message
        [item] = parse_items([messages], "input", Limits(10, 1, 1))
        assert isinstance(item, Failure)
        assert item.param == "input[0]"


def test_the_texts_of_a_request_are_bounded_together() -> None:
    limits = Limits(10, 1, 1, text_characters=100, all_characters=250)
    assert len(parse_items(["a" * 100] * 2, "input", limits)) == 2
    with pytest.raises(ApiError) as refused:
        parse_items(["a" * 100] * 3, "input", limits)
    assert refused.value.failure.status == 413


def test_a_template_is_not_written_out_where_that_is_too_much() -> None:
    limits = Limits(10, 1, 1, text_characters=1000, all_characters=2500)

    def labels(template: str, *labels: str) -> Any:
        return labels_in(ClassifyRequest(input="a", labels=[*labels], template=template), limits)

    assert labels("a {} or {}", "b", "cd") == [{"text": "a b or b"}, {"text": "a cd or cd"}]
    for template, many, status in (("{}" * 2000, ["b" * 10_000] * 2, 422), ("{}" * 900, ["b"] * 3, 413)):
        with pytest.raises(ApiError) as refused:
            labels(template, *many)
        assert refused.value.failure.status == status
    with pytest.raises(ApiError) as refused:
        labels("{}", *["b"] * 11)
    assert refused.value.failure.status == 422


def longest_wait(work: Callable[[], object]) -> float:
    """Seconds of this process's CPU for which some work kept another thread from the interpreter, at most.

    Not of the clock: other processes may have the cores.
    """
    longest, done = 0.0, threading.Event()

    def watch() -> None:
        nonlocal longest
        last = time.process_time()
        while not done.is_set():
            time.sleep(0.001)
            now = time.process_time()
            last, longest = now, max(longest, now - last)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        work()
    finally:
        done.set()
        watcher.join()
    return longest


@pytest.mark.parametrize("of", ["list", "object"])
def test_a_large_reply_is_written_in_pieces_between_which_others_run(of: str) -> None:
    """In one piece it keeps them waiting for as long as all of it takes."""
    rows = [[i / 7.0] * 2048 for i in range(2000)]
    answer: dict[str, Any] = {"data": rows} if of == "list" else {"embeddings": {"float": rows}}
    began = time.process_time()
    whole = to_json(answer)
    in_one_piece = time.process_time() - began
    written: list[bytes] = []
    assert longest_wait(lambda: written.append(encoded_reply(answer))) < in_one_piece / 2
    assert written == [whole]


@pytest.mark.parametrize("answer", [{}, {"a": []}, {"a": {}, "b": {"c": [1, "x"], "d": {}}}, {"a": 1, "b": None}])
def test_a_reply_in_pieces_is_the_reply(answer: dict[str, Any]) -> None:
    assert encoded_reply(answer) == to_json(answer)


def test_commas_in_a_text_are_no_values() -> None:
    assert json_value(json.dumps({"input": "," * 300_000}).encode()) == {"input": "," * 300_000}


def sent_slowly(limits: BodyLimits, clients: list[str], messages: Callable[[], list[Any]]) -> list[Any]:
    """What becomes of one body per client, all at the same time: its length, or the code of its refusal.

    messages: the seconds after which each part comes, and the part; None: none comes any more.
    """
    lengths: dict[int, int] = {}

    async def application(scope: Any, receive: Any, send: Any) -> None:
        lengths[scope["number"]] = len((await receive())["body"])

    bounded = BoundedBodies(application, limits)

    async def one(number: int, client: str) -> Any:
        parts = iter(messages())

        async def receive() -> Any:
            part = next(parts, None)
            if part is None:
                await asyncio.sleep(3600)
            after, body, more = part
            await asyncio.sleep(after)
            return {"type": "http.request", "body": body, "more_body": more}

        scope = {"type": "http", "method": "POST", "headers": [], "client": (client, 1), "number": number}
        try:
            await bounded(scope, receive, None)
        except ApiError as error:
            return error.failure.code
        return lengths[number]

    async def all_of_them() -> list[Any]:
        return await asyncio.gather(*[one(number, client) for number, client in enumerate(clients)])

    results = asyncio.run(all_of_them())
    assert (bounded.held, bounded.slow.counts.total()) == (0, 0)
    return results


def test_a_body_has_a_time_limit_as_a_whole_and_between_its_parts() -> None:
    limits = BodyLimits(1000, whole_s=0.4, silent_s=0.2)
    for parts, result in (
        ([(0.1, b"ab", True), (0.1, b"c", False)], 3),
        ([(0, b"a", True)], "body_timeout"),
        ([(0.1, b"a", True)] * 100, "body_timeout"),
    ):
        assert sent_slowly(limits, ["a"], lambda parts=parts: parts) == [result]


def test_one_clients_stalled_bodies_leave_places_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "SLOW_AFTER_S", 0.05)
    monkeypatch.setattr(bodies, "SLOW_PER_CLIENT", 3)
    monkeypatch.setattr(bodies, "SLOW_IN_ALL", 5)
    limits = BodyLimits(1000, whole_s=0.5, silent_s=0.5)
    results = sent_slowly(limits, ["a"] * 10 + ["b"] * 4, lambda: [(0, b"{", True)])
    assert results.count("body_timeout") == 5  # three of a, two of b
    assert results[:10].count("overloaded") == 7
    assert sent_slowly(limits, ["a"] * 10, lambda: [(0.01, b"{", True), (0.01, b"}", False)]) == [2] * 10


def test_all_bodies_together_are_bounded() -> None:
    limits = BodyLimits(100, whole_s=5, silent_s=5)
    results = sent_slowly(limits, ["a"] * 12, lambda: [(0, b"x" * 90, True), (0.2, b"x" * 5, False)])
    assert results.count(95) == 8
    assert results.count("overloaded") == 4
    assert sent_slowly(limits, ["a"], lambda: [(0, b"x" * 101, True)]) == ["body_too_large"]


@pytest.mark.parametrize(
    ("headers", "part", "parts", "taken"),
    [
        ([], 20, 10, 10),  # all that comes, or the client might not see the answer
        ([(b"content-length", b"200")], 20, 10, 10),
        ([(b"content-length", b"200"), (b"expect", b"100-continue")], 20, 10, 0),  # it waits for the word to send
        ([(b"content-length", b"5000")], 50, 100, 5),  # but no more than two of the largest
        ([(b"content-length", b"500")], 50, 0, 0),  # nor where nothing comes
    ],
)
def test_a_refused_body_is_taken_in_within_bounds(
    headers: list[tuple[bytes, bytes]], part: int, parts: int, taken: int
) -> None:
    received = 0

    async def receive() -> Any:
        nonlocal received
        if received == parts:
            await asyncio.sleep(3600)
        received += 1
        return {"type": "http.request", "body": b"x" * part, "more_body": received < parts}

    bounded = BoundedBodies(None, BodyLimits(100))  # type: ignore[arg-type]  # nothing gets so far
    scope = {"type": "http", "method": "POST", "headers": headers}
    with pytest.raises(ApiError) as refused:
        asyncio.run(bounded(scope, receive, None))  # type: ignore[arg-type]
    assert refused.value.failure.code == "body_too_large"
    assert (received, bounded.held) == (taken, 0)
