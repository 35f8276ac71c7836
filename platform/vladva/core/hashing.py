"""Hashes: keys, numbers and digests that are the same for the same content, everywhere."""

from __future__ import annotations

import hashlib
import json
from typing import Any


def key_of(data: bytes) -> int:
    """A 63-bit hash: equal data, equal key."""
    import hashlib

    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def key_number(key: str, number: int) -> int:
    """A random number of 64 bits, the same for the same arguments."""
    return int.from_bytes(hashlib.blake2b(f"{key}/{number}".encode(), digest_size=8).digest(), "little")


def short_hash(content: Any) -> str:
    """16 hexadecimal digits that change when the content (anything that JSON can hold) does."""
    return hashlib.blake2b(json.dumps(content).encode(), digest_size=8).hexdigest()


def digest(*parts: str | bytes) -> bytes:
    """16 bytes that stand for the parts, in order."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()
