"""Pair items: what a sample's JSON says of the two sides of its pair, where they are more than an image and a caption.

    {"query": {"text": "but in blue", "instruction": "Find the same with this change."},
     "positive": {"image": "positive.png", "text": "...", "instruction": "..."}}

The query is the sample's image (or its text) with these words, the positive another image of the sample, the member
`KEY.positive.png`, or words; each may have an instruction. What is left out is as ever: the image alone, a caption.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from vladva.core.errors import InvalidSampleError
from vladva.core.text import clean_text
from vladva.data.image_refs import ImageRef

FIELDS = {"query": {"text", "instruction"}, "positive": {"image", "text", "instruction"}}


class ImageMember(NamedTuple):
    """Where an image is in its shard (bytes), its size (pixels, upright), and a checksum of its bytes.

    For a sample of text alone: the same of its JSON, and 0 x 0 pixels.
    """

    offset: int
    length: int
    width: int
    height: int
    crc32: int


@dataclass(frozen=True)
class PairItems:
    """The words of both sides, and where the positive's image is; None for what a side does not have."""

    query_text: str | None = None
    query_instruction: str | None = None
    positive_text: str | None = None
    positive_instruction: str | None = None
    positive: ImageMember | None = None

    @classmethod
    def from_row(cls, row: dict[str, Any] | None) -> PairItems | None:
        """Those of a row of a sidecar; None where a pair is an image and a caption."""
        if row is None:
            return None
        member = row["positive"]
        return cls(**{**row, "positive": None if member is None else ImageMember(**member)})

    def to_row(self) -> dict[str, Any]:
        """What `from_row` takes."""
        return {**vars(self), "positive": None if self.positive is None else self.positive._asdict()}

    def positive_ref(self, sample_id: str, shard_uri: str) -> ImageRef | None:
        """Where the positive's image is, for `fetch_images`; None where it has none."""
        if self.positive is None:
            return None
        name = f"{sample_id}, its positive"
        return ImageRef(name, name, shard_uri, self.positive.offset, self.positive.length, "", self.positive.crc32)


class WrittenPair(NamedTuple):
    """What a JSON says: the words, and the ending of the member that holds the positive's image ("" for none)."""

    items: PairItems
    image: str


def read_pair(content: dict[str, Any]) -> WrittenPair | None:
    """The pair that a sample's JSON describes; None where it is an image and a caption. Raises InvalidSampleError.

    A `query` or `positive` that is no object is another program's field.
    """
    sides = {name: content[name] for name in FIELDS if isinstance(content.get(name), dict)}
    if not sides:
        return None
    found: dict[str, str | None] = {}
    for side, fields in sides.items():
        for name, value in fields.items():
            if name not in FIELDS[side]:
                known = ", ".join(sorted(FIELDS[side]))
                raise InvalidSampleError("unknown field of a pair", f"{side}.{name}; there are {known}")
            if not isinstance(value, str) or not clean_text(value):
                raise InvalidSampleError("a field of a pair is not text", f"{side}.{name} = {value!r}")
            found[f"{side}_{name}"] = clean_text(value)
    image = found.pop("positive_image", None) or ""
    return WrittenPair(PairItems(**found), image)  # type: ignore[arg-type]  # none of them is the image
