"""The short part of the rehearsal, as `tests/cluster/rehearsal/run.py --short` runs it; `make rehearse` runs all."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.rehearsal import hosts

RUN = Path(__file__).with_name("run.py")


@pytest.mark.slow
def test_a_cluster_of_three_hosts_trains_while_one_dies() -> None:
    if reason := hosts.why_not():
        pytest.skip(f"not run: {reason}")
    done = subprocess.run(
        [sys.executable, str(RUN), "--short"], text=True, capture_output=True, timeout=2700, check=False
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["rehearsal"] == "passed"
    assert report["failed"] == []
    assert report["samples_lost"] == report["samples_duplicated"] == 0
    assert report["faults"] == ["worker-2 SIGKILLed in training"]


def test_where_it_is_not_permitted_it_says_so_and_is_not_taken_for_passed(tmp_path: Path) -> None:
    """Without the tools on PATH nothing can be made: the last line is JSON all the same."""
    script = f"import sys; sys.argv = ['run.py']; sys.path.insert(0, {str(RUN.parents[3])!r})\n"
    script += "from tests.cluster.rehearsal import hosts, run\nhosts.TOOLS = ('no-such-tool',)\nrun.main()"
    done = subprocess.run([sys.executable, "-c", script], text=True, capture_output=True, timeout=120, check=False)
    assert done.returncode == 3, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["rehearsal"] == "not run"
    assert "no-such-tool" in done.stdout or "root" in done.stdout
