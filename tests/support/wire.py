"""What the tests of the server send and get: images as data: URIs, errors of the one shape."""

from __future__ import annotations

import base64
import io
from typing import Any

import httpx
import numpy as np
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
