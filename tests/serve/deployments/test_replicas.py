"""A replica that dies loses no request: what was not yet answered is done again by the next one."""

from __future__ import annotations

import threading
import time

import httpx
import numpy as np
import ray

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
