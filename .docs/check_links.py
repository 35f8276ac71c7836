"""Fetch every link of the documentation that leads to another host once, and list those that are dead.

    make links

Looks into all Markdown, CITATION.cff, and the sources of the benchmarks, which say where data comes from. Not among the
tests: they use no network. Exits with 1 where a link is dead or its host did not answer.
"""

from __future__ import annotations

import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ("*.md", "CITATION.cff", "pyproject.toml", "platform/vladva/benchmarks/*.py")
LINK = re.compile(r"https?://[\w.-]+(?::\d+)?[^\s\[\](){}<>\"'`|,;]*")
EXAMPLES = re.compile(r"https?://(\d+\.\d+\.\d+\.\d+|localhost|[^/]*\.example)(:\d+)?(/|$)")
TIMEOUT_S = 20
AGENT = {"User-Agent": "Mozilla/5.0 (link check of a documentation)"}
ANSWERS_OTHERWISE = {401, 403, 405, 429}  # the page is there, and wants a person or a pause


def links_of(texts: dict[str, str]) -> dict[str, list[str]]:
    """Link -> the files that have it; without those of examples and of this machine."""
    found: dict[str, list[str]] = {}
    for name, text in texts.items():
        for link in dict.fromkeys(each.rstrip(".:") for each in LINK.findall(text)):
            if not EXAMPLES.match(link):
                found.setdefault(link, []).append(name)
    return found


def what_is_wrong(link: str) -> str:
    """Empty where the link leads somewhere."""
    try:
        with urllib.request.urlopen(urllib.request.Request(link, headers=AGENT), timeout=TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code in ANSWERS_OTHERWISE else f"dead: HTTP {error.code}"
    except (OSError, ValueError) as error:
        return f"no answer: {getattr(error, 'reason', error)}"


def report(links: dict[str, list[str]], wrong: Iterable[str]) -> list[str]:
    """A line for every link that leads nowhere."""
    return [
        f"{link}  {reason}  ({', '.join(files)})"
        for (link, files), reason in zip(links.items(), wrong, strict=True)
        if reason
    ]


def main() -> None:
    listed = subprocess.run(["git", "ls-files", *FILES], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    links = links_of({name: (ROOT / name).read_text() for name in listed.splitlines()})
    with ThreadPoolExecutor(8) as pool:
        lines = report(links, pool.map(what_is_wrong, links))
    print(*lines, f"{len(links) - len(lines)} of {len(links)} links lead somewhere", sep="\n")
    sys.exit(bool(lines))


if __name__ == "__main__":
    main()
