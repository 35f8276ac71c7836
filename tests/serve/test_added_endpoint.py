"""An endpoint is one file and one name: that of the site's page, in a copy of the tree, answers over HTTP."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.support.site_pages import ROOT, file_of_page
from vladva.models.embedder import load_embedder

PAGE, FILE = "extend/endpoint.md", "serve/routes/similarity.py"
ITEMS = ["a red circle", "a blue square", "a red circle"]
ASK = """
import json, socket, sys, urllib.error, urllib.request
import ray
from serve.app import ServeArgs, start, stop

def ask(body):
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/similarity", json.dumps(body).encode(), headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)
    except urllib.error.HTTPError as error:
        return json.load(error)

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init("local", num_cpus=4, include_dashboard=False, logging_level="WARNING")
try:
    url = start(ServeArgs(model="tiny", num_cpus=0, max_replicas=1, ingress_replicas=1), port=port)
    found = {"good": ask({"items": json.loads(sys.argv[1])}), "bad": ask({"items": ["a", 7]})}
finally:
    stop()
    ray.shutdown()
print(json.dumps(found))
"""


@pytest.mark.ray
def test_an_endpoint_is_one_file_and_one_name(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "serve", tmp_path / "serve", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / FILE).write_text(file_of_page(PAGE, FILE))
    app = tmp_path / "serve/app.py"
    line = file_of_page(PAGE, "serve/app.py, one line")
    changed = app.read_text().replace("ROUTES = (", f"{line}ROUTES = (similarity, ")
    assert changed != app.read_text()
    app.write_text(changed)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'platform'}"}
    command = [sys.executable, "-c", ASK, json.dumps(ITEMS)]
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    vectors = load_embedder("tiny").embed_texts(ITEMS)
    np.testing.assert_allclose(found["good"]["similarity"], vectors @ vectors.T, atol=1e-4)
    assert len(found["good"]["fingerprint"]) == 16
    # Limits and the shape of errors are around it without a line of its own.
    assert found["bad"]["error"]["param"] == "items[1]"
