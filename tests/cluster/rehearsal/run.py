#!/usr/bin/env python
"""Rehearse a cluster on three hosts that are namespaces of this machine: `make rehearse`. Linux, root.

    tests/cluster/rehearsal/run.py                    everything
    tests/cluster/rehearsal/run.py --short            up, refusals, doctor, training with a kill, audit, down
    tests/cluster/rehearsal/run.py --only serv,link   steps whose name holds a word, with those they need
    tests/cluster/rehearsal/run.py --logs DIR         keep what the jobs said

Prints a line for each step, then a report, and one JSON object as its last line. Exit status: 0 where all steps hold,
1 where one does not, 3 where it could not be run here, with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).parents[3]
sys.path[:0] = [str(PROJECT), str(PROJECT / "platform")]

from tests.cluster.rehearsal import hosts  # noqa: E402

INSIDE = "--inside"
NOT_RUN = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="the part that continuous integration runs")
    parser.add_argument("--only", metavar="WORDS", help="steps whose name holds one of them, with those they need")
    parser.add_argument("--logs", type=Path, help="folder for what the jobs said")
    parser.add_argument(INSIDE, action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        # The first process of a PID namespace gets no signal that it has no handler for; `timeout` sends this one.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        sys.exit(rehearse(options))
    if reason := hosts.why_not():
        print(f"not run: {reason}")
        print(json.dumps({"rehearsal": "not run", "reason": reason}))
        sys.exit(NOT_RUN)
    sys.stdout.flush()
    hosts.enter([__file__, INSIDE, *sys.argv[1:]])


def rehearse(options: argparse.Namespace) -> int:
    """Run the steps; returns the exit status."""
    from tests.cluster.rehearsal.cluster import Cluster, use
    from tests.cluster.rehearsal.prometheus import prometheus
    from tests.cluster.rehearsal.steps import STEPS, chosen
    from tests.support.s3_server import s3_server

    began = time.monotonic()
    compile_op()
    rows = []
    steps = (
        chosen(options.only.split(",")) if options.only else [step for step in STEPS if step.short or not options.short]
    )
    with (
        hosts.hosts() as machines,
        s3_server(machines.folder / "s3", hosts.SWITCH) as s3,
        prometheus(machines.folder / "prometheus", [host.address for host in machines.all[:-1]]) as metrics,
    ):
        use(s3)
        cluster = Cluster(machines, s3, machines.folder, metrics)
        for step in steps:
            started = time.monotonic()
            try:
                told, passed = step.run(cluster), True
            except Exception as error:
                told, passed = f"{type(error).__name__}: {error}", False
                if not isinstance(error, AssertionError):
                    traceback.print_exc()
            seconds = time.monotonic() - started
            rows.append({"step": step.name, "seconds": round(seconds, 1), "passed": passed, "saw": told})
            print(f"{'ok' if passed else 'FAILED':7}{seconds:7.1f} s  {step.name}: {told}", flush=True)
            if not passed and step is steps[0]:
                break
        if options.logs:
            options.logs.mkdir(parents=True, exist_ok=True)
            for log in machines.folder.glob("*.log"):
                shutil.copy(log, options.logs)
    return report(rows, cluster.faults, cluster.figures, time.monotonic() - began)


def compile_op() -> None:
    """Compile the op of DeepSpeed's CPU workers once, for all hosts; nothing where it is there already."""
    script = "get_accelerator().create_op_builder('ShareMemCommBuilder').load(verbose=False)"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # of ninja
    subprocess.run(
        [sys.executable, "-c", f"from deepspeed.accelerator import get_accelerator; {script}"],
        env=os.environ | {"PATH": path}, check=True, capture_output=True,
    )  # fmt: skip


def report(rows: list[dict[str, Any]], faults: list[str], figures: dict[str, Any], seconds: float) -> int:
    """Print what was run and what came of it; returns the exit status."""
    audits = figures.get("samples", [])
    lost = sum(each["missing"] for each in audits) + figures.get("items_lost", 0)
    twice = sum(each["duplicated"] for each in audits) + figures.get("items_duplicated", 0)
    failed = [row["step"] for row in rows if not row["passed"]]
    print(f"\n{len(rows)} steps in {seconds:.0f} s, {len(failed)} failed")
    print("faults: " + ("; ".join(faults) or "none"))
    print(f"samples lost {lost}, duplicated {twice}; failed requests {figures.get('failed_requests', 'not measured')}")
    print(json.dumps({
        "rehearsal": "failed" if failed or not rows else "passed", "seconds": round(seconds), "steps": rows,
        "faults": faults, "samples_lost": lost, "samples_duplicated": twice, "failed": failed, **figures,
    }))  # fmt: skip
    return int(bool(failed) or not rows)


if __name__ == "__main__":
    main()
