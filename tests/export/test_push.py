"""`jobs/export.py --push`: what a hub of the tests' own receives is the folder, byte for byte, private unless asked."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stub_hub import COMMIT, TOKEN, StubHub, running_hub

pytestmark = pytest.mark.slow  # each is a command of its own

ROOT = Path(__file__).parents[2]


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with running_hub() as hub:
        yield hub


def push(hub: StubHub, out: Path, *options: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own: huggingface_hub reads HF_ENDPOINT when it is imported."""
    hub_variables = {"HF_ENDPOINT": hub.url, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1"}
    environment = os.environ | hub_variables | {"HF_HOME": str(out.parent / "home")}
    command = [sys.executable, "-m", "jobs", "export", "tiny", "--out", str(out), "--layers", "1", *options]
    return subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, check=False, timeout=300)


def test_the_whole_folder_arrives(hub: StubHub, tmp_path: Path) -> None:
    done = push(hub, tmp_path / "out", "--push", "somebody/shapes")
    assert done.returncode == 0, done.stderr
    assert [request for request in hub.unknown if not request.startswith("GET ")] == []  # it looks for what is optional
    assert hub.repositories["somebody/shapes"]["visibility"] == "private"
    assert done.stdout.splitlines()[-1] == f"{hub.url}/somebody/shapes/commit/{COMMIT}"
    written = {
        str(path.relative_to(tmp_path / "out")): path.read_bytes()
        for path in (tmp_path / "out").rglob("*")
        if path.is_file()
    }
    assert {"README.md", "model.safetensors", "modules.json", "vladva.json"} <= written.keys()
    assert hub.files["somebody/shapes"] == written
    assert hub.messages == ["Export by vladva: weights, templates, model card"]


def test_public_is_said(hub: StubHub, tmp_path: Path) -> None:
    done = push(hub, tmp_path / "out", "--push", "somebody/shapes", "--public")
    assert done.returncode == 0, done.stderr
    assert hub.repositories["somebody/shapes"]["visibility"] == "public"


def test_a_hub_that_refuses_is_one_line_and_the_export_stays(hub: StubHub, tmp_path: Path) -> None:
    done = push(hub, tmp_path / "out", "--push", "somebody/shapes", token="hf_of_somebody_else")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --push somebody/shapes: the Hub refused (")
    assert done.stderr.rstrip().endswith("log in with `hf auth login`")
    assert "Traceback" not in done.stderr
    assert hub.files == {}
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_hub_that_is_not_there_is_one_line(hub: StubHub, tmp_path: Path) -> None:
    hub.url = "http://127.0.0.1:1"
    done = push(hub, tmp_path / "out", "--push", "somebody/shapes")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(
        "error: --push somebody/shapes: http://127.0.0.1:1 cannot be reached ("
    )
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out/model.safetensors").exists()
