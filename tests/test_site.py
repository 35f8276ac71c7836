"""The documentation: its blocks run, its links lead somewhere, its messages are in the source, and it builds."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from threading import Thread
from types import ModuleType

import pytest
import yaml

from tests.support.site_pages import NOT_RUN, PAGES, ROOT, Block, blocks_of

FILES_OF_REPOSITORY = [ROOT / name for name in ("README.md", "CONTRIBUTING.md")] + sorted(ROOT.glob("*/README.md"))
EVERY_PAGE = sorted(PAGES.rglob("*.md"))
RUN = ("python", "bash")
READ = ("text", "json", "toml", "yaml")  # not run, and looks like nothing that could be


def named(page: Path) -> str:
    return str(page.relative_to(PAGES if page.is_relative_to(PAGES) else ROOT))


def run_blocks(page: Path) -> list[Block]:
    """What a test runs: blocks without a title."""
    return [block for block in blocks_of(page) if block.language in RUN and not block.title]


# --- code blocks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", EVERY_PAGE, ids=named)
def test_a_block_is_run_or_a_file_or_says_why_not(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in (*RUN, *READ), f"{page.name}: ```{block.language}"
        if block.language in RUN and block.title:
            reason = block.title.startswith(NOT_RUN) and len(block.title) > len(NOT_RUN) + 10
            tested = page.parent.name == "extend" and block.title.endswith((".py", "one line"))
            assert reason or tested, f"{page.name}: {block.title!r} is no reason"


def test_blocks_of_readmes_are_run_or_say_why_not() -> None:
    """What README shows in Python is run by tests/test_api.py; everything else there says why it is not."""
    for page in FILES_OF_REPOSITORY:
        section = page.read_text().partition("## In Python\n")[2].partition("\n## ")[0] if page.parent == ROOT else ""
        for block in blocks_of(page):
            if block.title or block.language not in RUN:
                assert not block.title or block.title.startswith(NOT_RUN), f"{page}: {block.title!r}"
            else:
                assert block.text in section, f"{page}: nobody runs\n{block.text}"


PAGES_WITH_COMMANDS = [page for page in EVERY_PAGE if any(block.language == "bash" for block in run_blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES_WITH_COMMANDS, ids=named)
def test_a_page_runs_as_it_stands(page: Path, tmp_path: Path, ray_cluster: None) -> None:
    """Top to bottom in an empty folder: commands in a shell, Python in one interpreter, printing what it says."""
    import ray

    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin/vladva"
    command.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m jobs "$@"\n')
    command.chmod(0o755)
    environment = os.environ | {
        "PATH": f"{command.parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}",
        "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
    }
    (tmp_path / "work").mkdir()
    script, expected = program(run_blocks(page))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path / "work",
        env=environment,
        text=True,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    printed = [line.removeprefix(SAID) for line in done.stdout.splitlines() if line.startswith(SAID)]
    assert printed == expected
    assert expected, f"{page.name} says nothing that could be wrong"


SAID = "the page says: "
PRINTS = re.compile(r"^print\(.*?\)  # (.+)$", re.MULTILINE)


def program(blocks: list[Block]) -> tuple[str, list[str]]:
    """One script of all blocks, and what its `print(...)  # ...` must print."""
    lines = [
        "import subprocess, builtins",
        f"def print(*values): builtins.print({SAID!r} + ' '.join(map(str, values)), flush=True)",
        "def shell(text): subprocess.run(['bash', '-euo', 'pipefail', '-c', text], check=True)",
    ]
    lines += [block.text if block.language == "python" else f"shell({block.text!r})" for block in blocks]
    expected = [said for block in blocks if block.language == "python" for said in PRINTS.findall(block.text)]
    return "\n".join(lines), expected


def test_a_page_that_is_wrong_is_noticed() -> None:
    """The negative control of the above."""
    script, expected = program([Block("python", "", "print(1 + 1)  # 3\n"), Block("bash", "", "false\n")])
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, check=False)
    assert done.returncode != 0
    assert (done.stdout, expected) == (f"{SAID}2\n", ["3"])


@pytest.mark.parametrize("page", [page for page in EVERY_PAGE if page not in PAGES_WITH_COMMANDS], ids=named)
def test_a_page_without_commands_has_nothing_that_nobody_runs(page: Path) -> None:
    """Its Python is in files that tests put into a tree, or there is none."""
    assert not run_blocks(page)


@pytest.mark.parametrize("page", [*FILES_OF_REPOSITORY, *EVERY_PAGE], ids=named)
def test_commands_exist(page: Path) -> None:
    """Also those that are not run: verbs, files, targets of make; Python that parses, JSON that loads."""
    from jobs.__main__ import verbs

    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in blocks_of(page):
        if block.language == "python":
            ast.parse(block.text)
        if block.language == "json":
            json.loads(block.text)
        for line in block.text.replace("\\\n", " ").splitlines() if block.language == "bash" else ():
            words = shlex.split(line, comments=True)
            if words[:1] == ["vladva"]:
                assert words[1] in verbs(), line
            if words[:1] == ["make"]:
                assert set(words[1:]) <= set(targets), line
            for word in words:
                if re.match(r"(jobs|cluster|tests|serve|platform)/[\w/.-]+\.\w+$", word):
                    assert (ROOT / word).exists(), line


# --- messages ---------------------------------------------------------------------------------------------------------


@lru_cache
def texts_of_source() -> str:
    """Every string of the source, with three dots where something is put in; the Makefile as it is."""
    found = [(ROOT / "Makefile").read_text()]
    for folder in ("platform", "jobs", "serve"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    found.append("".join(map(str, parts)))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return "\n".join(found)


def messages() -> Iterator[str]:
    """What troubleshooting.md explains."""
    yield from re.findall(r"^`(.+)`$", (PAGES / "troubleshooting.md").read_text(), re.MULTILINE)


def test_messages_that_are_explained_are_those_that_users_see() -> None:
    explained = list(messages())
    assert len(explained) >= 18
    assert [message for message in explained if not is_in_source(message)] == []
    assert not is_in_source("--out ... exists already; take another")


def is_in_source(message: str) -> bool:
    pattern = ".*".join(re.escape(part) for part in message.split("...") if part.strip())
    return re.search(pattern, texts_of_source()) is not None


# --- links ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", FILES_OF_REPOSITORY, ids=named)
def test_links_of_the_repository_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.fixture(scope="module")
def host() -> Iterator[str]:
    """Address of a server that has `/there`, refuses robots `/private`, and has nothing else."""

    class Pages(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response({"/there": 200, "/private": 403}.get(self.path, 404))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_dead_links_to_other_hosts_are_listed(host: str) -> None:
    """By `make links`, whose network here is a server of our own."""
    checker = load_module(ROOT / ".docs/check_links.py")
    found = checker.links_of(
        {
            "a.md": "[one](https://one.org/x), <https://two.org/y#z>. http://127.0.0.1:8000/v1 https://minio.example:9000",
            "b.md": "See https://one.org/x.",
        }
    )
    assert found == {"https://one.org/x": ["a.md", "b.md"], "https://two.org/y#z": ["a.md"]}
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))  # and does not listen
        pages = [f"{host}/there", f"{host}/private", f"{host}/gone", f"http://127.0.0.1:{unused.getsockname()[1]}/"]
        wrong = [checker.what_is_wrong(page) for page in pages]
    assert wrong[:3] == ["", "", "dead: HTTP 404"]
    assert wrong[3].startswith("no answer: ")
    assert checker.report({"x": ["a.md"], "y": ["b.md"]}, ["", "dead: HTTP 404"]) == ["y  dead: HTTP 404  (b.md)"]


def load_module(file: Path) -> ModuleType:
    """A file in a folder that is no package."""
    spec = spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_written_page_is_in_the_navigation_and_the_other_way_round() -> None:
    text = (ROOT / ".docs/mkdocs.yml").read_text()
    listed = set(re.findall(r"[\w./-]+\.md", text))
    written = {named(page) for page in EVERY_PAGE}
    made = {entry for entry in listed if entry.startswith("folders/")} | {"index.md"}
    assert listed - made == written
    assert yaml.safe_load(text)["strict"] is True


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None, reason="no MkDocs here: `make docs` installs it and builds the site")
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    """All links and anchors of the written and the made pages; `make docs` does the same."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / ".docs/mkdocs.yml")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run([*command, "-d", str(tmp_path)], env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    train = (tmp_path / "commands/train.html").read_text()
    assert "--dry-run" in train
    assert "train.global-batch" in train
