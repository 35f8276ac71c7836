"""Anybody is refused unasked only while every replica has said that it takes on nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from serve.deployments import full_replicas
from serve.deployments.full_replicas import LONGEST_S, FullReplicas
from serve.protocol.errors import Failure


def refusal(name: str, full_s: float | None) -> Failure:
    return Failure(429, "full", "overloaded", full_s=full_s, full_by=name)


def tell(replicas: FullReplicas, *refusals: Failure) -> list[float | None]:
    """What each of some refusals says of everybody; the first one only makes them be counted."""

    async def work() -> list[float | None]:
        replicas.told(refusal("a", 0.0001))
        while replicas.counting is not None:
            await asyncio.sleep(0.001)
        return [replicas.told(one).full_s for one in refusals]

    return asyncio.run(work())


def test_only_where_all_are_full_and_for_as_long_as_all_are() -> None:
    found = tell(FullReplicas(lambda: 2), refusal("b", 0.4), refusal("b", 0.4), refusal("a", 0.2))
    assert found[:2] == [None, None]
    assert found[2] == pytest.approx(0.2, abs=0.05)


def test_one_replica_is_all_there_are_and_not_for_long() -> None:
    [first, second] = tell(FullReplicas(lambda: 1), refusal("a", 0.2), refusal("a", 100.0))
    assert first == pytest.approx(0.2, abs=0.05)
    assert second == pytest.approx(LONGEST_S, abs=0.05)


def test_a_replica_that_has_room_again_is_not_counted() -> None:
    replicas = FullReplicas(lambda: 2)

    async def work() -> float | None:
        replicas.told(refusal("a", 0.01))
        await asyncio.sleep(0.05)
        return replicas.told(refusal("b", 0.3)).full_s

    assert asyncio.run(work()) is None


@pytest.mark.parametrize("full_s", [None, 0.3])
def test_a_refusal_of_one_request_says_nothing_of_others(full_s: float | None) -> None:
    """For its size, or where nobody can say how many replicas there are."""

    def unknown() -> int:
        raise RuntimeError("the controller is being replaced")

    running: Callable[[], int] = (lambda: 1) if full_s is None else unknown
    assert tell(FullReplicas(running), refusal("a", full_s)) == [None]


def test_replicas_are_counted_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another one has come: what the others say is not enough any more."""
    monkeypatch.setattr(full_replicas, "COUNTED_S", 0.0)
    count = 1
    replicas = FullReplicas(lambda: count)
    assert tell(replicas, refusal("a", 0.3)) != [None]
    count = 2
    assert tell(replicas, refusal("a", 0.3)) == [None]
