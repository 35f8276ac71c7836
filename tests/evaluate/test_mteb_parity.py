"""One task, five ways to score it: mteb in this process, mteb over HTTP, and jobs/evaluate.py give the same numbers.

The task is made here, of scenes and captions: every caption retrieves its image, every image its caption. mteb runs its
own retrieval code on it; over HTTP it is mteb's own client, unmodified, against our server.
"""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from mteb.models import OpenAIAPIEncodeWrapper, OpenAIAPIRerankWrapper

from tests.support.small_mteb_task import scores_of, small_pairs
from tests.support.wire import ADAPTER, shaken_adapter
from vladva.evaluate.mteb_adapter import MtebEncoder, model_meta

EXACT = 1e-5  # mteb rounds its scores to five places
ROOT = Path(__file__).parents[2]
TORCHVISION = ROOT / ".venv/torchvision"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    return shaken_adapter(tmp_path_factory.mktemp("runs") / ADAPTER)


@pytest.fixture(scope="module")
def in_process(adapter: str) -> dict[str, float]:
    """By mteb, of our encoder."""
    return scores_of(MtebEncoder(adapter))


@pytest.fixture(scope="module")
def server(ray_cluster: None, adapter: str) -> Iterator[str]:
    from serve.app import ServeArgs, start, stop

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    yield start(ServeArgs(model=adapter, num_cpus=0, max_replicas=1, ingress_replicas=1), port=port)
    stop()


def test_the_scores_say_something(in_process: dict[str, float]) -> None:
    """Neither all nor nothing is found, or equal scores would prove nothing."""
    assert all(0 < score < 1 for score in in_process.values()), in_process
    assert len(set(in_process.values())) >= 6, in_process


@pytest.mark.slow
def test_mteb_loads_a_model_by_its_metadata(adapter: str, in_process: dict[str, float]) -> None:
    """In a process of its own: mteb loads no model for images without torchvision, which nothing of ours needs."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(ROOT), str(TORCHVISION)]),
    }
    command = [sys.executable, str(ROOT / "tests/support/small_mteb_task.py"), adapter]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == pytest.approx(in_process, abs=EXACT)


def test_the_job_gives_the_scores_that_mteb_gives(
    ray_cluster: None, adapter: str, in_process: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs import evaluate
    from vladva.core import storage

    with (tmp_path / "captions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "caption"])
        for i, (caption, image) in enumerate(small_pairs()):
            image.save(tmp_path / f"{i}.png")
            writer.writerow([f"{i}.png", caption])
    arguments = [adapter, "--benchmarks", "retrieval", "--data", str(tmp_path / "captions.csv"), "--actors", "1"]
    monkeypatch.setattr(sys, "argv", ["jobs/evaluate.py", *arguments, "--out", str(tmp_path / "out")])
    evaluate.main()
    ours = storage.read_json(str(tmp_path / "out/scores.json"))["models"][ADAPTER]["scores"]["retrieval"]
    both = {name: score for name, score in in_process.items() if "ndcg" not in name}
    assert {name: ours[name] for name in both} == pytest.approx(both, abs=EXACT)


@pytest.mark.parametrize("as_messages", [True, False])
def test_mteb_over_http_gives_the_scores_of_mteb_in_process(
    server: str, in_process: dict[str, float], as_messages: bool
) -> None:
    client = OpenAIAPIEncodeWrapper(server, ADAPTER, modalities=["text", "image"], use_chat_template=as_messages)
    assert scores_of(client) == pytest.approx(in_process, abs=EXACT)


def test_reranking_all_over_http_gives_the_order_of_the_embeddings(server: str, in_process: dict[str, float]) -> None:
    """Our /v1/rerank scores by the cosine: with every document a candidate it is the same retrieval."""
    client = OpenAIAPIRerankWrapper(server, ADAPTER, modalities=["text", "image"])
    client.mteb_model_meta = client.mteb_model_meta.model_copy(update={"model_type": ["cross-encoder"]})
    assert scores_of(client, candidates=True) == pytest.approx(in_process, abs=EXACT)


def test_another_model_scores_otherwise(in_process: dict[str, float]) -> None:
    """The negative control."""
    assert scores_of(MtebEncoder("tiny")) != pytest.approx(in_process, abs=0.01)


def test_what_mteb_is_told_of_a_model(adapter: str) -> None:
    meta = model_meta(adapter, license="apache-2.0", training_datasets=set())
    encoder = MtebEncoder(adapter)
    weights = sum(parameter.numel() for parameter in encoder.embedder.model.lvlm.parameters())
    assert meta.name == f"vladva/{ADAPTER}"
    assert meta.revision == encoder.embedder.fingerprint
    assert meta.embed_dim == encoder.embedder.dimension == 192
    assert meta.n_parameters == pytest.approx(weights, rel=0.01)  # the adapter is merged, soft prompts are rows more
    assert meta.memory_usage_mb == pytest.approx(4 * meta.n_parameters / 2**20)
    assert (meta.license, meta.training_datasets, meta.adapted_from) == ("apache-2.0", set(), "tiny")
    assert set(meta.modalities) == {"text", "image"}
    assert encoder.mteb_model_meta.revision == meta.revision
