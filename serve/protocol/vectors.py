"""Vectors: how an embedding [D] is written into a reply."""

import base64
from typing import Any, Literal

import numpy as np

from serve.protocol.errors import Failure
from serve.protocol.schema import VectorType

Encoding = Literal["float", "base64"]


def embedding_object(
    index: int, vector: np.ndarray | Failure, dimensions: int | None, dtype: VectorType, encoding: Encoding
) -> dict[str, Any]:
    """One element of `data`."""
    if isinstance(vector, Failure):
        return {"object": "embedding", "index": index, "embedding": None, "error": vector.body()}
    numbers = with_numbers(shortened(vector, dimensions), dtype)
    embedding = base64.b64encode(numbers.tobytes()).decode() if encoding == "base64" else numbers.tolist()
    return {"object": "embedding", "index": index, "embedding": embedding}


def shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first `dimensions` numbers, of unit norm again; little-endian float32."""
    vector = vector[:dimensions]
    return (vector / np.linalg.norm(vector)).astype("<f4") if dimensions else vector.astype("<f4")


def with_numbers(vector: np.ndarray, dtype: VectorType) -> np.ndarray:
    """A vector [D] in numbers of a smaller type.

    int8: its largest number is 127, which leaves cosines as they are; uint8: 128 more. ubinary: the signs, eight in a
    byte, the first one in the highest bit; binary: 128 less, as Cohere and sentence-transformers have it.
    """
    if dtype == "float":
        return vector
    if dtype in ("binary", "ubinary"):
        packed = np.packbits(vector > 0)
        return packed if dtype == "ubinary" else (packed.astype(np.int16) - 128).astype(np.int8)
    levels = np.rint(127 * vector / np.abs(vector).max()).astype(np.int16)
    return levels.astype(np.int8) if dtype == "int8" else (levels + 128).astype(np.uint8)
