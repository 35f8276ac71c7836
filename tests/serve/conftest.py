"""One Serve for all tests of this folder: one application with an adapter, one with a key and tight limits."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING

import httpx
import pytest

from tests.support.wire import ADAPTER, CAPTIONS, KEY, OTHER_KEY, STRICT, noise_image, shaken_adapter, write_index

if TYPE_CHECKING:
    from openai import OpenAI

    from vladva.models.embedder import Embedder

SMALL = {
    "num_cpus": 0,
    "max_replicas": 1,
    "ingress_replicas": 1,
    "ingress_cpus": 0,
}  # leave the logical CPUs of the shared cluster to the other tests


@pytest.fixture(scope="session")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an adapter on the tiny model, shaken so that it changes both embeddings and captions."""
    return shaken_adapter(tmp_path_factory.mktemp("runs") / ADAPTER)


@pytest.fixture(scope="session")
def embedder(adapter: str) -> Embedder:
    """The same model as the server's, in this process."""
    from vladva.models.embedder import load_embedder

    return load_embedder(adapter)


@pytest.fixture(scope="session")
def index(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> str:
    """Folder of an index made with the server's model."""
    images = [noise_image(i) for i in range(len(CAPTIONS))]
    return write_index(tmp_path_factory.mktemp("index"), embedder.description(), embedder.embed_images(images))


@pytest.fixture(scope="session")
def foreign_index(tmp_path_factory: pytest.TempPathFactory, embedder: Embedder) -> str:
    """Folder of an index made with another model."""
    model = embedder.description() | {"fingerprint": "0123456789abcdef"}
    images = [noise_image(i) for i in range(len(CAPTIONS))]
    return write_index(tmp_path_factory.mktemp("foreign"), model, embedder.embed_images(images))


@pytest.fixture(scope="session")
def server(ray_cluster: None, adapter: str, index: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a running server; under /strict a second application."""
    from ray import serve

    from serve.app import API_KEYS, ServeArgs, application, start, stop

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    batches = str(tmp_path_factory.mktemp("batches"))
    url = start(ServeArgs(model=adapter, index=index, batches=batches, **SMALL), port=port)
    os.environ[API_KEYS] = f"{KEY}, {OTHER_KEY}"
    limits = {"max_queued_tokens": 400_000, "max_body_bytes": 2_000_000, "deadline_s": 3.0}
    # The two layouts: everything is tested with one copy of the weights, what is small here with two.
    strict = ServeArgs(layout="separate", cors_origins=("https://page.example",), **limits, **SMALL)
    serve.run(application(strict), name=STRICT, route_prefix=f"/{STRICT}", logging_config={"log_level": "WARNING"})
    del os.environ[API_KEYS]
    yield url
    stop()


@pytest.fixture(scope="session")
def client(server: str) -> Iterator[httpx.Client]:
    """HTTP client of the server."""
    with httpx.Client(base_url=server, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def strict(server: str) -> Iterator[httpx.Client]:
    """HTTP client of the application with a key and tight limits; sends the key."""
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=f"{server}/{STRICT}", headers=headers, timeout=120) as client:
        yield client


@pytest.fixture(scope="session")
def openai_client(server: str) -> OpenAI:
    """The `openai` client, as its users set it up."""
    from openai import OpenAI

    return OpenAI(base_url=f"{server}/v1", api_key="unused", max_retries=0)
