"""Score, rerank and classify against dot products computed here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
import torch

from serve.deployments.yes_or_no import PAIR_QUESTION
from tests.support.wire import data_uri, error_of, noise_image
from vladva.models.yes_probability import answer_tokens, yes_probabilities

if TYPE_CHECKING:
    from vladva.models.embedder import Embedder

QUERY = "a red circle"
DOCUMENTS: list[Any] = ["a blue square", "a red circle", {"image": data_uri(noise_image(5))}]


@pytest.fixture(scope="module")
def similarities(embedder: Embedder) -> np.ndarray:
    """Cosines of the query and the documents."""
    documents = np.concatenate([embedder.embed_texts(DOCUMENTS[:2]), embedder.embed_images([noise_image(5)])])
    return documents @ embedder.embed_texts([QUERY])[0]


def test_score_one_against_many_and_pair_by_pair(
    client: httpx.Client, similarities: np.ndarray, embedder: Embedder
) -> None:
    reply = client.post("/v1/score", json={"queries": QUERY, "documents": DOCUMENTS}).json()
    assert [entry["score"] for entry in reply["data"]] == pytest.approx(similarities, abs=1e-5)
    assert [(entry["index"], entry["object"]) for entry in reply["data"]] == [(i, "score") for i in range(3)]
    texts = DOCUMENTS[:2]
    expected_tokens = sum(embedder.count_text_tokens([QUERY, *texts])) + embedder.num_image_tokens(64, 64)
    assert reply["usage"]["prompt_tokens"] == expected_tokens
    pairs = client.post("/v1/score", json={"queries": [QUERY, texts[0]], "documents": texts}).json()
    assert [entry["score"] for entry in pairs["data"]] == pytest.approx([similarities[0]] * 2, abs=1e-5)
    error = error_of(client.post("/v1/score", json={"queries": texts, "documents": DOCUMENTS}), 422, "invalid_value")
    assert error["param"] == "queries"


def test_rerank_sorts(client: httpx.Client, similarities: np.ndarray) -> None:
    reply = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS, "top_n": 2}).json()
    order = np.argsort(-similarities)[:2]
    assert [result["index"] for result in reply["results"]] == order.tolist()
    assert [result["relevance_score"] for result in reply["results"]] == pytest.approx(similarities[order], abs=1e-5)
    assert reply["results"][0]["document"] == {"text": QUERY}
    whole = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS}).json()["results"]
    assert {one["index"]: one["document"] for one in whole}[2] == {}  # no image is sent back
    bare = client.post("/v1/rerank", json={"query": QUERY, "documents": DOCUMENTS, "return_documents": False}).json()
    assert bare["results"] == [{name: one[name] for name in ("index", "relevance_score")} for one in whole]
    parts = [{"type": "text", "text": text} for text in DOCUMENTS[:2]]
    parts.append({"type": "image_url", "image_url": DOCUMENTS[2]["image"]})
    for documents in ({"content": parts}, [{"content": [part]} for part in parts]):
        same = client.post("/v1/rerank", json={"query": QUERY, "documents": documents}).json()["results"]
        assert [one["relevance_score"] for one in same] == pytest.approx(
            [one["relevance_score"] for one in whole], abs=1e-5
        )


def test_the_generator_judges_pairs_with_its_adapter_off(client: httpx.Client, embedder: Embedder) -> None:
    """P(yes) as the offline re-ranker finds it; pairs of two texts against transformers' own forward."""
    image, caption = noise_image(5), "a red circle"
    documents = [data_uri(image), "a red circle", "nothing at all"]
    [offline] = yes_probabilities(embedder, [image], [caption])
    expected = [float(offline)]
    yes, no = (answer_tokens(embedder.preprocessor.tokenizer, answer) for answer in ("yes", "no"))
    for document in documents[1:]:
        said = (f"Query: {caption}\n", f"Document: {document}\n", PAIR_QUESTION)
        content = [{"type": "text", "text": text} for text in said]
        ids = embedder.preprocessor.render([{"role": "user", "content": content}])
        with torch.inference_mode(), embedder.adapter_switch.off():
            odds = embedder.model.base(input_ids=torch.tensor([ids])).logits[0, -1].softmax(0)
        expected.append(float(odds[yes].sum() / (odds[yes].sum() + odds[no].sum())))
    found = client.post("/v1/rerank", json={"query": caption, "documents": documents, "mode": "generative"}).json()
    scores = {result["index"]: result["relevance_score"] for result in found["results"]}
    assert [scores[i] for i in range(3)] == pytest.approx(expected, abs=1e-4)
    assert len(set(expected)) == 3
    assert [result["relevance_score"] for result in found["results"]] == sorted(scores.values(), reverse=True)
    assert found["model"] == "tiny"
    assert found["usage"]["total_tokens"] > 0
    pairs = {"queries": [caption, "x", "y"], "documents": documents, "mode": "generative"}
    data = client.post("/v1/score", json=pairs).json()["data"]
    assert data[0]["score"] == pytest.approx(expected[0], abs=1e-4)
    assert data[2]["score"] != pytest.approx(expected[2], abs=1e-4)


def test_classify_is_a_softmax_over_the_labels(client: httpx.Client, embedder: Embedder) -> None:
    names = ["red", "blue", "green"]
    body = {"input": data_uri(noise_image(5)), "modality": "image", "labels": names, "template": "a {} one"}
    reply = client.post("/v1/classify", json=body).json()
    labels = embedder.embed_texts(["a red one", "a blue one", "a green one"])
    logits = 100 * labels @ embedder.embed_images([noise_image(5)])[0]
    probabilities = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    [entry] = reply["data"]
    assert entry["probs"] == pytest.approx(probabilities, abs=1e-3)
    assert entry["label"] == names[int(probabilities.argmax())]
    assert entry["num_classes"] == 3


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/rerank", {"query": QUERY, "documents": []}, "documents"),
        ("/v1/rerank", {"query": QUERY, "documents": ["a"], "mode": "both"}, "mode"),
        ("/v1/rerank", {"query": QUERY, "documents": ["a", ""]}, "documents[1]"),
        ("/v1/rerank", {"query": ["a", "b"], "documents": ["a"]}, "query[0]"),
        ("/v1/classify", {"input": "a", "labels": ["one"]}, "labels"),
        ("/v1/classify", {"input": "a", "labels": ["one", "two"], "template": "a label"}, "template"),
        ("/v1/classify", {"input": "a", "labels": ["one", "two"], "lables": 1}, "lables"),
        ("/v1/score", {"queries": "a"}, "documents"),
    ],
)
def test_a_bad_field_is_named(client: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    assert error_of(client.post(path, json=body), 422, "invalid_value")["param"] == param
