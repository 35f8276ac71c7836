"""Small shards, good and bad, and their scan without Ray."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from random import Random
from typing import Any

from PIL import Image

from vladva.data.shard_writer import ShardWriter
from vladva.data.sidecar import SCHEMA, ListedShard, Scanner, ShardFacts, scan_shard

Members = list[tuple[str, bytes]]


def image(kind: str = "PNG", size: tuple[int, int] = (12, 8), seed: int = 0, mode: str = "RGB") -> bytes:
    """An image of noise, as a file."""
    body = io.BytesIO()
    noise = Random(seed).randbytes(size[0] * size[1] * 4)
    Image.frombytes("RGBA", size, noise).convert(mode).save(body, kind)
    return body.getvalue()


def tar_of(members: Members) -> bytes:
    body = io.BytesIO()
    with tarfile.open(fileobj=body, mode="w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return body.getvalue()


def count_words(texts: list[str]) -> list[int]:
    return [len(text.split()) for text in texts]


def scanned(folder: Path, content: bytes, **options: Any) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Rows of the index of a shard with this content, and id -> reason of the rest."""
    (folder / "a.tar").write_bytes(content)
    table, quarantined, _ = scan_shard(str(folder), "a.tar", count_words, **options)
    assert table.schema == SCHEMA
    assert len({row.id for row in quarantined}) == len(quarantined)
    return table.to_pylist(), {row.id.removeprefix("a.tar"): row.reason for row in quarantined}


def write_shards(uri: str, num_samples: int, samples_per_shard: int, size: tuple[int, int] = (12, 8)) -> list[bytes]:
    images = [image(size=size, seed=number) for number in range(num_samples)]
    with ShardWriter(uri, samples_per_shard) as writer:
        for number, data in enumerate(images):
            meta = {"captions": [f"image {number}", f"this one has number {number} of {num_samples}"]}
            writer.write(f"{number:04d}", {"png": data, "json": json.dumps(meta).encode()})
    return images


def bomb(width: int, height: int) -> bytes:
    """A PNG of some bytes whose header claims this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1000))), (b"IEND", b"")]
    parts = [
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


JPEG = image("JPEG", (200, 200))
PNG = image("PNG", (60, 60))
WEBP = image("WEBP", (60, 60))
BAD_IMAGES = {
    "zero bytes": b"",
    "not an image": b"<html>404 not found</html>",
    "corrupt image": JPEG[: len(JPEG) // 2],
    "too many pixels": bomb(20_000, 20_000),
}
BAD_CAPTIONS = {
    "no caption": [],
    "caption is not UTF-8": [("txt", "grün".encode("latin-1"))],
    "caption is not text": [("json", b'{"caption": 7}')],
    "broken JSON": [("json", b'{"caption": "on')],
}


def run_here(scanner: Scanner, listed: list[ListedShard]) -> list[ShardFacts]:
    """The scan's tasks one after the other in this process."""
    return [json.loads(scanner(shard)["facts"]) for shard in listed]


def bad_corpus(folder: Path) -> tuple[set[str], dict[str, str]]:
    """Write 200 samples in 10 shards, 3% of the members bad; ids of the good, id -> reason of the bad."""
    random = Random(0)
    kinds = {**BAD_IMAGES, **dict.fromkeys(BAD_CAPTIONS, JPEG)}
    chosen = dict(zip(random.sample(range(200), len(kinds)), kinds, strict=True))
    good, bad = set(), {}
    for shard in range(10):
        members: Members = []
        for number in range(shard * 20, shard * 20 + 20):
            reason = chosen.get(number, "")
            captions = BAD_CAPTIONS.get(reason, [("txt", b"caption")])
            members += [(f"{number}.jpg", kinds.get(reason, JPEG)), *((f"{number}.{e}", c) for e, c in captions)]
            if reason:
                bad[f"{shard}.tar#{number}"] = reason
            else:
                good.add(f"{shard}.tar#{number}")
        (folder / f"{shard}.tar").write_bytes(tar_of(members))
    return good, bad
