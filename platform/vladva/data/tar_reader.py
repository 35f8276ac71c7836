"""One WebDataset tar -> its samples, with the position of each image, and what is wrong with the others.

Members `KEY.jpg` (or another ending of an image), `KEY.txt` and `KEY.json` are one sample, in any order. Captions come
from "captions" or "caption" in the JSON, then from the text; "negatives" in the JSON are captions that are wrong for
the sample on purpose. A sample without an image is one of text alone where the JSON has a "text" instead of the image.

What the two sides of a pair are where they are more than an image and a caption, `pair_items.py` reads.

KEY may have dots: a member is cut before the last ending that is known. `KEY.depth.png` beside a sample KEY, without
a caption of its own, is one of the further members that WebDataset allows, and is counted.
Nothing in a shard is trusted: every member is in a sample, in the list of the quarantined or in the notes.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import IO, Any, NamedTuple

from vladva.core.errors import InvalidSampleError
from vladva.core.images import IMAGES, check_image
from vladva.core.text import clean_captions, clean_text, decode_text
from vladva.data.pair_items import ImageMember, PairItems, WrittenPair, read_pair
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


@dataclass
class Sample:
    """What has been read of one key."""

    key: str
    image: ImageMember | None = None
    captions: list[str] = field(default_factory=list)
    negatives: list[str] = field(default_factory=list)
    text: ImageMember | None = None  # the JSON, if it can stand for an image
    pair: PairItems | None = None
    written: WrittenPair | None = None  # what the JSON says of the pair
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
            captions, self.negatives, text, self.written = read_description(data, notes)
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

    positives = {id(found) for sample in samples.values() if (found := _positive_of(sample, samples)) is not None}
    for sample in samples.values():
        if id(sample) not in positives or sample.seen != {"image"}:  # else it is part of another
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
    problem = sample.problem or _pair_problem(sample, samples, content.notes) or _incomplete(sample)
    if problem:
        content.quarantined.append(Quarantined(f"{shard}#{sample.key}", problem.reason, problem.detail))
    else:
        content.samples.append(sample)


def _positive_of(sample: Sample, samples: Mapping[str, Sample]) -> Sample | None:
    """What holds the image that a sample names as its positive; None where it names none that is there."""
    if sample.written is None or not sample.written.image:
        return None
    key, ending = split_name(f"{sample.key}.{sample.written.image}")
    found = samples.get(key)
    return found if found is not None and ROLES.get(ending) == "image" and "image" in found.seen else None


def _pair_problem(sample: Sample, samples: Mapping[str, Sample], notes: Counter[str]) -> InvalidSampleError | None:
    """Give the sample its pair; why there is none, where its JSON asks for one."""
    if sample.written is None:
        return None
    notes["sample with a query or a positive of its own"] += 1
    sample.pair, name = sample.written
    if sample.image is sample.text and sample.pair.query_text:
        return InvalidSampleError("two texts in a query", 'a sample without an image has a "text", and "query" another')
    if name:
        found = _positive_of(sample, samples)
        member = f"{sample.key}.{name}"
        if found is None or found is sample:
            told = "is the image of the sample itself" if found else "is not in the shard, or is no image"
            return InvalidSampleError("no positive", f"{member} {told}")
        if found.problem or found.image is None:
            return InvalidSampleError("no positive", f"{member}: {found.problem}")
        sample.pair = replace(sample.pair, positive=found.image)
    elif sample.pair.positive_text:
        sample.captions = list(dict.fromkeys([sample.pair.positive_text, *sample.captions]))
    return None


def _incomplete(sample: Sample) -> InvalidSampleError | None:
    if sample.image is None:
        detail = f'there is no member with the ending {", ".join(IMAGES)}, and no "text" in a JSON instead of it'
        return InvalidSampleError("no image", detail)
    has_positive = sample.captions or (sample.pair is not None and sample.pair.positive is not None)
    return None if has_positive else InvalidSampleError("no caption")


# --- its members -----------------------------------------------------------------------------------------------------


def _read(file: IO[bytes], member: TarMember) -> bytes:
    if member.problem:
        raise InvalidSampleError("not a file", f"{member.name} is {member.problem}")
    file.seek(member.offset)
    data = file.read(member.length)
    if len(data) != member.length:
        raise InvalidSampleError("truncated tar", f"it ends inside {member.name}; the samples before it are kept")
    return data


def read_description(data: bytes, notes: Counter[str]) -> tuple[list[str], list[str], str | None, WrittenPair | None]:
    """Captions, hard-negative captions, text and pair in the content of a `json` member. Raises InvalidSampleError."""
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
    pair = read_pair(content)
    return clean_captions(captions + caption, notes), clean_captions(negatives, notes), text or None, pair


def _strings(content: dict[str, Any], column: str) -> list[str]:
    value = content.get(column)
    values = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in values):
        raise InvalidSampleError("caption is not text", f"{column} = {json.dumps(values)}")
    return values
