"""Clients that fit into this environment, unmodified; tests/bench/clients.py has the others, each in one of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.wire import data_uri, noise_image

COMMAND = Path(__file__).parents[1] / "bench" / "clients.py"


@pytest.mark.parametrize("client", ["openai", "mteb"])
def test_a_client_gets_the_vectors_that_plain_http_gets(server: str, client: str) -> None:
    command = [sys.executable, str(COMMAND), "--check", client, "--url", server]
    environment = os.environ | {"VLADVA_IMAGE": data_uri(noise_image(1))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_a_server_that_is_none_does_not_pass() -> None:
    """The negative control."""
    command = [sys.executable, str(COMMAND), "--check", "openai", "--url", "http://127.0.0.1:1"]
    environment = os.environ | {"VLADVA_IMAGE": data_uri(noise_image(1))}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert "Connection" in done.stderr
