"""cluster/grafana.json: every expression is PromQL, and asks for what there is. The rehearsal asks a real run."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from vladva.core.job_metrics import COUNTERS, GAUGES

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "cluster/grafana.json"
# Ray's own, as its metrics page lists them and the rehearsal sees them.
OF_RAY = {
    "ray_serve_deployment_replica_healthy",
    "ray_serve_deployment_queued_queries",
    "ray_node_cpu_utilization",
    "ray_node_mem_used",
    "ray_node_mem_total",
    "ray_object_store_memory",
}


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def of_serving() -> set[str]:
    """The names that the HTTP service's own metrics have in Prometheus."""
    source = (ROOT / "serve/protocol/request_metrics.py").read_text()
    counters = re.findall(r'Counter\(\s*"(\w+)"', source)
    histograms = re.findall(r'Histogram\(\s*"(\w+)"', source)
    assert counters
    assert histograms
    return {f"ray_{name}_total" for name in counters} | {f"ray_{name}_bucket" for name in histograms}


def test_every_figure_is_one_that_there_is() -> None:
    ours = {f"ray_{name}" for name in GAUGES} | {f"ray_{name}_total" for name in COUNTERS} | of_serving()
    asked = {name for expression in expressions() for name in re.findall(r"\bray_\w+", expression)}
    assert asked <= ours | OF_RAY
    assert ours <= asked  # what is measured is shown


def test_panels_have_a_title_a_place_and_a_data_source_of_their_own() -> None:
    content = json.loads(DASHBOARD.read_text())
    places = [tuple(panel["gridPos"][axis] for axis in "xy") for panel in content["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in content["panels"]}) == len(places)
    assert len({panel["title"] for panel in panels()}) == len(panels())
    assert [each["name"] for each in content["templating"]["list"]] == ["datasource"]
    for panel in panels():
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["targets"]


@pytest.mark.parametrize("broken", [False, True])
def test_every_expression_is_promql(tmp_path: Path, broken: bool) -> None:
    """Prometheus' own checker of rules reads them; it does refuse one with a bracket too few."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("no promtool on PATH: apt-get install prometheus")
    asked = [expression.replace("$__rate_interval", "1m") for expression in expressions()]
    if broken:
        asked[0] = f"sum({asked[0]}"
    rules = [{"record": f"rehearsal:{number}", "expr": expression} for number, expression in enumerate(asked)]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": rules}]}))
    done = subprocess.run(
        [promtool, "check", "rules", tmp_path / "rules.yaml"], text=True, capture_output=True, check=False
    )
    assert (done.returncode != 0) == broken, done.stdout + done.stderr
