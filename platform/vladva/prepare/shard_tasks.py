"""Lots: the samples meant for one output shard, and what became of them.

    _prepare/lots/000000.parquet --one Ray task--> 000000.tar, and last _prepare/receipts/000000.parquet

A receipt has a row per sample of the lot: its key in the shard with the checksum of its image, or why it was refused.
A lot with a receipt is not written again. What a shard holds follows from its lot and the images alone.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.images import MAX_PIXELS, check_image, image_suffix
from vladva.core.storage import RangedFile
from vladva.data.sidecar import parquet_bytes, sidecar_uri
from vladva.prepare.image_fetch import fetch, place_of, read_images
from vladva.prepare.sources import Rejected, clean, texts_of

LOT = pa.schema(
    [
        ("number", pa.int64()),
        *[(name, pa.string()) for name in ("id", "place", "file", "column", "beside")],
        *[(name, pa.int64()) for name in ("offset", "length")],
        *[(name, pa.list_(pa.string())) for name in ("captions", "negatives")],
    ]
)
RECEIPT = pa.schema(
    [(name, pa.string()) for name in ("key", "id", "place")]
    + [("crc32", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
)


def lot_uri(out_uri: str, number: int) -> str:
    """The lot of shard `number`."""
    return storage.join(out_uri, "_prepare/lots", f"{number:06d}.parquet")


def receipt_uri(out_uri: str, number: int) -> str:
    """The receipt of shard `number`."""
    return storage.join(out_uri, "_prepare/receipts", f"{number:06d}.parquet")


def shard_name(number: int) -> str:
    """Shard `number`, as ShardWriter names it."""
    return f"{number:06d}.tar"


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LotWriter:
    """Ray Data stage: a lot -> its shard and its receipt, unless both are there; and the refused samples."""

    out_uri: str
    images_uri: str
    stamp: str  # of the plan that the lots belong to

    def __call__(self, number: int) -> dict[str, Any]:
        shard_uri = storage.join(self.out_uri, shard_name(number))
        facts = self._known(number, shard_uri)
        if facts is None:
            samples = pq.read_table(RangedFile(lot_uri(self.out_uri, number))).to_pylist()
            content, rows = pack(samples, read_images(self.images_uri, samples), self.images_uri)
            if content:
                storage.write_bytes_atomically(shard_uri, content)
            elif storage.exists(shard_uri):
                storage.delete_file(shard_uri)
            facts = {"stamp": self.stamp, "bytes": len(content), "lot": number, "samples": len(rows)}
            facts["rejected"] = [[row[name] for name in Rejected._fields] for row in rows if row["reason"]]
            table = pa.Table.from_pylist(rows, RECEIPT)
            storage.write_bytes_atomically(receipt_uri(self.out_uri, number), parquet_bytes(table, facts))
            facts["written"] = True
        return facts

    def _known(self, number: int, shard_uri: str) -> dict[str, Any] | None:
        """What the receipt says, if it is one of this plan and the shard is what it says."""
        try:
            receipt = pq.ParquetFile(RangedFile(receipt_uri(self.out_uri, number)))
            facts = json.loads(receipt.schema_arrow.metadata[b"vladva"])
            size = RangedFile(shard_uri).size if facts["bytes"] else 0
        except FileNotFoundError:
            return None
        return facts | {"written": False} if (facts["stamp"], facts["bytes"]) == (self.stamp, size) else None


def pack(
    samples: list[dict[str, Any]], pictures: list[bytes | InvalidSampleError], images_uri: str
) -> tuple[bytes, list[dict[str, Any]]]:
    """The tar of a lot (no bytes where nothing of it is good) and the rows of its receipt, one a sample.

    Images go into it as they are. Of an image the header is read here; the scan that follows decodes it.
    """
    body = io.BytesIO()
    rows = []
    with tarfile.open(fileobj=body, mode="w", encoding="utf-8") as tar:
        for sample, image in zip(samples, pictures, strict=True):
            key = f"{sample['number']:09d}"
            row = {"key": key, "id": sample["id"], "place": sample["place"], "crc32": None, "reason": None}
            try:
                captions = captions_of(sample, images_uri)
                if isinstance(image, InvalidSampleError):
                    raise image
                check_image(image, verify=False, max_pixels=MAX_PIXELS)
                if not captions:
                    raise InvalidSampleError("no caption")
                about = {"captions": captions, **({"negatives": sample["negatives"]} if sample["negatives"] else {})}
                # Not the path of a table: a source that was moved gives the same bytes.
                named = ("id", "place") if sample["column"] else ("id", "place", "file")
                about["source"] = {name: sample[name] for name in named}
                content = json.dumps(about, ensure_ascii=False, sort_keys=True).encode()
                for ending, data in ((image_suffix(image), image), ("json", content)):
                    header = tarfile.TarInfo(f"{key}.{ending}")  # time, owner and rights are constants
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
                row["crc32"] = zlib.crc32(image)
            except InvalidSampleError as problem:
                row |= {"reason": problem.reason, "detail": problem.detail}
            rows.append(row)
    return (body.getvalue() if any(row["reason"] is None for row in rows) else b""), rows


def captions_of(sample: dict[str, Any], images_uri: str) -> list[str]:
    """The captions in the text file beside the image, then the others. Raises InvalidSampleError."""
    lines = []
    if sample["beside"]:
        content = fetch(lambda: storage.read_bytes(place_of(images_uri, sample["beside"])))
        if isinstance(content, InvalidSampleError):
            raise content
        (whole,) = texts_of(content.removeprefix(b"\xef\xbb\xbf")) or [""]
        lines = whole.splitlines()
    return clean([*lines, *sample["captions"]])


# --- checking --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LotChecker:
    """Ray Data stage: compares what the scan found in a shard, and the shard itself where need be, with the receipt.

    `rejected`: what the scan has put into quarantine, by its place in the source. `wrong`: the samples that are lost,
    are too many or have other bytes.
    """

    out_uri: str
    index_uri: str

    def __call__(self, number: int) -> dict[str, Any]:
        shard = shard_name(number)
        receipt = pq.read_table(RangedFile(receipt_uri(self.out_uri, number))).to_pylist()
        written = {row["key"]: row for row in receipt if row["reason"] is None}
        if not written:
            return {"lot": number, "rejected": [], "wrong": []}
        sidecar = pq.ParquetFile(RangedFile(sidecar_uri(self.index_uri, shard)))
        facts = json.loads(sidecar.schema_arrow.metadata[b"vladva"])
        rejected = {name.removeprefix(f"{shard}#"): [reason, detail] for name, reason, detail in facts["quarantined"]}
        indexed = sidecar.read(["key", "crc32"]).to_pydict()
        found = dict(zip(indexed["key"], indexed["crc32"], strict=True))
        if rejected:  # of these the scan keeps no checksum: was the image bad, or is it the shard?
            found |= checksums(storage.join(self.out_uri, shard), rejected.keys())
        expected = {key: row["crc32"] for key, row in written.items()}
        wrong = sorted(key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key))
        named = [[written[key]["id"], written[key]["place"], *why] for key, why in rejected.items() if key in written]
        return {"lot": number, "rejected": named, "wrong": wrong}


def checksums(shard_uri: str, keys: Collection[str]) -> dict[str, int]:
    """Key -> CRC-32 of its image, of those keys that the tar holds."""
    found = {}
    try:
        with tarfile.open(fileobj=storage.open_stream(shard_uri), mode="r:") as tar:
            for member in tar:
                key, _, ending = member.name.partition(".")
                if key in keys and ending != "json":
                    found[key] = zlib.crc32(tar.extractfile(member).read())  # type: ignore[union-attr]
    except tarfile.TarError:
        pass  # what has not been found is missing, and said to be
    return found
