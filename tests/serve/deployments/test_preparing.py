"""Beside the model: a small piece of work waits for no large ones, nor for a request of many parts; pixels cost."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable

import pytest

from serve.config import ServeArgs
from serve.deployments.embedding import PIXELS_PER_TOKEN, Discriminative
from serve.deployments.preparing import PreparingThreads
from serve.protocol.errors import Failure
from serve.protocol.items import EmbedItem
from tests.support.wire import claiming


def test_large_work_leaves_a_thread_to_the_small() -> None:
    end = threading.Event()

    async def run() -> str:
        preparing = PreparingThreads(2)
        large = [asyncio.ensure_future(preparing.run(end.wait, 60, large=True)) for _ in range(5)]
        await asyncio.sleep(0.05)
        small = await asyncio.wait_for(preparing.run(lambda: "done"), 20)
        end.set()
        assert await asyncio.gather(*large) == [True] * 5
        return small

    assert asyncio.run(run()) == "done"


def test_requests_take_turns_part_by_part() -> None:
    done: list[str] = []

    async def run() -> None:
        preparing = PreparingThreads(1)

        def request(name: str, parts: int) -> Awaitable[list[None]]:
            turns = preparing.turns()

            async def part() -> None:
                async with turns:
                    await preparing.run(done.append, name)

            return asyncio.gather(*[part() for _ in range(parts)])

        await asyncio.gather(request("large", 50), request("small", 3))

    asyncio.run(run())
    assert done.count("large") == 50
    assert done[10:].count("small") == 0


def test_images_of_many_pixels_are_refused_by_what_they_cost_and_not_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    side, replica = 7000, Discriminative(ServeArgs())
    item = EmbedItem(image=claiming(side, side), size=(side, side))
    monkeypatch.setattr(replica, "decoded", lambda work: pytest.fail("decoded"))
    [(tokens, cost)] = asyncio.run(replica.costs([item]))  # type: ignore[misc]
    assert cost == side * side // PIXELS_PER_TOKEN > 50 * tokens
    refused = asyncio.run(replica.embed([item] * 13))
    assert isinstance(refused, Failure)
    assert (refused.status, refused.code) == (413, "request_too_large")
