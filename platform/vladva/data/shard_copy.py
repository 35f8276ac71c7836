"""Shard copy: a tar of samples, member by member as it was, with more in the JSON of some samples."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping, Sequence

from vladva.core import storage
from vladva.core.errors import InvalidSampleError
from vladva.core.text import decode_text
from vladva.data.tar_members import split_name, tar_members

Additions = Mapping[str, Sequence[str]]
"""Field of a sample's JSON -> the texts that come after those that it has: `negatives`, `captions`."""


def copy_shard(uri: str, out_uri: str, additions: Mapping[str, Additions]) -> int:
    """Write the shard at `uri` to `out_uri`, with the additions to the JSON of samples, by their keys.

    Everything else is copied byte for byte, in its order; of a tar that is damaged what comes before the damage.
    Returns how many members are no files, or cannot be read, and so are in no copy.
    """
    body = io.BytesIO()
    wanted = {key: each for key, each in additions.items() if any(each.values())}
    left_out = 0
    with storage.open_stream(uri) as file, tarfile.open(fileobj=body, mode="w", encoding="utf-8") as tar:
        try:
            for member in tar_members(file):
                file.seek(member.offset)
                content = b"" if member.problem else file.read(member.length)
                if member.problem or len(content) != member.length:
                    left_out += 1
                    continue
                key, ending = split_name(member.name)
                if ending == "json" and key in wanted:
                    content = with_additions(content, wanted.pop(key))
                _add(tar, member.name, content)
        except InvalidSampleError:
            left_out += 1
        for key, each in wanted.items():  # samples that have no JSON
            _add(tar, f"{key}.json", with_additions(b"{}", each))
    storage.write_bytes_atomically(out_uri, body.getvalue())
    return left_out


def with_additions(description: bytes, additions: Additions) -> bytes:
    """A sample's JSON with more texts in some of its lists, each text once."""
    content = json.loads(decode_text(description))
    for field, texts in additions.items():
        before = content.get(field) or []
        before = before if isinstance(before, list) else [before]
        content[field] = list(dict.fromkeys([*before, *texts]))
    return json.dumps(content, ensure_ascii=False).encode()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    header = tarfile.TarInfo(name)  # time, owner and rights are constants
    header.size = len(content)
    tar.addfile(header, io.BytesIO(content))
