"""Shard writer: samples -> WebDataset tars of a bounded number of samples."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping
from types import TracebackType

from vladva.core import storage


class ShardWriter:
    """Writes samples as WebDataset tars `000000.tar`, `000001.tar`, ... in the folder `uri`.

    with ShardWriter("s3://bucket/train", samples_per_shard=1000) as shards:
        shards.write("000017", {"jpg": image, "json": b'{"captions": ["a red circle"]}'})

    The bytes depend on the samples only. A shard appears when it is complete; after an exception the last one does not.
    """

    def __init__(self, uri: str, samples_per_shard: int) -> None:
        self.uri = uri
        self.samples_per_shard = samples_per_shard
        self.num_shards = 0
        self._start()

    def __enter__(self) -> ShardWriter:
        return self

    def write(self, key: str, members: Mapping[str, bytes]) -> None:
        """Add a sample: ending -> content. Raises ValueError for a key that would not come back as it is."""
        if "." in key.rpartition("/")[2] or not key:
            raise ValueError(f"key {key!r}: WebDataset cuts names at the first dot; use a key without one")
        for ending, content in members.items():
            header = tarfile.TarInfo(f"{key}.{ending}")  # time, owner and rights are constants
            header.size = len(content)
            self._tar.addfile(header, io.BytesIO(content))
        self._in_shard += 1
        if self._in_shard == self.samples_per_shard:
            self._finish()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if kind is None and self._in_shard:
            self._finish()

    def _start(self) -> None:
        self._in_shard = 0
        self._body = io.BytesIO()
        self._tar = tarfile.open(fileobj=self._body, mode="w", encoding="utf-8")  # noqa: SIM115 (_finish closes it)

    def _finish(self) -> None:
        self._tar.close()
        storage.write_bytes_atomically(storage.join(self.uri, f"{self.num_shards:06d}.tar"), self._body.getvalue())
        self.num_shards += 1
        self._start()
