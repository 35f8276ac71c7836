"""The clients that people have, unmodified, against a real server: one environment of its own for each.

    python tests/bench/clients.py                     all of them
    python tests/bench/clients.py --only cohere       one

An environment is made under .venv/clients where there is none; `openai` and `mteb` are those of the tests' own. Prints
a table and one line of JSON. A client passes where it gets, through its own API, the vectors that plain HTTP gets.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
import traceback
import urllib.error
import urllib.request
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "openai": "openai",
    "litellm": "litellm",
    "cohere": "cohere",
    "langchain": "langchain-openai",
    "llama-index": "llama-index-embeddings-openai-like",
    "haystack": "haystack-ai",
    "mteb": "mteb",
}
SHARED = {"openai", "mteb"}  # in the tests' own environment
MODEL = "seaside"
TEXTS = ["a red circle above a blue square", "two small green stars"]


# --- the checks: each runs in the environment of its client -----------------------------------------------------------


def plain(url: str, items: Any) -> list[list[float]]:
    """Vectors by plain HTTP."""
    body = json.dumps({"input": items}).encode()
    request = urllib.request.Request(f"{url}/v1/embeddings", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as response:
        return [one["embedding"] for one in json.load(response)["data"]]


def same(found: Any, expected: list[list[float]]) -> None:
    """Assert that vectors are equal."""
    found = [list(map(float, row)) for row in found]
    assert len(found) == len(expected), (len(found), len(expected))
    difference = max(abs(a - b) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True))
    assert difference < 1e-5, difference


def refusal(work: Callable[..., Any], kind: type[Exception], *arguments: Any, **options: Any) -> Any:
    """The error that some work must end with. (The environments have no pytest.)"""
    try:
        work(*arguments, **options)
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def check_openai(url: str, image: str) -> None:
    from openai import OpenAI, UnprocessableEntityError

    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    assert MODEL in [model.id for model in client.models.list()]
    same([one.embedding for one in client.embeddings.create(model=MODEL, input=TEXTS).data], plain(url, TEXTS))
    same([one.embedding for one in client.embeddings.create(model=MODEL, input=image).data], plain(url, image))
    content = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is it?"}]
    turns: Any = [{"role": "user", "content": content}]
    whole = client.chat.completions.create(model="tiny", messages=turns, max_tokens=8)
    parts = client.chat.completions.create(model="tiny", messages=turns, max_tokens=8, stream=True)
    assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
    assert refusal(client.embeddings.create, UnprocessableEntityError, model=MODEL, input="word " * 5000).code == (
        "context_length_exceeded"
    )


def check_litellm(url: str, image: str) -> None:
    import litellm

    both = [*TEXTS, image]
    expected = plain(url, both)
    reply = litellm.embedding(model=f"openai/{MODEL}", input=both, api_base=f"{url}/v1", api_key="none")
    same([one["embedding"] for one in reply.data], expected)
    reply = litellm.embedding(model=f"jina_ai/{MODEL}", input=both, api_base=f"{url}/v1", api_key="none")
    same([one["embedding"] for one in reply.data], expected)
    reply = litellm.embedding(model=f"cohere/{MODEL}", input=TEXTS, api_base=f"{url}/v2/embed", api_key="none")
    same([one["embedding"] for one in reply.data], expected[:2])
    arguments = {"query": TEXTS[0], "documents": TEXTS[::-1], "api_key": "none"}
    for model, base in (("cohere", f"{url}/v2/rerank"), ("jina_ai", f"{url}/v1/rerank")):
        ranked = litellm.rerank(model=f"{model}/{MODEL}", api_base=base, **arguments)
        assert ranked.results[0]["index"] == 1
    turns = [{"role": "user", "content": "Hello"}]
    answer = litellm.completion(model="openai/tiny", messages=turns, api_base=f"{url}/v1", api_key="none", max_tokens=4)
    assert answer.choices[0].message.content is not None


def check_cohere(url: str, image: str) -> None:
    import cohere

    client = cohere.ClientV2(api_key="none", base_url=url)
    reply = client.embed(model=MODEL, texts=TEXTS, input_type="search_document", embedding_types=["float", "int8"])
    same(reply.embeddings.float_, plain(url, TEXTS))
    assert max(map(abs, reply.embeddings.int8[0])) in (127, 128)
    reply = client.embed(model=MODEL, images=[image], input_type="image", embedding_types=["float"])
    same(reply.embeddings.float_, plain(url, image))
    inputs: Any = [{"content": [{"type": "image_url", "image_url": {"url": image}}]}]
    reply = client.embed(model=MODEL, inputs=inputs, input_type="search_document", embedding_types=["float"])
    same(reply.embeddings.float_, plain(url, image))
    ranked = client.rerank(model=MODEL, query=TEXTS[0], documents=TEXTS[::-1], top_n=1)
    assert [one.index for one in ranked.results] == [1]


def check_langchain(url: str, image: str) -> None:
    from langchain_openai import ChatOpenAI, OpenAIEmbeddings

    options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none"}
    embeddings = OpenAIEmbeddings(model=MODEL, check_embedding_ctx_length=False, **options)
    same(embeddings.embed_documents(TEXTS), plain(url, TEXTS))
    same([embeddings.embed_query(TEXTS[0])], plain(url, TEXTS[:1]))
    parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is it?"}]
    assert ChatOpenAI(model="tiny", max_tokens=4, **options).invoke([("user", parts)]).content
    # Its default sends token ids of OpenAI's models. They are told apart, and the way out is named.
    request = urllib.request.Request(
        f"{url}/v1/embeddings", json.dumps({"input": [[1, 2]]}).encode(), {"Content-Type": "application/json"}
    )
    told = refusal(urllib.request.urlopen, urllib.error.HTTPError, request, timeout=60).read().decode()
    assert "check_embedding_ctx_length=False" in told


def check_llama_index(url: str, image: str) -> None:
    from llama_index.embeddings.openai_like import OpenAILikeEmbedding

    client = OpenAILikeEmbedding(model_name=MODEL, api_base=f"{url}/v1", api_key="none")
    same(client.get_text_embedding_batch(TEXTS), plain(url, TEXTS))
    same([client.get_query_embedding(TEXTS[0])], plain(url, TEXTS[:1]))


def check_haystack(url: str, image: str) -> None:
    from haystack import Document
    from haystack.components.embedders import OpenAIDocumentEmbedder, OpenAITextEmbedder
    from haystack.utils import Secret

    options: dict[str, Any] = {"model": MODEL, "api_base_url": f"{url}/v1", "api_key": Secret.from_token("none")}
    same([OpenAITextEmbedder(**options).run(TEXTS[0])["embedding"]], plain(url, TEXTS[:1]))
    same([OpenAITextEmbedder(**options).run(image)["embedding"]], plain(url, image))
    documents = OpenAIDocumentEmbedder(progress_bar=False, **options).run([Document(content=one) for one in TEXTS])
    same([one.embedding for one in documents["documents"]], plain(url, TEXTS))


def check_mteb(url: str, image: str) -> None:
    import base64
    import io

    import numpy as np
    from mteb.models import OpenAIAPIEncodeWrapper, OpenAIAPIRerankWrapper
    from PIL import Image

    decoded = Image.open(io.BytesIO(base64.b64decode(image.partition(",")[2])))
    for template in (True, False):
        encoder = OpenAIAPIEncodeWrapper(url, MODEL, modalities=["text", "image"], use_chat_template=template)
        batches: Any = [{"text": TEXTS}]
        found = encoder.encode(batches, task_metadata=mteb_task(), hf_split="test", hf_subset="default")
        same(np.asarray(found), plain(url, TEXTS))
    images: Any = [{"image": [decoded]}]
    found = encoder.encode(images, task_metadata=mteb_task(), hf_split="test", hf_subset="default")
    same(np.asarray(found), plain(url, image))
    reranker = OpenAIAPIRerankWrapper(url, MODEL, modalities=["text", "image"])
    pairs: dict[str, Any] = {"inputs1": [{"text": [TEXTS[0]] * 2}], "inputs2": [{"text": TEXTS}]}
    scores = reranker.predict(**pairs, task_metadata=mteb_task(), hf_split="test", hf_subset="default")
    a, b = plain(url, TEXTS)
    assert math.isclose(float(scores[0]), 1, abs_tol=1e-5)
    assert math.isclose(float(scores[1]), sum(x * y for x, y in zip(a, b, strict=True)), abs_tol=1e-5)


def mteb_task() -> Any:
    """Metadata of some task; only its name is looked at."""
    import mteb

    return mteb.get_task("STSBenchmark").metadata


CHECKS: dict[str, Callable[[str, str], None]] = {
    "openai": check_openai,
    "litellm": check_litellm,
    "cohere": check_cohere,
    "langchain": check_langchain,
    "llama-index": check_llama_index,
    "haystack": check_haystack,
    "mteb": check_mteb,
}


# --- the driver -------------------------------------------------------------------------------------------------------


def environment_of(client: str) -> str:
    """The Python that has the client; installs it where it is not there yet."""
    if client in SHARED:
        return sys.executable
    folder = ROOT / ".venv" / "clients" / client
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGES[client]]
    subprocess.run(pip, check=True)
    return str(python)


def result_of(client: str, url: str, image: str) -> dict[str, str]:
    """What became of one client's check."""
    command = [environment_of(client), __file__, "--check", client, "--url", url]
    variables = os.environ | {
        "VLADVA_IMAGE": image,
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "HAYSTACK_TELEMETRY_ENABLED": "0",
    }
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False, timeout=600)
    last = done.stdout.strip().splitlines()[-1:] or ["{}"]
    if done.returncode:
        print(done.stdout[-2000:], done.stderr[-2000:], sep="\n")
        return {"result": "failed"}
    return json.loads(last[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=sorted(CHECKS), action="append", help="these clients, not all")
    parser.add_argument("--url", default="", help="a server that runs already and serves a model named `seaside`")
    parser.add_argument("--check", choices=sorted(CHECKS), help="check in this interpreter, against --url")
    options = parser.parse_args()
    if options.check:
        try:
            CHECKS[options.check](options.url, os.environ["VLADVA_IMAGE"])
        except Exception:
            traceback.print_exc()
            sys.exit(1)
        print(json.dumps({"result": "passed", "version": version(PACKAGES[options.check])}))
        return

    sys.path[:0] = [str(ROOT), str(ROOT / "platform")]
    from tests.support.wire import data_uri, noise_image

    image = data_uri(noise_image(1))
    clients = options.only or list(CHECKS)
    if options.url:
        results = {client: result_of(client, options.url, image) for client in clients}
    else:
        with tempfile.TemporaryDirectory() as folder:
            results = with_server(Path(folder), lambda url: {one: result_of(one, url, image) for one in clients})
    for client, result in results.items():
        print(f"{PACKAGES[client]:36} {result.get('version', ''):12} {result['result']}")
    print(json.dumps(results))


def with_server(folder: Path, work: Callable[[str], dict[str, dict[str, str]]]) -> dict[str, dict[str, str]]:
    """Some work on the URL of a server of the tiny model with an adapter."""
    import ray

    from serve.app import start, stop
    from serve.config import ServeArgs
    from tests.support.wire import shaken_adapter

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init("local", num_cpus=4, include_dashboard=False, logging_level="WARNING")
    try:
        return work(start(ServeArgs(model=shaken_adapter(folder / MODEL), num_cpus=0, max_replicas=1), port=port))
    finally:
        stop()
        ray.shutdown()


if __name__ == "__main__":
    main()
