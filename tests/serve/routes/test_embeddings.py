"""POST /v1/embeddings against the embedder in this process, with the `openai` client and with plain HTTP."""

from __future__ import annotations

import base64
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from tests.support.wire import ADAPTER, data_uri, error_of, noise_image

if TYPE_CHECKING:
    from openai import OpenAI

    from vladva.models.embedder import Embedder

TEXTS = ["a red circle above a blue square", "two small green stars"]


def embed(client: httpx.Client, **body: Any) -> np.ndarray:
    """Embeddings [N, D] that the server gives."""
    response = client.post("/v1/embeddings", json=body)
    assert response.status_code == 200, response.text
    return np.array([entry["embedding"] for entry in response.json()["data"]], np.float32)


def test_openai_client_gets_the_embedders_vectors(openai_client: OpenAI, embedder: Embedder) -> None:
    # The client asks for base64 when the caller does not say.
    for encoding in ({}, {"encoding_format": "float"}, {"encoding_format": "base64"}):
        reply = openai_client.embeddings.create(model=ADAPTER, input=TEXTS, **encoding)
        vectors = [
            np.frombuffer(base64.b64decode(d.embedding), "<f4") if isinstance(d.embedding, str) else d.embedding
            for d in reply.data
        ]
        np.testing.assert_allclose(vectors, embedder.embed_texts(TEXTS), atol=1e-5)
        assert [d.index for d in reply.data] == [0, 1]
        assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(embedder.count_text_tokens(TEXTS))
        assert reply.model == ADAPTER


def test_forms_of_input(client: httpx.Client, embedder: Embedder) -> None:
    image = noise_image(0)
    of_text, of_image = embedder.embed_texts(TEXTS[:1]), embedder.embed_images([image])
    text_part = {"type": "text", "text": TEXTS[0]}
    image_part = {"type": "image_url", "image_url": {"url": data_uri(image)}}
    conversation = [{"role": "user", "content": [image_part]}]
    bare = data_uri(image).partition(",")[2]
    forms = [
        (of_text, {"input": TEXTS[0]}),
        (of_text, {"input": {"text": TEXTS[0]}}),
        (of_text, {"input": [{"text": TEXTS[0]}]}),
        (of_text, {"messages": [{"role": "user", "content": TEXTS[0]}]}),
        (of_text, {"messages": [{"role": "user", "content": [text_part]}]}),
        (of_image, {"input": {"image": data_uri(image)}}),
        (of_image, {"input": data_uri(image), "modality": "image"}),
        (of_image, {"input": data_uri(image)}),
        (of_image, {"input": [data_uri(image)], "modality": "text"}),
        (of_image, {"input": {"image": bare}}),
        (of_image, {"input": bare, "modality": "image"}),
        (of_image, {"input": [{"content": [image_part]}]}),
        (of_image, {"input": [{"content": [{"type": "image_base64", "image_base64": bare}]}]}),
        (of_image, {"input": [{"type": "image_url", "image_url": data_uri(image)}]}),
        (of_image, {"input": [{"type": "input_image", "image_url": data_uri(image)}]}),
        (of_image, {"input": conversation}),
        (np.concatenate([of_image, of_text]), {"input": [conversation, [{"role": "user", "content": TEXTS[0]}]]}),
        (of_text, {"input": [{"text": TEXTS[0], "image": None}], "model": f"{ADAPTER}-query"}),
        (of_text, {"input": [{"type": "input_text", "text": TEXTS[0]}], "model": f"{ADAPTER}-passage"}),
        (of_text, {"messages": [{"role": "user", "content": TEXTS[0]}, {"role": "assistant", "content": None}]}),
        (of_image, {"input": [data_uri(image)], "modality": "image"}),
        (of_image, {"messages": conversation}),
        (np.concatenate([of_image, of_image]), {"messages": [conversation, conversation]}),
        (np.concatenate([of_image, of_text]), {"input": [{"image": data_uri(image)}, TEXTS[0]]}),
    ]
    for expected, body in forms:
        np.testing.assert_allclose(embed(client, **body), expected, atol=1e-5)
    assert abs(float(of_text[0] @ of_image[0])) < 0.999  # a server that mixes them up would be noticed


def test_texts_with_special_tokens_and_marks_are_texts(client: httpx.Client, embedder: Embedder) -> None:
    texts = ["an image <image> here", "a </s> b", "a < b", "a b"]
    expected = embedder.embed_texts(texts)
    np.testing.assert_allclose(embed(client, input=texts), expected, atol=1e-5)
    np.testing.assert_allclose(embed(client, input="\ufeffa </s>\0 b\r\n")[0], expected[1], atol=1e-5)
    assert (expected[1] @ expected[3]) < 0.9999  # negative control: it is read, not left out


def test_dimensions_truncate_then_normalise(client: httpx.Client, embedder: Embedder) -> None:
    [full] = embedder.embed_texts(TEXTS[:1])
    [short] = embed(client, input=TEXTS[0], dimensions=16, allow_untrained_dimensions=True)
    np.testing.assert_allclose(short, full[:16] / np.linalg.norm(full[:16]), atol=1e-5)
    np.testing.assert_allclose(embed(client, input=TEXTS[0], dimensions=len(full))[0], full, atol=1e-5)
    for body in ({"dimensions": 16}, {"dimensions": len(full) + 1, "allow_untrained_dimensions": True}):
        error = error_of(client.post("/v1/embeddings", json={"input": "a", **body}), 422, "invalid_value")
        assert error["param"] == "dimensions"
        assert str(embedder.dimension) in error["message"]


def test_numbers_of_smaller_types(client: httpx.Client, embedder: Embedder) -> None:
    [full] = embedder.embed_texts(TEXTS[:1])

    def sent(dtype: str) -> np.ndarray:
        [plain] = client.post("/v1/embeddings", json={"input": TEXTS[0], "embed_dtype": dtype}).json()["data"]
        body = {"input": TEXTS[0], "output_dtype": dtype, "encoding_format": "base64"}
        [packed] = client.post("/v1/embeddings", json=body).json()["data"]
        kind = "<u1" if dtype.startswith("u") else "<i1"
        vector = np.frombuffer(base64.b64decode(packed["embedding"]), kind)
        assert vector.tolist() == plain["embedding"]
        return vector

    levels = sent("int8")
    assert np.abs(levels).max() == 127
    np.testing.assert_allclose(levels * np.abs(full).max() / 127, full, atol=np.abs(full).max() / 253)
    assert sent("uint8").tolist() == (levels.astype(int) + 128).tolist()
    bits = [sum(int(full[8 * i + j] > 0) << (7 - j) for j in range(8)) for i in range(len(full) // 8)]
    assert sent("ubinary").tolist() == bits
    assert sent("binary").tolist() == [byte - 128 for byte in bits]


def test_every_reply_says_which_model_made_it(client: httpx.Client, embedder: Embedder) -> None:
    document = {"input": "a"}
    bodies: dict[str, dict[str, Any]] = {
        "/v1/embeddings": document,
        "/v1/embeddings/": document,
        "/v1/score": {"queries": "a", "documents": "b"},
        "/score": {"text_1": "a", "text_2": ["b", "c"]},
        "/v1/rerank": {"query": "a", "documents": ["b"]},
        "/rerank": {"query": "a", "documents": ["b"]},
        "/v1/classify": {"input": "a", "labels": ["b", "c"]},
        "/v1/search": {"query": "a"},
        "/v2/embed": {"texts": ["a"]},
        "/v2/rerank": {"query": "a", "documents": ["b"]},
    }
    for path, body in bodies.items():
        response = client.post(path, json=body)
        assert response.status_code == 200, (path, response.text)
        assert response.json()["fingerprint"] == embedder.fingerprint


def test_long_texts_are_cut_only_where_that_is_asked_for(client: httpx.Client) -> None:
    words = [f"word{i}" for i in range(400)]
    for text in (" ".join(words), " ".join(words * 1000)):  # some hundred tokens too many; more than is ever read
        error_of(client.post("/v1/embeddings", json={"input": text}), 422, "context_length_exceeded")
        [start], [end] = (embed(client, input=text, truncate=side) for side in ("start", "END"))
        assert np.abs(start - end).max() > 1e-3
    [cut] = embed(client, input=" ".join(words), truncate_prompt_tokens=-1)
    np.testing.assert_allclose(cut, embed(client, input=" ".join(words), truncate="end")[0], atol=1e-5)
    error_of(client.post("/v1/embeddings", json={"input": "a", "truncate_prompt_tokens": 7}), 422, "invalid_value")
    [shorter] = embed(client, input=" ".join(words[:-1]), truncate="end")
    [longer] = embed(client, input=" ".join(words), truncate="end")
    np.testing.assert_allclose(shorter, longer, atol=1e-5)


def test_tokenize_tells_the_cost_beforehand(client: httpx.Client, embedder: Embedder) -> None:
    items = [TEXTS[0], data_uri(noise_image(1))]
    reply = client.post("/v1/tokenize", json={"input": items}).json()
    usage = client.post("/v1/embeddings", json={"input": items}).json()["usage"]
    assert [one["tokens"] for one in reply["data"]] == [
        embedder.count_text_tokens(TEXTS[:1])[0],
        embedder.num_image_tokens(64, 64),
    ]
    assert reply["count"] == usage["prompt_tokens"]
    assert reply["max_model_len"] > reply["count"]
    error = error_of(client.post("/v1/tokenize", json={"input": ["a", "word " * 600]}), 422, "context_length_exceeded")
    assert error["param"] == "input[1]"


def test_image_usage_counts_image_tokens(client: httpx.Client, embedder: Embedder) -> None:
    reply = client.post("/v1/embeddings", json={"input": data_uri(noise_image(1)), "modality": "image"}).json()
    assert reply["usage"]["prompt_tokens"] == embedder.num_image_tokens(64, 64) > (64 // 16) ** 2


def test_concurrent_requests_share_batches_and_get_their_own_vectors(client: httpx.Client, embedder: Embedder) -> None:
    texts = [f"{'a large ' * (i % 5)}red circle left of {i} blue squares" for i in range(40)]
    with ThreadPoolExecutor(20) as pool:
        vectors = list(pool.map(lambda text: embed(client, input=text)[0], texts))
    np.testing.assert_allclose(vectors, embedder.embed_texts(texts), atol=1e-5)


@pytest.mark.parametrize(
    ("item", "code"),
    [
        ("", "invalid_value"),
        ("\0\ufeff ", "invalid_value"),
        (7, "invalid_value"),
        ({"txt": "a"}, "invalid_value"),
        ({"image": "file:///etc/passwd"}, "invalid_image"),
        ({"image": "http://127.0.0.1:8265/api/version"}, "invalid_image"),
        ({"image": "data:image/png;base64,@@@@"}, "invalid_image"),
        ([1, 2, 3], "invalid_value"),
        ({"content": []}, "invalid_value"),
        ({"content": [{"type": "text"}]}, "invalid_value"),
        ({"content": [{"type": "video_url", "video_url": "data:"}]}, "invalid_value"),
        ({"content": 7}, "invalid_value"),
        ({"image": data_uri(noise_image(0)), "text": 7}, "invalid_value"),
        ([{"role": "user", "content": [{"type": "image", "image": data_uri(noise_image(0))}] * 2}], "invalid_value"),
        ({"text": "a", "instruction": "x" * 4001}, "invalid_value"),
        ({"image": "data:text/html;base64,AAAA"}, "invalid_image"),
        ({"image": data_uri(b"no image")}, "invalid_image"),
        ("word " * 600, "context_length_exceeded"),
    ],
)
def test_a_bad_item_is_named_or_with_partial_skipped(client: httpx.Client, item: Any, code: str) -> None:
    error = error_of(client.post("/v1/embeddings", json={"input": [TEXTS[0], item]}), 422, code)
    assert error["param"] == "input[1]"
    assert error["message"].startswith("input[1]: ")
    reply = client.post("/v1/embeddings", json={"input": [TEXTS[0], item, TEXTS[1]], "partial": True}).json()
    assert [entry["index"] for entry in reply["data"]] == [0, 1, 2]
    assert reply["data"][1]["embedding"] is None
    assert reply["data"][1]["error"]["code"] == code
    np.testing.assert_allclose([reply["data"][i]["embedding"] for i in (0, 2)], embed(client, input=TEXTS), atol=1e-5)


def test_half_a_surrogate_pair_is_refused(client: httpx.Client) -> None:
    body = rb'{"input": ["a", "\ud800"]}'
    response = client.post("/v1/embeddings", content=body, headers={"Content-Type": "application/json"})
    assert error_of(response, 422, "invalid_value")["param"] == "input[1]"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "body"),
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "body"),
        ({"input": []}, "input"),
        ({"messages": []}, "messages"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "modality": "sound"}, "modality"),
        ({"input": ["a"] * 2049}, "input"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "messages[0]"),
        ({"input": [1, 2, 3]}, "input[0]"),
        ({"input": "a", "embed_dtype": "int4"}, "embed_dtype"),
        ({"input": "a", "truncate": "middle"}, "truncate"),
    ],
)
def test_a_bad_field_is_named(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert error_of(client.post("/v1/embeddings", json=body), 422, "invalid_value")["param"] == param


def test_token_ids_are_refused_with_the_way_out(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/embeddings", json={"input": [[1, 2], [3]]}), 422, "invalid_value")
    assert "check_embedding_ctx_length=False" in error["message"]


def test_an_unknown_model_is_refused_and_the_known_one_named(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/embeddings", json={"input": "a", "model": "gpt"}), 404, "model_not_found")
    assert ADAPTER in error["message"]
