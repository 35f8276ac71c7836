"""Bodies are bounded before they cost anything: bytes, time, values, nesting; the scan agrees with a real parser."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.protocol import bodies
from serve.protocol.bodies import BodyLimits, BoundedBodies, json_value, shape_of
from serve.protocol.errors import ApiError

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
    assert (bounded.held, bounded.slow.total()) == (0, 0)
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
