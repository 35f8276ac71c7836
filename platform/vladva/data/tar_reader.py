"""One WebDataset tar -> its samples, with the position of each image, and what is wrong with the others.

Members `KEY.jpg` (or another ending of an image), `KEY.txt` and `KEY.json` are one sample, in any order. Captions come
from "captions" or "caption" in the JSON, then from the text; "negatives" in the JSON are captions that are wrong for
the sample on purpose. A sample without an image is one of text alone where the JSON has a "text" instead of the image.

KEY may have dots: a member is cut before the last ending that is known. `KEY.depth.png` beside a sample KEY, without
a caption of its own, is one of the further members that WebDataset allows, and is counted.
Nothing in a shard is trusted: every member is in a sample, in the list of the quarantined or in the notes.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

from vladva.core.errors import InvalidSampleError
from vladva.core.images import IMAGES, check_image
from vladva.core.text import clean_captions, clean_text, decode_text
from vladva.data.tar_members import TarMember, split_name, tar_members

ROLES = dict.fromkeys(IMAGES, "image") | {"txt": "txt", "json": "json"}  # ending of a member -> what it is to a sample


class Quarantined(NamedTuple):
    """A sample (or a whole shard) that is not used; a shard's id is its path, a sample's `SHARD#KEY`."""

    id: str
    reason: str
    detail: str


class ShardContent(NamedTuple):
    """What is in a tar: good samples in the order of their images, the rest, and how often what was passed over."""

    samples: list[Sample]
    quarantined: list[Quarantined]
    notes: Counter[str]


class ImageMember(NamedTuple):
    """Where an image is in its shard (bytes), its size (pixels, upright), and a checksum of its bytes.

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
    image: ImageMember | None = None
    captions: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    text: ImageMember | None = None  # the JSON, if it can stand for an image
    seen: set[str] = field(default_factory=set)  # "image", "txt", "json"
    problem: InvalidSampleError | None = None

    @property
    def offset(self) -> int:
        """Where the image (or what stands for it) begins."""
        assert self.image
        return self.image.offset

    def add(self, role: str, offset: int, data: bytes, notes: Counter[str], *, verify: bool, max_pixels: int) -> None:
        """Take one member's content. Raises InvalidSampleError."""
        if role == "image":
            self.image = ImageMember(offset, len(data), 0, 0, zlib.crc32(data))
            width, height, note = check_image(data, verify=verify, max_pixels=max_pixels)
            if note:
                notes[note] += 1
            self.image = self.image._replace(width=width, height=height)
        elif role == "txt":
            self.captions += clean_captions([decode_text(data)], notes)
        else:
            captions, self.negatives, text = read_description(data, notes)
            self.captions += captions
            self.text = ImageMember(offset, len(data), 0, 0, zlib.crc32(data)) if text else None


def read_tar(file: IO[bytes], shard: str, *, verify: bool, max_pixels: int) -> ShardContent:
    """What is in a tar. `verify` decodes every image; without it only the headers are read.

    Of a tar that is cut off or damaged, the samples before the damage are kept.
    """
    samples: dict[str, Sample] = {}
    content = ShardContent([], [], Counter())
    try:
        for member in tar_members(file):
            key, ending = split_name(member.name)
            role = ROLES.get(ending)
            if role is None:
                content.notes[f"member not used: {f'*.{ending}' if ending else 'without an ending, or hidden'}"] += 1
                continue
            sample = samples.setdefault(key, Sample(key))
            if role in sample.seen:  # captions of a second sample with this key go the way of its image
                detail = f"again at byte {member.offset}; the first {role} with this key is kept"
                if role == "image":
                    content.quarantined.append(Quarantined(f"{shard}#{key}", "duplicate key", detail))
                else:
                    content.notes[f"member not used: a second {role} of a sample"] += 1
                continue
            sample.seen.add(role)
            try:
                data = _read(file, member)
                sample.add(role, member.offset, data, content.notes, verify=verify, max_pixels=max_pixels)
            except InvalidSampleError as problem:
                if problem.reason == "truncated tar":
                    raise
                sample.problem = sample.problem or problem
    except InvalidSampleError as problem:
        content.quarantined.append(Quarantined(shard, problem.reason, problem.detail))

    for sample in samples.values():
        _sort_in(sample, samples, shard, content)
    content.samples.sort(key=lambda sample: (sample.offset, sample.key))
    return content


def _sort_in(sample: Sample, samples: dict[str, Sample], shard: str, content: ShardContent) -> None:
    """Put a sample among the good ones, the quarantined or the notes."""
    sample.captions = list(dict.fromkeys(sample.captions))
    folder, slash, base = sample.key.rpartition("/")
    parent = samples.get(folder + slash + base.partition(".")[0])
    if parent is not None and parent is not sample and not {"image"} < sample.seen and "image" in parent.seen:
        content.notes[f"member not used: a further one of a sample, *.{base.partition('.')[2]}.*"] += 1
        return
    sample.image = sample.image or sample.text
    problem = sample.problem or _incomplete(sample)
    if problem:
        content.quarantined.append(Quarantined(f"{shard}#{sample.key}", problem.reason, problem.detail))
    else:
        content.samples.append(sample)


def _incomplete(sample: Sample) -> InvalidSampleError | None:
    if sample.image is None:
        detail = f'there is no member with the ending {", ".join(IMAGES)}, and no "text" in a JSON instead of it'
        return InvalidSampleError("no image", detail)
    return None if sample.captions else InvalidSampleError("no caption")


# --- its members -----------------------------------------------------------------------------------------------------


def _read(file: IO[bytes], member: TarMember) -> bytes:
    if member.problem:
        raise InvalidSampleError("not a file", f"{member.name} is {member.problem}")
    file.seek(member.offset)
    data = file.read(member.length)
    if len(data) != member.length:
        raise InvalidSampleError("truncated tar", f"it ends inside {member.name}; the samples before it are kept")
    return data


def read_description(data: bytes, notes: Counter[str]) -> tuple[list[str], list[str], str | None]:
    """Captions, hard-negative captions and text in the content of a `json` member. Raises InvalidSampleError."""
    try:
        content = json.loads(decode_text(data))
    except InvalidSampleError:
        raise
    except (ValueError, RecursionError) as error:
        raise InvalidSampleError("broken JSON", str(error)) from None
    content = content if isinstance(content, dict) else {}
    captions, caption, negatives = (_strings(content, name) for name in ("captions", "caption", "negatives"))
    # Not a problem where it is no text: it is another program's field then, beside an image.
    text = content.get("text")
    text = clean_text(text) if isinstance(text, str) else None
    return clean_captions(captions + caption, notes), clean_captions(negatives, notes), text or None


def _strings(content: dict[str, Any], column: str) -> list[str]:
    value = content.get(column)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise InvalidSampleError("caption is not text", f"{column} = {json.dumps(values)}")
    return values
