#!/usr/bin/env python
"""Prove that a run trained on every sample exactly once per epoch: `jobs/audit.py RUN`.

The run must have been trained with `--train.audit`. Its workers' record is compared with the plan, and its ids are
counted by the index. Prints a table and a line of JSON; the exit status is 1 if a sample came twice or not at all.
"""

from __future__ import annotations

import argparse
import json
import sys

from vladva.core.cli import location, user_errors


@user_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="jobs/audit.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=location, metavar="RUN", help="folder or s3://... of the run")
    options = parser.parse_args()

    from rich import print as show

    from vladva.train.audit import audit

    report = audit(options.run)
    show(report.table())
    print(f"{report.steps} steps in {report.attempts} attempts", end=": ")
    print("every batch is the planned one, nothing came twice, nothing is missing" if report.ok else report.problems())
    if replaced := report.figures()["replaced"]:
        print(f"{replaced:,} samples could not be used, and others stood in for them: {options.run}/quarantine.jsonl")
    print(json.dumps(report.figures()))
    sys.exit(0 if report.ok else 1)


if __name__ == "__main__":
    main()
