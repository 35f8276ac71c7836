"""Batch files: what OpenAI's batch API keeps, in a folder or bucket: files, batches, and how they look in replies.

files/ID.json, files/ID.jsonl        what was uploaded, and what a batch wrote
batches/ID.json                      a batch: OpenAI's object
batches/ID/                          its embeddings table, from which an interrupted batch goes on
"""

import re
import time
import uuid
from typing import Any, Literal

from serve.protocol.errors import ApiError
from vladva.core import storage
from vladva.core.storage import join

Kind = Literal["file", "batch"]
ID = re.compile(r"(file|batch)-[0-9a-f]{32}")  # and so never a path to elsewhere
FOLDERS = {"file": "files", "batch": "batches"}
FINAL = ("completed", "failed", "cancelled", "expired")


class BatchFiles:
    """The files and batches in a folder. Every method reads or writes storage: call it in a thread."""

    def __init__(self, uri: str) -> None:
        self.uri = uri

    def new_id(self, kind: Kind) -> str:
        """An id that nobody has."""
        return f"{kind}-{uuid.uuid4().hex}"

    def place(self, name: str, suffix: str = ".json") -> str:
        """Where something is kept. Raises ApiError (404) for what is no id."""
        if not ID.fullmatch(name):
            raise missing(name)
        return join(self.uri, FOLDERS[name.partition("-")[0]], name + suffix)

    def write_file(self, content: bytes, filename: str, purpose: str) -> dict[str, Any]:
        """Keep a file; returns OpenAI's object."""
        about = {
            "id": self.new_id("file"),
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": filename,
            "purpose": purpose,
            "status": "processed",
        }
        storage.write_bytes_atomically(self.place(str(about["id"]), ".jsonl"), content)
        storage.write_json(self.place(str(about["id"])), about)
        return about

    def read_file(self, name: str) -> bytes:
        """The content of a file. Raises ApiError (404)."""
        self.read(name, "file")
        return storage.read_bytes(self.place(name, ".jsonl"))

    def delete_file(self, name: str) -> None:
        """Forget a file. Raises ApiError (404)."""
        self.read(name, "file")
        storage.delete_file(self.place(name))
        storage.delete_file(self.place(name, ".jsonl"))

    def read(self, name: str, kind: Kind) -> dict[str, Any]:
        """OpenAI's object of a file or batch. Raises ApiError (404)."""
        place = self.place(name)
        if not name.startswith(f"{kind}-") or not storage.exists(place):
            raise missing(name)
        found: dict[str, Any] = storage.read_json(place)
        return found

    def write_batch(self, batch: dict[str, Any], **changes: Any) -> dict[str, Any]:
        """Keep a batch with some fields changed; a new status is noted with the time."""
        batch = {**batch, **changes}
        if "status" in changes:
            batch[f"{changes['status']}_at"] = int(time.time())
        storage.write_json(self.place(batch["id"]), batch)
        return batch

    def listing(self, kind: Kind) -> list[dict[str, Any]]:
        """All files or batches, the newest first."""
        files = storage.list_files(join(self.uri, FOLDERS[kind]), ".json", recursive=False)
        found = [storage.read_json(file) for file in files]
        return sorted(found, key=lambda one: one["created_at"], reverse=True)


def new_batch(
    name: str, input_file: str, endpoint: str, window: str, metadata: dict[str, str] | None
) -> dict[str, Any]:
    """OpenAI's object of a batch that has just been asked for."""
    times = ("in_progress", "finalizing", "completed", "failed", "expired", "cancelling", "cancelled")
    return {
        "id": name,
        "object": "batch",
        "endpoint": endpoint,
        "errors": None,
        "input_file_id": input_file,
        "completion_window": window,
        "status": "validating",
        "output_file_id": None,
        "error_file_id": None,
        "created_at": int(time.time()),
        **{f"{one}_at": None for one in times},
        "expires_at": None,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": metadata,
    }


def missing(name: str) -> ApiError:
    """The refusal of an id that there is not."""
    return ApiError(404, f"there is no {name!r} here", "not_found", "id")
