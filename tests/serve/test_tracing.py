"""A request's spans, by the switch in cluster/serve.yaml: proxy, ingress and replica, under the caller's trace."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"

TRACED = """
import json, sys, time
from pathlib import Path

import httpx, ray, yaml

from serve import app
from serve.config import ServeArgs
from serve.protocol import proxy_errors
from tests.bench.serve_kills import free_port

lines = Path("cluster/serve.yaml").read_text().splitlines()
switch = yaml.safe_load("\\n".join(line.partition("# ")[2] for line in lines if "RAY_SERVE_TRACING" in line))
switch["RAY_SERVE_TRACING_SAMPLING_RATIO"] = "1"
proxy_errors.ENVIRONMENT |= switch
context = ray.init("local", num_cpus=1, include_dashboard=False, log_to_driver=False)
args = ServeArgs(num_cpus=0, ingress_cpus=0, ingress_replicas=1, max_replicas=1)
url = app.start(args, port=free_port())
headers = {"traceparent": f"00-{sys.argv[1]}-1111111111111111-01"}
assert httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, headers=headers, timeout=60).status_code == 200
spans = Path(ray._private.worker._global_node.get_logs_dir_path()) / "serve" / "spans"
time.sleep(2)
Path(sys.argv[2]).write_text(json.dumps({one.name: one.read_text() for one in spans.iterdir()}))
app.stop()
"""


@pytest.mark.ray
def test_spans_of_proxy_ingress_and_replica_are_of_the_callers_trace(tmp_path: Path) -> None:
    file = tmp_path / "spans.json"
    subprocess.run([sys.executable, "-c", TRACED, TRACE, str(file)], cwd=ROOT, capture_output=True, check=True)
    found = json.loads(file.read_text())
    mine = set()
    for name, text in found.items():
        decoder, spans = json.JSONDecoder(), text.strip()
        while spans:
            span, place = decoder.raw_decode(spans)
            spans = spans[place:].lstrip()
            if span["context"]["trace_id"] == f"0x{TRACE}":
                mine.add(name.split("_")[0] if name.startswith("proxy") else name.split("_")[2])
    assert mine == {"proxy", "Ingress", "Colocated"}, found
