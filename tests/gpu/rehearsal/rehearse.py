#!/usr/bin/env python3
"""The rehearsal: every case on fake CUDA, measured, and held against what is allowed.

    python tests/gpu/rehearsal/rehearse.py                  all cases against recorded.json; three minutes of a CPU
    python tests/gpu/rehearsal/rehearse.py --record         write recorded.json anew, and README's table from it
    python tests/gpu/rehearsal/rehearse.py --quick          the cases that tests run, with few layers
    python tests/gpu/rehearsal/rehearse.py --whole CASE     one case with all its layers, beside what is extrapolated

The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

HERE = Path(__file__).resolve().parent
PROJECT = HERE.parents[2]
RECORDED = HERE / "recorded.json"

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.gpu.rehearsal.cases import Measured
    from tests.gpu.rehearsal.fake_cuda import FakeCuda
    from tests.support.published import Depth

    Case = tuple[str, Callable[[FakeCuda, Depth], Measured]]  # its checkpoint, and what it runs


def main() -> int:
    """Run the cases; 1 where one breaks a rule."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="their names, or beginnings of them; all if there are none")
    parser.add_argument("--quick", action="store_true", help="with few layers only")
    parser.add_argument("--controls", action="store_true", help="plant faults, and say which rules they break")
    parser.add_argument("--whole", action="store_true", help="with all layers")
    parser.add_argument("--record", action="store_true", help="write what is found as what is allowed")
    options = parser.parse_args()
    sys.path[:0] = [str(PROJECT), str(PROJECT / "platform")]
    from tests.gpu.rehearsal.device import pretend_device

    pretend_device()  # before PyTorch is imported
    warnings.simplefilter("ignore")
    from tests.gpu.rehearsal.fake_cuda import start

    mode = start()
    from tests.gpu.rehearsal.rules import broken_rules
    from tests.gpu.rehearsal.suite import QUICK, all_cases, run_case

    recorded = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    chosen = {
        name: case
        for name, case in all_cases().items()
        if (not options.quick or name in QUICK) and (not options.cases or name.startswith(tuple(options.cases)))
    }
    found: dict[str, Any] = {}
    broken: dict[str, list[str]] = {}
    for name, case in chosen.items():
        began = time.perf_counter()
        found[name] = run_case(mode, case, quick=options.quick, whole=options.whole)
        if not options.record and not options.whole:
            broken[name] = broken_rules(found[name], recorded.get(name))
        if options.record:
            recorded[name] = recorded.get(name, {}) | found[name]
            RECORDED.write_text(json.dumps(recorded, indent=1, sort_keys=True) + "\n")
        print(told(name, found[name], time.perf_counter() - began), file=sys.stderr)
        for line in broken.get(name, []):
            print(f"    BROKEN: {line}", file=sys.stderr)
    report: dict[str, Any] = {"measured": found, "broken": {name: lines for name, lines in broken.items() if lines}}
    if options.controls:
        from tests.gpu.rehearsal.controls import by_hand, controls

        report |= {"controls": controls(mode, recorded), "by hand": by_hand(mode).to_json()}
    print(json.dumps(report))
    return int(any(broken.values()))


def told(name: str, parts: dict[str, Any], seconds: float) -> str:
    """A line for people."""
    one = parts.get("all layers", parts["few layers"])
    waits = ", ".join(f"{number:g} {kind}" for kind, number in one["waits"].items()) or "none"
    return (
        f"{name}: {one['flops'] / one['units'] / 1e12:.3f} TFLOP each, peak {one['peak'] / 2**30:.1f} GiB, "
        f"{one['kernels']:g} kernels, the host waits: {waits} ({seconds:.0f} s)"
    )


if __name__ == "__main__":
    sys.exit(main())
