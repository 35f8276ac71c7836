"""What the data benchmark compares: photo-like shards, and the ways to make batches of them, each an endless stream.

Every way decodes, resizes and tokenises by the same functions (`decode_image`, `Preprocessor.collate`), on two
processes, in batches of CHUNK; what differs is how samples get to them and batches from them.
"""

from __future__ import annotations

import asyncio
import io
import json
import multiprocessing
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from vladva.config import RunConfig
    from vladva.data.examples import Example
    from vladva.models.preprocessor import Preprocessor

CHUNK, RUN, PROCESSES, SIDE = 32, 8, 2, 336
DIFFERENT = 64  # photos; making one takes ten times as long as decoding it
WORDS = [
    "a",
    "the",
    "small",
    "large",
    "red",
    "blue",
    "green",
    "circle",
    "square",
    "dog",
    "street",
    "sky",
    "of",
    "in",
    "on",
    "with",
    "and",
    "left",
    "right",
]


# --- shards ----------------------------------------------------------------------------------------------------------


def build_model(folder: Path) -> str:
    """Tokenizer and image processor of the tiny model, for images of 336 x 336 as LLaVA-1.5 takes; no weights."""
    from vladva.models.backbones import TINY

    shutil.copytree(TINY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    changes = {
        "preprocessor_config": {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}},
        "processor_config": {"patch_size": 14},
        "config": {"image_seq_length": 576},
    }
    for name, values in changes.items():
        content = json.loads((folder / f"{name}.json").read_text()) | values
        if name == "config":
            content["vision_config"] |= {"image_size": SIDE, "patch_size": 14}
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


def photo(seed: int) -> bytes:
    """A JPEG of 480 x 480 to 640 x 640 with detail of all sizes, some 60 KB: what decoding costs depends on both."""
    from PIL import Image

    random = np.random.default_rng(seed)
    width, height = (int(side) for side in random.integers(60, 81, 2) * 8)
    pixels = np.full((height, width, 3), 120, np.float32)
    for blocks, amplitude in ((8, 70), (32, 40), (128, 22), (640, 8)):
        noise = random.normal(0, amplitude, (blocks * height // 640, blocks * width // 640, 3)).astype(np.float32)
        noise = 0.7 * noise.mean(2, keepdims=True) + 0.3 * noise  # colours vary less than light does
        layers = [Image.fromarray(noise[:, :, c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        pixels += np.stack([np.asarray(layer) for layer in layers], 2)
    body = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(body, "JPEG", quality=85)
    return body.getvalue()


def write_photos(uri: str, count: int, per_shard: int = 125) -> None:
    """Shards of photos, every one DIFFERENT samples later again, with a short and a long caption each."""
    from vladva.data.shard_writer import ShardWriter

    random = np.random.default_rng(0)
    with ShardWriter(uri, per_shard) as shards, ThreadPoolExecutor(PROCESSES) as pool:
        photos = list(pool.map(photo, range(min(count, DIFFERENT))))
        for number in range(count):
            captions = [" ".join(random.choice(WORDS, length)) for length in random.integers((8, 50), (20, 90))]
            members = {"jpg": photos[number % DIFFERENT], "json": json.dumps({"captions": captions}).encode()}
            shards.write(f"{number:06d}", members)


# --- the limit -------------------------------------------------------------------------------------------------------


class Bare:
    """Two processes, each with its chunks' files in memory: decode, resize, tokenise, throw away."""

    def __init__(self, config: RunConfig, chunks: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes = []
        for rank in range(PROCESSES):
            pipe, other = context.Pipe()
            context.Process(target=_bare, args=(config, range(rank, chunks, PROCESSES), other), daemon=True).start()
            self.pipes.append(pipe)
        for pipe in self.pipes:
            pipe.recv()

    def seconds(self) -> float:
        """From the start of both to the end of the last."""
        began = time.perf_counter()
        for pipe in self.pipes:
            pipe.send("go")
        for pipe in self.pipes:
            pipe.recv()
        return time.perf_counter() - began


def _bare(config: RunConfig, numbers: range, pipe: Connection) -> None:
    from vladva.train.data_loader import ChunkReader

    reader = ChunkReader(config)
    chunks = [(number, reader.fetch(number)) for number in numbers]
    reader.collate(*chunks[0])
    pipe.send("ready")
    while pipe.recv():
        for chunk in chunks:
            reader.collate(*chunk)
        pipe.send("done")


# --- the streams: number of images in each batch, as it comes ------------------------------------------------------


def vladva_stream(config: RunConfig) -> Iterator[int]:
    """Ours, as one worker gets it."""
    from vladva.train.data_loader import ChunkStream

    stream, name = ChunkStream(config, 0, 1), f"chunks-{uuid.uuid4()}"
    _dealer = stream.start(name)
    for batch in stream.share(name, 0, ahead=config.chunks_per_worker):
        yield len(batch.ids)


@lru_cache(maxsize=1)
def preprocessor(model: str) -> Preprocessor:
    """One a process."""
    from vladva.models.preprocessor import Preprocessor

    return Preprocessor(model, soft_prompts=True)


def example(name: str, image: bytes, meta: bytes) -> Example:
    """A member of a tar, decoded."""
    from vladva.core.images import decode_image
    from vladva.data.examples import Example

    short, long = json.loads(meta)["captions"]
    return Example(name, decode_image(image), short, long)


class WebDatasetCollate:
    """A list of samples -> tensors, which a DataLoader hands over in shared memory."""

    def __init__(self, model: str) -> None:
        self.model = model

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        import torch

        examples = [example(sample["__key__"], sample["jpg"], sample["json"]) for sample in samples]
        row = preprocessor(self.model).collate(0, examples).to_row()
        return {key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for key, value in row.items()}


def webdataset_loader(model: str, shards: list[str]) -> Any:
    """torch's DataLoader over webdataset, its workers kept from one round to the next."""
    import webdataset
    from torch.utils.data import DataLoader

    samples = webdataset.WebDataset(shards, shardshuffle=len(shards), repeat=True).shuffle(100)
    batches = samples.batched(CHUNK, collation_fn=WebDatasetCollate(model))
    return DataLoader(
        batches, batch_size=None, num_workers=PROCESSES, multiprocessing_context="spawn", persistent_workers=True
    )


def webdataset_stream(loader: Any) -> Iterator[int]:
    for batch in loader:
        yield len(batch["ids"])


def ray_stream(model: str, shards: list[str], times: int) -> Iterator[int]:
    """Ray Data's own reader of tars."""
    import ray.data

    def collate(batch: dict[str, Any]) -> dict[str, Any]:
        examples = [example(*sample) for sample in zip(batch["__key__"], batch["jpg"], batch["json"], strict=True)]
        row = preprocessor(model).collate(0, examples).to_row()
        return {name: value for name, value in row.items() if name != "number"}

    read = ray.data.read_webdataset(shards * times, decoder=None, shuffle="files")
    for batch in read.map_batches(collate, batch_size=CHUNK).iter_batches(batch_size=CHUNK):
        yield len(batch["ids"])


# --- a storage that is far away --------------------------------------------------------------------------------------


@contextmanager
def delayed(port: int, seconds: float) -> Iterator[int]:
    """A port of 127.0.0.1 that leads to `port`, but everything sent there takes so long to arrive."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        free = listener.getsockname()[1]
    process = multiprocessing.get_context("spawn").Process(target=_forward, args=(free, port, seconds), daemon=True)
    process.start()
    while True:
        try:
            socket.create_connection(("127.0.0.1", free)).close()
            break
        except OSError:
            time.sleep(0.05)
    try:
        yield free
    finally:
        process.kill()


def _forward(listening: int, port: int, seconds: float) -> None:
    async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, delay: float) -> None:
        while data := await source.read(1 << 20):
            await asyncio.sleep(delay)
            target.write(data)
            await target.drain()
        target.close()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(
            pump(reader, server_writer, seconds), pump(server_reader, writer, 0), return_exceptions=True
        )

    async def serve() -> None:
        server = await asyncio.start_server(connected, "127.0.0.1", listening)
        await server.serve_forever()

    asyncio.run(serve())
