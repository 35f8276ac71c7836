"""What the tests of the server send and get: images as data: URIs, errors of the one shape."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
from PIL import Image

KEY, OTHER_KEY = "key-one", "key-two"
ADAPTER, STRICT = "seaside", "strict"
CAPTIONS = [f"image number {i}" for i in range(8)]
SIZES = [float(i) if i else float("nan") for i in range(8)]


def encode(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """The bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(data: bytes | Image.Image) -> str:
    """An image as clients send it."""
    data = encode(data) if isinstance(data, Image.Image) else data
    return "data:image/png;base64," + base64.b64encode(data).decode()


def noise_image(seed: int) -> Image.Image:
    """64 x 64 pixels of coloured blocks."""
    blocks = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return Image.fromarray(blocks.repeat(16, axis=0).repeat(16, axis=1))


def claiming(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose header claims a size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def error_of(response: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """The error of a response, after checking that it has the one shape."""
    assert response.status_code == status, response.text
    assert response.headers.get_list("x-request-id") != []
    assert response.headers["content-type"] == "application/json"
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["code"] == code, error
    for secret in ("Traceback", "0x", "/root", "/tmp", "site-packages"):
        assert secret not in error["message"]
    return error


def write_index(folder: Path, model: dict[str, Any], vectors_ND: np.ndarray) -> str:
    """An index `gallery` of the images `CAPTIONS`, with a second version in which the first has another caption."""
    from vladva.core.hashing import digest
    from vladva.embed.table import read_embeddings
    from vladva.embed.table_parts import write_part
    from vladva.embed.table_writer import TableWriter
    from vladva.index.build import build_index
    from vladva.index.vector_index import open_index

    ids = [f"g#{i}" for i in range(len(CAPTIONS))]
    content = pa.array([digest(one) for one in ids], pa.binary(16))
    images = [encode(noise_image(i)) for i in range(len(ids))]
    columns = {
        "id": ids,
        "kind": ["image"] * len(ids),
        "content": content,
        "caption": CAPTIONS,
        "size": SIZES,
        "shard": [f"{i}.png" for i in range(len(ids))],
        "offset": [0] * len(ids),
        "length": [len(image) for image in images],
    }
    (folder / "corpus").mkdir()
    for name, image in zip(columns["shard"], images, strict=True):
        (folder / "corpus" / name).write_bytes(image)
    table = TableWriter(str(folder / "embeddings"), model, str(folder / "corpus"))
    write_part(str(folder / "embeddings"), pa.table(columns), vectors_ND, model)
    table.commit()
    uri = str(folder / "gallery")
    build_index(str(folder / "embeddings"), uri, tag="first")
    rows = read_embeddings(str(folder / "embeddings"))
    [row] = [i for i, one in enumerate(rows["id"].to_pylist()) if one == ids[0]]
    changed = rows.slice(row, 1)
    changed = changed.set_column(changed.schema.get_field_index("caption"), "caption", pa.array(["changed"]))
    open_index(uri).upsert(changed)
    return uri


def shaken_adapter(folder: Path, seed: int = 0) -> str:
    """The folder of an adapter on the tiny model, shaken so that it changes both embeddings and captions."""
    import torch

    from vladva.config import ModelConfig
    from vladva.models.adapter import add_adapter, save_adapter
    from vladva.models.embedding_model import EmbeddingModel
    from vladva.models.preprocessor import Preprocessor

    torch.manual_seed(seed)
    config = ModelConfig("tiny", lora_rank=4)
    model = EmbeddingModel(config, Preprocessor("tiny", soft_prompts=True))
    add_adapter(model, config)
    with torch.no_grad():
        for name, parameter in model.lvlm.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    folder.mkdir()
    save_adapter(model, config, folder)
    return str(folder)
