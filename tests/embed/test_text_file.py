"""A text file is read in blocks, by tasks that know nothing of each other: the items are those of the whole file."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vladva.embed.corpus import _count_lines, text_items

LINES = st.lists(
    st.sampled_from(["", " ", "a", "a red circle", "grün", "\u2028x", "tab\there", "word " * 9]), max_size=30
)


@settings(max_examples=60, deadline=None)
@given(lines=LINES, ends=st.sampled_from(["\n", "\r\n", "\r"]), last=st.booleans(), block=st.integers(1, 40))
def test_blocks_give_what_the_whole_gives(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str], ends: str, last: bool, block: int
) -> None:
    path = tmp_path_factory.mktemp("text") / "texts.txt"
    text = ends.join(lines) + ends * last
    path.write_bytes(("\ufeff" + text).encode())
    uri, size = str(path), path.stat().st_size
    blocks = [(first, min(block, size - first)) for first in range(0, size, block)]
    items, number, expected = [], 0, 0
    for (first, length), (count, texts) in zip(blocks, _count_lines(uri, blocks), strict=True):
        items += text_items(uri, first, length, number)
        number += count
        expected += texts
    assert items == text_items(uri)
    assert len(items) == expected
    kept = [(i, line.strip("\u2028 \t\n")) for i, line in enumerate(lines) if line.strip("\u2028 \t\n")]
    assert [item["id"] for item in items] == [f"texts.txt#{i}" for i, _ in kept]
    assert [item["text"].strip() for item in items] == [text for _, text in kept]


def test_the_number_of_a_line_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(b"one\n\n\xff\xfe bad\nfour")
    assert [(item["id"], item["kind"]) for item in text_items(str(path), 0, 4) + text_items(str(path), 4, 20, 1)] == [
        ("texts.txt#0", "text"),
        ("texts.txt#2", "rejected"),
        ("texts.txt#3", "text"),
    ]
