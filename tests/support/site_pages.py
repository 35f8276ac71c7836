"""The documentation's code blocks: files that a page shows, commands and Python that it tells to run.

Every fenced block says by its title what it is. None: it is run. A path: a file, which a test puts there. "Not run by
the tests: ...": the reason, which readers see as well, as the site shows titles.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = ROOT / ".docs" / "pages"
NOT_RUN = "Not run by the tests: "
FENCE = re.compile(r"^( *)```(\w*)(?: title=\"([^\"]*)\")?[ ]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """A fenced block of a page: its language, its title, its text."""

    language: str
    title: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a Markdown file."""
    text = page.read_text()
    found = [Block(language, title, body) for _, language, title, body in FENCE.findall(text)]
    assert 2 * len(found) == len(re.findall(r"^ *```", text, re.MULTILINE)), f"{page}: a block is not closed"
    return found


def file_of_page(page: str, path: str) -> str:
    """The file `path` that a page of the site shows."""
    [text] = [block.text for block in blocks_of(PAGES / page) if block.title == path]
    return text
