"""Prometheus: a real one beside the hosts, which asks Ray's metrics agent on each of them."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

EVERY_S = 5
METRICS_PORT = 8080  # of Ray's agent, in cluster/on_prem.yaml
URL = "http://127.0.0.1:9090"


@contextmanager
def prometheus(folder: Path, addresses: Sequence[str]) -> Iterator[str]:
    """Run Prometheus; gives its address, or an empty one where it is not installed."""
    program = shutil.which("prometheus")
    if program is None:
        yield ""
        return
    folder.mkdir(parents=True)
    targets = [f"{address}:{METRICS_PORT}" for address in addresses]
    config = {
        "global": {"scrape_interval": f"{EVERY_S}s"},
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": targets}]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    command = [
        *(program, f"--config.file={folder / 'prometheus.yaml'}", f"--storage.tsdb.path={folder / 'data'}"),
        *("--web.listen-address=127.0.0.1:9090", "--log.level=warn"),
    ]
    with (folder / "log").open("wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield URL
        finally:
            process.kill()


def ask(url: str, expression: str) -> list[dict[str, Any]]:
    """What an expression is now. Raises ValueError for one that is wrong."""
    query = urllib.parse.urlencode({"query": expression})
    for attempt in range(10):
        try:
            with urllib.request.urlopen(f"{url}/api/v1/query?{query}", timeout=60) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise ValueError(f"{expression}: {error.read().decode()}") from error
        except OSError:  # not listening yet
            time.sleep(0.5 * (attempt + 1))
    raise ValueError(f"{url} does not answer")


def seen(url: str, expression: str, within: str = "3h") -> int:
    """How many series an expression has had in the time that is over: those of a job go when it ends."""
    found = ask(url, f"count(last_over_time(({expression})[{within}:{EVERY_S}s]))")
    return int(float(found[0]["value"][1])) if found else 0
