"""A replica that dies loses no request: what was not yet answered is done again by the next one."""

from __future__ import annotations

import json
import threading
import time

import httpx
import numpy as np
import ray

from serve.config import ServeArgs
from tests.support.wire import error_of


def replica_of(deployment: str) -> ray.actor.ActorHandle:
    """The actor that is the deployment's only replica."""
    names = [one for one in ray.util.list_named_actors(all_namespaces=True) if f"vladva#{deployment}#" in one["name"]]
    [one] = names
    return ray.get_actor(one["name"], one["namespace"])


def test_a_request_survives_the_replica_that_works_on_it(client: httpx.Client) -> None:
    body = {"input": [f"{'word ' * 100}{i}" for i in range(400)]}
    responses: list[httpx.Response] = []
    asking = threading.Thread(target=lambda: responses.append(client.post("/v1/embeddings", json=body)))
    asking.start()
    time.sleep(0.5)
    assert not responses, "answered before the replica could be killed: send more"
    ray.kill(replica_of("Colocated"))
    asking.join()
    [response] = responses
    assert response.status_code == 200, response.text
    vectors = np.array([entry["embedding"] for entry in response.json()["data"]])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert client.get("/ready").status_code == 200


def test_a_text_that_is_too_long_for_the_model_does_not_hurt_it(client: httpx.Client) -> None:
    error_of(client.post("/v1/embeddings", json={"input": "word " * 100_000}), 422, "context_length_exceeded")
    assert client.get("/ready").status_code == 200


def test_a_stream_is_answered_by_another_replica_as_long_as_nothing_of_it_is_out(server: str) -> None:
    """More conversations than a replica has places: those that wait have said nothing when it is killed."""
    places, streams = ServeArgs().max_conversations, 40
    body = {"messages": [{"role": "user", "content": "go on"}], "max_tokens": 300, "temperature": 2.0, "stream": True}
    lines: dict[int, list[str]] = {number: [] for number in range(streams)}

    def ask(number: int) -> None:
        url = f"{server}/v1/chat/completions"
        with httpx.stream("POST", url, json=body | {"seed": number}, timeout=120) as response:
            for line in response.iter_lines():
                if line:
                    lines[number].append(line)

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(streams)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while sum(map(bool, lines.values())) < places // 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    silent = [number for number in range(streams) if not lines[number]]
    ray.kill(replica_of("Colocated"))
    for thread in threads:
        thread.join()
    assert [number for number in silent if lines[number][-1] == "data: [DONE]"], "none was begun again"
    broken = [sent for sent in lines.values() if sent[-1] != "data: [DONE]"]
    assert broken, "no stream was under way when the replica was killed"
    for sent in broken:  # told in the stream, in the one shape: what is out cannot be taken back
        events = [json.loads(line.removeprefix("data: ")) for line in sent]
        assert events[-1]["error"]["code"] == "unavailable"
        assert any(event["choices"][0]["delta"].get("content") for event in events[:-1])
