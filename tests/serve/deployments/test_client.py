"""What is done again where a replica dies, and what is not: a stream of which something is out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from ray.exceptions import RayActorError
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, DeploymentStatusTrigger, ReplicaState

from serve.deployments import client
from serve.deployments.client import CALL_ATTEMPTS, is_asleep, stream
from serve.deployments.generation import Finished, Started
from serve.protocol.errors import ApiError, Failure

DIES = RayActorError()
ANSWER = (Started(3), "a red", " circle", Finished(2, "stop"))


class Replicas:
    """Stands for a handle's method: each call is answered by the next replica, with what it says before it dies."""

    def __init__(self, *replicas: Sequence[Any]) -> None:
        self.replicas = iter(replicas)
        self.calls = 0

    def options(self, *, stream: bool) -> Replicas:
        assert stream
        return self

    def remote(self, *_: Any) -> Says:
        self.calls += 1
        return Says(next(self.replicas))


class Says:
    """A response that is a stream."""

    def __init__(self, events: Sequence[Any]) -> None:
        self.events = iter(events)
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        event = next(self.events, None)
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event

    def cancel(self) -> None:
        self.cancelled = True


def told(replicas: Any) -> tuple[list[Any], Failure | None]:
    """What the caller of `stream` hears, and the failure it ends with."""
    heard: list[Any] = []

    async def listen() -> Failure | None:
        events = stream(replicas, deadline_s=5)
        while True:
            try:
                heard.append(await anext(events))
            except StopAsyncIteration:
                return None
            except ApiError as error:
                return error.failure

    return heard, asyncio.run(listen())


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.0)


@pytest.mark.parametrize("before", [(DIES,), (Started(3), DIES)])
def test_a_stream_is_begun_again_where_nothing_of_it_is_out(before: Sequence[Any]) -> None:
    replicas = Replicas(before, before, ANSWER)
    assert told(replicas) == ([*ANSWER], None)
    assert replicas.calls == 3


def test_a_stream_of_which_something_is_out_breaks_off() -> None:
    replicas = Replicas((*ANSWER[:2], DIES), ANSWER)
    heard, failure = told(replicas)
    assert heard == [*ANSWER[:2]]
    assert failure is not None
    assert (failure.status, failure.code) == (503, "unavailable")
    assert replicas.calls == 1


def test_nobody_tries_for_ever() -> None:
    replicas = Replicas(*[(DIES,)] * (CALL_ATTEMPTS + 1))
    heard, failure = told(replicas)
    assert (heard, failure and failure.status, replicas.calls) == ([], 503, CALL_ATTEMPTS)


@pytest.mark.parametrize(
    ("status", "replica_states", "asleep"),
    [
        ("HEALTHY", {}, True),
        ("HEALTHY", {"RUNNING": 0}, True),
        ("DOWNSCALING", {"STOPPING": 1}, True),  # the last one is about to go: asking it would fail, or wake it
        ("DOWNSCALING", {"STOPPING": 1, "RUNNING": 1}, False),
        ("HEALTHY", {"RUNNING": 1}, False),
        ("UPSCALING", {"STARTING": 1}, True),  # woken by load: who asks now is answered when it is up
        ("UPSCALING", {"STARTING": 1, "RUNNING": 1}, False),
        ("UPDATING", {"STOPPING": 1}, False),
        ("DEPLOY_FAILED", {}, False),
    ],
)
def test_who_is_about_to_sleep_is_asleep(status: str, replica_states: dict[str, int], asleep: bool) -> None:
    states = {ReplicaState(state): count for state, count in replica_states.items()}
    overview = DeploymentStatusOverview(DeploymentStatus(status), DeploymentStatusTrigger.AUTOSCALING, states, "")
    assert is_asleep(overview) == asleep


def test_who_is_started_by_an_operator_is_not_asleep() -> None:
    states = {ReplicaState("STARTING"): 1}
    by_hand = DeploymentStatusTrigger.CONFIG_UPDATE_STARTED
    assert not is_asleep(DeploymentStatusOverview(DeploymentStatus.UPSCALING, by_hand, states, ""))
