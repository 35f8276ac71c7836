"""Shard tasks: the samples meant for one output shard, and the results: what became of them.

    _prepare/lots/000000.parquet --one Ray task--> 000000.tar, and last _prepare/receipts/000000.parquet

A result has a row per sample of the task: its key in the shard with the checksum of its image, or why it was refused.
A task with a result is not done again. What a shard holds follows from its task and the images alone.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple, TypedDict

import pyarrow as pa
import pyarrow.parquet as pq

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.images import MAX_PIXELS, check_image, image_suffix
from vladva.core.storage import RangedFile
from vladva.core.text import clean_captions
from vladva.data.caption_files import read_caption_files
from vladva.data.image_refs import fetch_images
from vladva.data.sidecar import parquet_bytes, sidecar_uri
from vladva.data.source import Entry
from vladva.data.tar_members import split_name, tar_members

TASK_SCHEMA = pa.schema(  # with the names that earlier versions gave the columns
    [
        ("number", pa.int64()),
        *[(name, pa.string()) for name in ("id", "place", "file", "column", "beside")],
        *[(name, pa.int64()) for name in ("offset", "length")],
        *[(name, pa.list_(pa.string())) for name in ("captions", "negatives")],
    ]
)
RESULT_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "id", "place")]
    + [("crc32", pa.int64()), ("reason", pa.string()), ("detail", pa.string())]
)
BETWEEN_FILES = "\0"  # of `beside`: no file's name has it


class TaskSample(NamedTuple):
    """A sample that is to be written, and its number in the whole output."""

    number: int
    entry: Entry


class ResultRow(TypedDict):
    """What became of a sample; `place` is its location in the source. Exactly one of crc32 and reason is not null."""

    key: str
    id: str
    place: str
    crc32: int | None
    reason: str | None
    detail: str | None


class ShardResult(TypedDict):
    """The facts about a task that is done, as in the metadata of its result ("stamp", "lot": task files' old words)."""

    stamp: str  # hash of the plan's configuration
    lot: int  # number of the task
    bytes: int  # of the shard; 0 where none of the samples is good, and there is no shard
    samples: int
    rejected: list[list[str]]  # fields of `Rejected`
    notes: dict[str, int]  # what was done to captions, and how often
    written: bool  # in this run


class ShardCheck(TypedDict):
    """What `verify_shard` found: samples that the scan refused; keys that are lost, too many or have other bytes."""

    lot: int
    rejected: list[list[str]]
    wrong: list[str]


def task_uri(out_uri: str, number: int) -> str:
    """The task of shard `number`."""
    return storage.join(out_uri, "_prepare/lots", f"{number:06d}.parquet")


def result_uri(out_uri: str, number: int) -> str:
    """The result of shard `number`."""
    return storage.join(out_uri, "_prepare/receipts", f"{number:06d}.parquet")


def shard_name(number: int) -> str:
    """Shard `number`, as ShardWriter names it."""
    return f"{number:06d}.tar"


def write_task(out_uri: str, number: int, samples: Sequence[TaskSample]) -> None:
    """Write a task where `ShardTask` looks for it."""
    rows = [
        {
            "number": sample.number,
            "id": sample.entry.id,
            "place": sample.entry.source_location,
            "file": sample.entry.file,
            "column": sample.entry.column,
            "beside": BETWEEN_FILES.join(sample.entry.caption_files),
            "offset": sample.entry.offset,
            "length": sample.entry.length,
            "captions": list(sample.entry.captions),
            "negatives": list(sample.entry.hard_negatives),
        }
        for sample in samples
    ]
    storage.write_bytes_atomically(task_uri(out_uri, number), parquet_bytes(pa.Table.from_pylist(rows, TASK_SCHEMA)))


def read_task(out_uri: str, number: int) -> list[TaskSample]:
    """The samples of a task."""
    return [
        TaskSample(
            row["number"],
            Entry(
                id=row["id"],
                source_location=row["place"],
                file=row["file"],
                captions=row["captions"],
                offset=row["offset"],
                length=row["length"],
                column=row["column"],
                caption_files=row["beside"].split(BETWEEN_FILES) if row["beside"] else (),
                hard_negatives=row["negatives"],
            ),
        )
        for row in pq.read_table(RangedFile(task_uri(out_uri, number))).to_pylist()
    ]


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShardTask:
    """Ray Data stage: the number of a shard -> the shard and its result, unless both are there."""

    out_uri: str
    images_uri: str
    config_hash: str  # of the plan that the tasks belong to

    def __call__(self, number: int) -> ShardResult:
        return self._known(number) or self.write_shard(number)

    def write_shard(self, number: int) -> ShardResult:
        """Write the shard, then its result."""
        samples = read_task(self.out_uri, number)
        refs = [sample.entry.image_ref(self.images_uri) for sample in samples]
        images = fetch_images(refs, folder_uri=self.images_uri)
        notes: Counter[str] = Counter()
        content, rows = build_shard(samples, images, self.images_uri, notes)
        shard_uri = storage.join(self.out_uri, shard_name(number))
        if content:
            storage.write_bytes_atomically(shard_uri, content)
        elif storage.exists(shard_uri):
            storage.delete_file(shard_uri)
        rejected = [[row["id"], row["place"], row["reason"], row["detail"]] for row in rows if row["reason"]]
        facts = {"stamp": self.config_hash, "bytes": len(content), "lot": number, "samples": len(rows)}
        table = pa.Table.from_pylist(list(map(dict, rows)), RESULT_SCHEMA)
        told = {**facts, "rejected": rejected, "notes": dict(notes)}
        storage.write_bytes_atomically(result_uri(self.out_uri, number), parquet_bytes(table, told))
        return {**told, "written": True}  # type: ignore[typeddict-item]

    def _known(self, number: int) -> ShardResult | None:
        """What the result says, if it is one of this plan and the shard is what it says."""
        try:
            result = pq.ParquetFile(RangedFile(result_uri(self.out_uri, number)))
            facts: ShardResult = json.loads(result.schema_arrow.metadata[b"vladva"])
            size = RangedFile(storage.join(self.out_uri, shard_name(number))).size if facts["bytes"] else 0
        except FileNotFoundError:
            return None
        if (facts["stamp"], facts["bytes"]) != (self.config_hash, size):
            return None
        return {**facts, "notes": facts.get("notes", {}), "written": False}  # earlier versions noted nothing


def build_shard(
    samples: Sequence[TaskSample],
    images: Sequence[bytes | InvalidSampleError],
    images_uri: str,
    notes: Counter[str],
) -> tuple[bytes, list[ResultRow]]:
    """The tar of a task (no bytes where nothing of it is good) and the rows of its result, one a sample.

    Images go into it as they are. Of an image the header is read here; the scan that follows decodes it. What is
    done to captions is added to `notes`.
    """
    body = io.BytesIO()
    rows = []
    with tarfile.open(fileobj=body, mode="w", encoding="utf-8") as tar:
        for sample, image in zip(samples, images, strict=True):
            key, entry = f"{sample.number:09d}", sample.entry
            row = ResultRow(key=key, id=entry.id, place=entry.source_location, crc32=None, reason=None, detail=None)
            try:
                captions = clean_captions([*read_caption_files(images_uri, entry), *entry.captions], notes)
                if isinstance(image, InvalidSampleError):
                    raise image
                check_image(image, verify=False, max_pixels=MAX_PIXELS)
                if not captions:
                    raise InvalidSampleError("no caption")
                content = json.dumps(_description(entry, captions), ensure_ascii=False, sort_keys=True).encode()
                for suffix, data in ((image_suffix(image), image), ("json", content)):
                    header = tarfile.TarInfo(f"{key}.{suffix}")  # time, owner and rights are constants
                    header.size = len(data)
                    tar.addfile(header, io.BytesIO(data))
                row["crc32"] = zlib.crc32(image)
            except InvalidSampleError as problem:
                row["reason"], row["detail"] = problem.reason, problem.detail
            rows.append(row)
    return (body.getvalue() if any(row["reason"] is None for row in rows) else b""), rows


def _description(entry: Entry, captions: list[str]) -> dict[str, Any]:
    """The JSON of a sample."""
    source = {"id": entry.id, "place": entry.source_location}
    if not entry.column:  # not the path of a table: a source that was moved gives the same bytes
        source["file"] = entry.file
    negatives = {"negatives": list(entry.hard_negatives)} if entry.hard_negatives else {}
    return {"captions": captions, **negatives, "source": source}


# --- checking --------------------------------------------------------------------------------------------------------


def verify_shard(out_uri: str, index_uri: str, number: int) -> ShardCheck:
    """Compare what the scan found in a shard, and the shard itself where need be, with the task's result."""
    shard = shard_name(number)
    result = pq.read_table(RangedFile(result_uri(out_uri, number))).to_pylist()
    written = {row["key"]: row for row in result if row["reason"] is None}
    if not written:
        return {"lot": number, "rejected": [], "wrong": []}
    sidecar = pq.ParquetFile(RangedFile(sidecar_uri(index_uri, shard)))
    facts = json.loads(sidecar.schema_arrow.metadata[b"vladva"])
    rejected = {name.removeprefix(f"{shard}#"): [reason, detail] for name, reason, detail in facts["quarantined"]}
    indexed = sidecar.read(["key", "crc32"]).to_pydict()
    found = dict(zip(indexed["key"], indexed["crc32"], strict=True))
    if rejected:  # of these the scan keeps no checksum: was the image bad, or is it the shard?
        found |= image_checksums(storage.join(out_uri, shard), rejected.keys())
    expected = {key: row["crc32"] for key, row in written.items()}
    wrong = sorted(key for key in expected.keys() | found.keys() if found.get(key) != expected.get(key))
    named = [[written[key]["id"], written[key]["place"], *why] for key, why in rejected.items() if key in written]
    return {"lot": number, "rejected": named, "wrong": wrong}


def image_checksums(shard_uri: str, keys: Collection[str]) -> dict[str, int]:
    """Key -> CRC-32 of its image, of those keys that the tar holds."""
    found = {}
    with (
        storage.open_stream(shard_uri) as file,
        suppress(InvalidSampleError),
    ):  # what is not found is said to be missing
        for member in tar_members(file):
            key, suffix = split_name(member.name)
            if key in keys and suffix != "json":
                file.seek(member.offset)
                found[key] = zlib.crc32(file.read(member.length))
    return found
