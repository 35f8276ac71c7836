"""The corpus of emoji: which are used, which are held out, and the tables of both.

    pictures of the training vendors, of four fifths of the emoji    train.parquet
    ... of a vendor held out, of emoji that training has seen        seen-VENDOR.parquet
    ... of each vendor, of emoji that training has not seen          unseen-VENDOR.parquet

All tables to test on are of as many images, so chance is the same in each. Emoji of one motif are held out together:
the woman who runs, the man, and the runner; the pilots and the aeroplane that is a part of their sequence.
"""

from __future__ import annotations

import io
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from vladva.core import storage
from vladva.data.emoji.package import code_points

COMPONENTS, FLAGS = (None, 2), 9  # groups of emojibase-data: letters of flags, skin and hair; flags
# Man, woman, person; female, male; joiner; arrow to the right: what is no motif.
NO_MOTIF = {"1f468", "1f469", "1f9d1", "2640", "2642", "200d", "27a1"}
TABLE_GROUP = 512  # rows that are read at a time


class Emoji(NamedTuple):
    """An emoji with its CLDR name and keywords."""

    code: str
    label: str
    keywords: tuple[str, ...]

    @property
    def motif(self) -> str:
        """Its code points without who it is and where that one looks."""
        return "-".join(point for point in self.code.split("-") if point not in NO_MOTIF)

    @property
    def captions(self) -> list[str]:
        """What training reads: the name, and the name with the keywords."""
        return [self.label, *([f"{self.label}: {', '.join(self.keywords)}"] if self.keywords else [])]


class EmojiCorpus(NamedTuple):
    """The emoji to train on, those held out, as many of the first for a held-out vendor, and what is left out, why."""

    train: list[Emoji]
    unseen: list[Emoji]
    seen: list[Emoji]
    left_out: Counter[str]


def choose_emoji(
    names: Sequence[Mapping[str, Any]], pictures: Mapping[str, Mapping[str, bytes]], share: float
) -> EmojiCorpus:
    """The corpus of the emoji that every vendor has a picture of; the order and the split are those of a hash.

    Raises ValueError for a `share` that leaves nothing to train on or to test on.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"--held-out is {share}; it must be above 0, and at most 0.5")
    left_out: Counter[str] = Counter()
    used = []
    for name in names:
        code = code_points(name["hexcode"])
        left_out["variants of skin tone, whose captions differ in the tone alone"] += len(name.get("skins", ()))
        lacking = [vendor for vendor, of in pictures.items() if code not in of]
        if name.get("group") in COMPONENTS:
            left_out["components: letters of flags, tones of skin, hair"] += 1
        elif name["group"] == FLAGS:
            left_out["flags, whose captions are names of countries"] += 1
        elif lacking:
            left_out[f"without a picture of {', '.join(lacking)}"] += 1
        else:
            used.append(Emoji(code, name["label"], tuple(name.get("tags", ()))))
    alike = _alike(used, pictures)
    left_out["with the picture of another emoji, at one vendor or more"] = len(alike)
    motifs = defaultdict(list)
    for emoji in used:
        if emoji.code not in alike:
            motifs[emoji.motif].append(emoji)
    count = sum(map(len, motifs.values()))
    train: list[Emoji] = []
    unseen: list[Emoji] = []
    for motif in sorted(motifs, key=_hash):
        (unseen if len(unseen) < share * count else train).extend(motifs[motif])
    if not train or not unseen:
        raise ValueError(
            f"--held-out {share} of {count} emoji leaves {len(train)} to train on, {len(unseen)} to test on"
        )
    train.sort(key=lambda emoji: _hash(emoji.code))
    return EmojiCorpus(train, unseen, train[: len(unseen)], +left_out)


def write_tables(
    uri: str, corpus: EmojiCorpus, pictures: Mapping[str, Mapping[str, bytes]], held_out_vendors: Sequence[str]
) -> dict[str, int]:
    """Write the tables under `uri`; name -> rows. Those to test on have the name of the emoji as their one caption."""
    trained = [vendor for vendor in pictures if vendor not in held_out_vendors]
    train = [(vendor, emoji, emoji.captions) for vendor in trained for emoji in corpus.train]
    train.sort(key=lambda row: _hash(f"{row[0]}/{row[1].code}"))
    tables = {"train": train}
    for vendor in held_out_vendors:
        tables[f"seen-{vendor}"] = [(vendor, emoji, [emoji.label]) for emoji in corpus.seen]
    for vendor in pictures:
        tables[f"unseen-{vendor}"] = [(vendor, emoji, [emoji.label]) for emoji in corpus.unseen]
    for name, rows in tables.items():
        content = [
            {"id": f"{vendor}/{emoji.code}", "image": pictures[vendor][emoji.code], "captions": captions}
            for vendor, emoji, captions in rows
        ]
        storage.write_bytes_atomically(storage.join(uri, f"{name}.parquet"), _parquet(content))
    return {name: len(rows) for name, rows in tables.items()}


def _alike(used: Sequence[Emoji], pictures: Mapping[str, Mapping[str, bytes]]) -> set[str]:
    """Codes of the emoji that share a picture, byte by byte, with another one at some vendor."""
    found = set()
    for of in pictures.values():
        codes = defaultdict(list)
        for emoji in used:
            codes[of[emoji.code]].append(emoji.code)
        found |= {code for same in codes.values() if len(same) > 1 for code in same}
    return found


def _hash(text: str) -> bytes:
    return sha256(text.encode()).digest()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"id": pa.string(), "image": pa.binary(), "captions": pa.list_(pa.string())})
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema), file, row_group_size=TABLE_GROUP)
    return file.getvalue()
