"""Parity: one sample embedded on every path there is, and how far the paths differ.

- `training`: a chunk as training reads and collates it, through the module that is trained, the adapter beside it.
- `job`: the batch job: Ray Data, the adapter merged, the fast forward, a table that is written and read again.
- `server`: a running endpoint, over HTTP.

N samples, D width.
"""

from __future__ import annotations

import base64
import json
import secrets
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from vladva.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.core import storage
from vladva.models.batch import MicroBatch, Pixels

REQUEST_ITEMS = 32
TIMEOUT_S = 300.0

EmbeddingPaths = dict[str, dict[str, np.ndarray]]  # path -> kind ("image", "text") -> embeddings [N, D]


class ParitySample:
    """The first pairs that a run on these shards would train on; needs a Ray cluster where they are not scanned yet."""

    def __init__(self, config: ModelConfig, data_uri: str, count: int) -> None:
        """Raises ValueError and FileNotFoundError for shards that cannot be read, ValueError for a bad count."""
        from vladva.data.scan import scan
        from vladva.data.shard_index import ShardIndex
        from vladva.models.resolve import preprocessor_of
        from vladva.train.data_loader import ChunkReader

        if count < 1:
            raise ValueError(f"samples is {count}; give at least 1")
        scan(data_uri, preprocessor_of(config).count_tokens)  # as training does; once for each corpus
        count = min(count, ShardIndex.open(data_uri).num_samples)
        data = DataConfig(data_uri, run_length=1)
        train = TrainConfig(steps=1, global_batch=count, chunk_size=count)
        reader = ChunkReader(RunConfig("parity", "", config, data, train))
        samples = reader.fetch(0)
        examples = reader.examples(0, samples)
        self.batch: MicroBatch = reader.preprocessor.collate(0, examples)
        pixels = self.batch.pixels
        if pixels is None:
            raise ValueError(f"{data_uri} holds pairs of texts; give shards of images with captions")
        self.pixels: Pixels = pixels
        # What has no short caption trains with an empty text, which is no text to embed.
        self.images: dict[str, bytes] = {}
        for example, sample in zip(examples, samples, strict=True):
            if not isinstance(sample.content, bytes) or not example.id.endswith(sample.ref.id):
                raise ValueError(f"{data_uri}: {sample.ref.id} cannot be used, so nothing can be compared on it")
            self.images[example.id] = sample.content
        self.texts = {example.id: example.short for example in examples if example.short is not None}


def compare(
    model: str,
    data_uri: str,
    out_uri: str,
    *,
    samples: int = 32,
    dtype: str = "float32",
    url: str = "",
    key: str = "",
) -> EmbeddingPaths:
    """Embeddings of a sample on every path; needs a Ray cluster. The server at `url`, if any, is asked with `key`.

    out_uri: folder that every node sees, for the table that the job writes.

    Raises ValueError where the server refuses, or serves another model.
    """
    from vladva.models.resolve import describe, pin

    model = pin(model)
    config, description = describe(model, adapter=True, dtype=dtype)
    sample = ParitySample(config, data_uri, samples)
    paths = {"training": by_training(model, config, sample), "job": by_job(model, dtype, sample, out_uri)}
    if url:
        paths["server"] = by_server(url.rstrip("/"), key, description["fingerprint"], sample)
    return paths


def differences(paths: EmbeddingPaths) -> Iterator[tuple[str, str, str, float]]:
    """(path, path, kind, largest difference of a number in the embeddings) of each two paths."""
    for first, second in combinations(paths, 2):
        for kind, embeddings_ND in paths[first].items():
            yield first, second, kind, float(abs(embeddings_ND - paths[second][kind]).max())


def by_training(model: str, config: ModelConfig, sample: ParitySample) -> dict[str, np.ndarray]:
    """As a training step embeds its chunk."""
    import torch

    from vladva.models.batch import as_tensors
    from vladva.models.embedder import load_embedder

    module = load_embedder(model, dtype=config.dtype).model
    batch = sample.batch
    with torch.inference_mode():
        images = module(as_tensors(batch.image, "cpu"), as_tensors(sample.pixels, "cpu"))[0].numpy()
        texts = module(as_tensors(batch.text, "cpu"))[0].numpy()
    return {"image": images, "text": texts[: len(batch.ids)][batch.has_short]}


def by_job(model: str, dtype: str, sample: ParitySample, out_uri: str) -> dict[str, np.ndarray]:
    """As jobs/embed.py does, with a table below `out_uri` that is deleted in the end."""
    import pyarrow as pa
    import ray.data

    from vladva.embed.pipeline import encode, read_embeddings
    from vladva.embed.table import embedding_matrix

    rows = [{"id": name, "kind": "image", "image": content} for name, content in sample.images.items()]
    rows += [{"id": name, "kind": "text", "text": text} for name, text in sample.texts.items()]
    columns = [("id", pa.string()), ("kind", pa.string()), ("image", pa.binary()), ("text", pa.string())]
    items = ray.data.from_arrow(pa.Table.from_pylist(rows, schema=pa.schema(columns)))
    table_uri = storage.join(out_uri, f"table-{secrets.token_hex(4)}")
    try:
        encode(items, model, table_uri, actors=1, dtype=dtype, max_bad_fraction=0)
        table = read_embeddings(table_uri)
    finally:
        storage.delete_folder(table_uri)
    row = {name: i for i, name in enumerate(zip(table["id"].to_pylist(), table["kind"].to_pylist(), strict=True))}
    matrix = embedding_matrix(table)
    return {
        kind: matrix[[row[name, kind] for name in names]]
        for kind, names in (("image", sample.images), ("text", sample.texts))
    }


def by_server(url: str, key: str, fingerprint: str, sample: ParitySample) -> dict[str, np.ndarray]:
    """As clients get them. The server must have the model."""
    served = {model["fingerprint"] for model in request(f"{url}/v1/models", key)["data"] if "fingerprint" in model}
    if fingerprint not in served:
        raise ValueError(f"{url} serves model {', '.join(sorted(served)) or 'none'}, not {fingerprint}: start it anew")
    images = [  # whatever type the bytes are: the server looks for itself
        {"image": f"data:image/jpeg;base64,{base64.b64encode(content).decode()}"} for content in sample.images.values()
    ]
    texts = [{"text": text} for text in sample.texts.values()]
    return {"image": ask(url, key, images), "text": ask(url, key, texts)}


def ask(url: str, key: str, items: Sequence[dict[str, Any]]) -> np.ndarray:
    """Embeddings [N, D] of items from the server."""
    vectors: list[list[float]] = []
    for first in range(0, len(items), REQUEST_ITEMS):
        answer = request(f"{url}/v1/embeddings", key, {"input": items[first : first + REQUEST_ITEMS]})
        vectors += [entry["embedding"] for entry in answer["data"]]
    return np.array(vectors, np.float32)


def request(url: str, key: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """The server's JSON answer. Raises ValueError for what it refuses, or if it is not there."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=TIMEOUT_S) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise ValueError(f"{url} answers {error.code}: {error.read(300).decode(errors='replace')}") from error
    except OSError as error:
        raise ValueError(f"{url} cannot be reached: {error}") from error
