"""One WebDataset tar -> its samples, with the position of each image, and what is wrong with the others.

Members `KEY.jpg` (or jpeg, png, webp, gif), `KEY.txt` and `KEY.json` are one sample, in any order. Captions come from
"captions" or "caption" in the JSON, then from the text; "negatives" in the JSON are captions that are wrong for the
sample on purpose. A sample without an image is one of text alone where the JSON has a "text" in the image's stead.
Nothing in a shard is trusted: every sample is either returned or in the list of the quarantined, with a reason.
"""

from __future__ import annotations

import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vladva.core.errors import InvalidSampleError
from vladva.core.images import IMAGES, check_image

COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstandard"}


class Quarantined(NamedTuple):
    """A sample (or a whole shard) that is not used; a shard's id is its path, a sample's `SHARD#KEY`."""

    id: str
    reason: str
    detail: str


class Image(NamedTuple):
    """Where an image lies in its shard (bytes), its size (pixels), and a checksum of its bytes.

    For a sample of text alone: the same of its JSON, and 0 x 0 pixels.
    """

    offset: int
    length: int
    width: int
    height: int
    crc32: int


@dataclass
class Sample:
    """What has been read of one key."""

    key: str
    image: Image | None = None
    captions: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    text: Image | None = None  # the JSON, if it can stand for an image
    seen: set[str] = field(default_factory=set)  # "image", "txt", "json"
    problem: InvalidSampleError | None = None

    @property
    def offset(self) -> int:
        """Where the image (or what stands for it) begins."""
        assert self.image
        return self.image.offset

    def add(self, role: str, offset: int, data: bytes, *, verify: bool, max_pixels: int) -> None:
        """Take one member's content. Raises InvalidSampleError."""
        if role == "picture":
            self.image = Image(offset, len(data), 0, 0, zlib.crc32(data))
            width, height = check_image(data, verify=verify, max_pixels=max_pixels)
            self.image = self.image._replace(width=width, height=height)
        elif role == "txt":
            self.captions += read_captions(data)
        else:
            captions, self.negatives, text = read_json(data)
            self.captions += captions
            self.text = Image(offset, len(data), 0, 0, zlib.crc32(data)) if text else None


def read_tar(
    file: io.BufferedReader, shard: str, *, verify: bool, max_pixels: int
) -> tuple[list[Sample], list[Quarantined]]:
    """The good samples of a tar in the order of their images, and the rest.

    `verify` decodes every image; without it only the headers are read. Of a tar that is cut off or damaged, the
    samples before the damage are kept.
    """
    samples: dict[str, Sample] = {}
    quarantined: list[Quarantined] = []
    try:
        for name, offset, data in _members(file):
            key, kind = _split(name)
            sample = samples.setdefault(key, Sample(key))
            role = "picture" if kind in IMAGES else kind
            if role in sample.seen:  # captions of a second sample with this key go the way of its image
                if role == "picture":
                    detail = f"again at byte {offset}; the first one, at byte {sample.offset}, is kept"
                    quarantined.append(Quarantined(f"{shard}#{key}", "duplicate key", detail))
                continue
            sample.seen.add(role)
            try:
                sample.add(role, offset, data, verify=verify, max_pixels=max_pixels)
            except InvalidSampleError as problem:
                sample.problem = sample.problem or problem
    except InvalidSampleError as problem:
        quarantined.append(Quarantined(shard, problem.reason, problem.detail))

    good = []
    for sample in samples.values():
        sample.captions = list(dict.fromkeys(sample.captions))
        sample.image = sample.image or sample.text
        problem = sample.problem or _incomplete(sample)
        if problem:
            quarantined.append(Quarantined(f"{shard}#{sample.key}", problem.reason, problem.detail))
        else:
            good.append(sample)
    return sorted(good, key=lambda sample: sample.offset), quarantined


def _incomplete(sample: Sample) -> InvalidSampleError | None:
    if sample.image is None:
        detail = f'there is no member with the ending {", ".join(IMAGES)}, and no "text" in a JSON in its stead'
        return InvalidSampleError("no image", detail)
    return None if sample.captions else InvalidSampleError("no caption")


# --- the archive -----------------------------------------------------------------------------------------------------


def _members(file: io.BufferedReader) -> Iterator[tuple[str, int, bytes]]:
    """(name, offset of the content, content) of images and captions. Raises InvalidSampleError where the tar is bad."""
    start = file.read(6)
    for magic, compression in COMPRESSED.items():
        if start.startswith(magic):
            raise InvalidSampleError(
                "compressed tar", f"{compression}: unpack it, its members cannot be read by position"
            )
    if not start:
        raise InvalidSampleError("empty tar", "the file has zero bytes")
    file.seek(0)
    end = 0
    try:
        tar = tarfile.open(fileobj=file, mode="r:", encoding="utf-8")  # noqa: SIM115 (the caller closes the file)
        while member := tar.next():
            tar.members.clear()  # tarfile would keep every header in memory
            end = tar.offset
            name = _readable(member.name)
            if member.isreg() and _split(name)[1] in (*IMAGES, "txt", "json"):
                file.seek(member.offset_data)
                data = file.read(member.size)
                if len(data) != member.size:
                    raise InvalidSampleError("truncated tar", f"it ends inside {name}; the samples before it are kept")
                yield name, member.offset_data, data
    except tarfile.TarError as error:
        raise InvalidSampleError("truncated tar" if end else "not a tar", f"after byte {end}: {error}") from None
    if not end:
        raise InvalidSampleError("empty tar", "it has no members")
    # tarfile stops without a word at a damaged header, and where the file ends too early between two members.
    file.seek(tar.offset)
    block = file.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE:
        raise InvalidSampleError("truncated tar", "the mark at its end is missing; what is there is kept")
    if any(block):
        raise InvalidSampleError("damaged tar", f"no valid header at byte {tar.offset}; the samples before it are kept")


def _readable(name: str) -> str:
    """Bytes of a member's name that are not UTF-8 as escapes: ids must be text."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace").removeprefix("./")


def _split(name: str) -> tuple[str, str]:
    """Key and ending of a member, cut at the first dot of its last part; no ending for hidden files."""
    folder, slash, base = name.rpartition("/")
    stem, _, ending = base.partition(".")
    return folder + slash + stem, ending.lower() if stem else ""


# --- its members -----------------------------------------------------------------------------------------------------


def read_captions(data: bytes) -> list[str]:
    """The caption in the content of a `txt` member; none if it is empty. Raises InvalidSampleError."""
    return _stripped([_decoded(data)])


def read_json(data: bytes) -> tuple[list[str], list[str], str | None]:
    """Captions, hard-negative captions and text in the content of a `json` member. Raises InvalidSampleError."""
    try:
        content = json.loads(_decoded(data))
    except (ValueError, RecursionError) as error:
        raise InvalidSampleError("broken JSON", str(error)) from None
    content = content if isinstance(content, dict) else {}
    captions, caption, negatives = (_strings(content, name) for name in ("captions", "caption", "negatives"))
    # Not a problem where it is no text: it is another program's field then, beside an image.
    text = content.get("text")
    text = text.strip() if isinstance(text, str) else None
    return _stripped(captions + caption), _stripped(negatives), text or None


def _decoded(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeError as error:
        raise InvalidSampleError("caption is not UTF-8", str(error)) from None


def _strings(content: dict[str, Any], column: str) -> list[str]:
    value = content.get(column)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise InvalidSampleError("caption is not text", f"{column} = {json.dumps(values)}")
    return values


def _stripped(texts: list[str]) -> list[str]:
    """The texts without the space around them and without empty ones."""
    try:
        "".join(texts).encode()  # JSON can spell out halves of characters, which no UTF-8 has
    except UnicodeError as error:
        raise InvalidSampleError("caption is not UTF-8", str(error)) from None
    return [text.strip() for text in texts if text.strip()]
