"""Small scanned corpora of noise, made without Ray, and runs over them."""

from __future__ import annotations

import io
import json
import random
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
from PIL import Image

from vladva.config import ClusterConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from vladva.core import storage
from vladva.data import scan, shard_writer, sidecar
from vladva.data import scan as scan_module
from vladva.data.sampler import SampleFinder

BAD = b"no image"


def image(seed: int, size: tuple[int, int]) -> bytes:
    """A JPEG of noise in blocks of 8 pixels."""
    width, height = size
    coarse = Image.frombytes(
        "L", (-(-width // 8), -(-height // 8)), random.Random(seed).randbytes(-(-width // 8) * -(-height // 8))
    )
    body = io.BytesIO()
    coarse.convert("RGB").resize(size, Image.Resampling.NEAREST).save(body, "JPEG")
    return body.getvalue()


def write_corpus(uri: str, good: int, *, bad: int = 0, per_shard: int = 20, size: tuple[int, int] = (16, 16)) -> None:
    """Shards of `good` images with a short and a long caption each, and of `bad` that are none, spread evenly."""
    total = good + bad
    with shard_writer.ShardWriter(uri, per_shard) as writer:
        for number in range(total):
            is_bad = (number + 1) * bad // total > number * bad // total
            captions = [f"short {number}", f"long {number} " + "word " * 8]
            content = BAD if is_bad else image(number, size)
            writer.write(f"{number:06d}", {"jpg": content, "json": json.dumps({"captions": captions}).encode()})


def scan_here(uri: str) -> None:
    """Scan in this process."""

    def run(scanner: sidecar.Scanner, listed: list[sidecar.ListedShard]) -> list[dict]:
        return [json.loads(scanner(row)["facts"]) for row in listed]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scan_module, "_run", run)
        scan.scan(uri, lambda texts: [len(text.split()) for text in texts], max_bad_fraction=0.5)


def run_over(
    data: DataConfig, storage: Path | str, model: str = "tiny", *, steps: int = 1, batch: int = 16, chunk: int = 4
) -> RunConfig:
    """A run of `steps` global batches."""
    data = replace(data, short_below=5, run_length=min(data.run_length, chunk))
    train = TrainConfig(steps=steps, global_batch=batch, chunk_size=chunk, audit=True)
    cluster = ClusterConfig(workers=1)
    return RunConfig("run", str(storage), ModelConfig(checkpoint=model), data, train, cluster=cluster, seed=5)


def write_large_index(config: RunConfig, num_shards: int, per_shard: int) -> set[str]:
    """An index with the sidecars alone that the run's first chunk needs; returns their shards."""
    names = [f"{number // 1000:03d}/{number:06d}.tar" for number in range(num_shards)]
    manifest = {
        "settings": {"version": 2, "verify": True, "max_pixels": 50_000_000, "probe": [1, 2, 3, 4]},
        "listed": [[name, 60_000_000, 1_700_000_000_000_000_000] for name in names],
        "shards": [{"shard": name, "num_samples": per_shard, "num_bad": 0, "damaged": False} for name in names],
        "reasons": {},
        "fingerprint": "0" * 16,
    }
    storage.write_json(storage.join(config.data.uri, "_index", "manifest.json"), manifest)
    runs = SampleFinder(config).schedule.chunk(0)
    needed = {names[number // per_shard] for run in runs for number in (run.first, run.first + run.count - 1)}
    alike = {"offset": 0, "length": 60_000, "captions": ["a"], "caption_tokens": [1], "negatives": []}
    alike |= {"width": 640, "height": 480, "crc32": 1}
    for name in needed:
        rows = [{"id": f"{name}#{i:06d}", "key": f"{i:06d}", "shard": name, **alike} for i in range(per_shard)]
        uri = sidecar.sidecar_uri(storage.join(config.data.uri, "_index"), name)
        storage.write_bytes_atomically(uri, sidecar.parquet_bytes(pa.Table.from_pylist(rows, sidecar.SCHEMA), {}))
    return needed
