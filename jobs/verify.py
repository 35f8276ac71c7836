#!/usr/bin/env python
"""Prove that embeddings are the same everywhere: `jobs/verify.py RUN_OR_MODEL --data URI [--url http://...]`.

The same images and captions are embedded as training does, as jobs/embed.py does and, with --url, by a running
server. Prints the largest difference of each two; the exit status is 1 if one is above the tolerance.
"""

from __future__ import annotations

import argparse
import os
import sys

from vladva.core.cli import location, user_errors

TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}  # bfloat16 has 8 bits; a merged adapter is rounded once more


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="jobs/verify.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="run or checkpoint folder, `tiny` or Hugging Face name")
    parser.add_argument(
        "--data", type=location, required=True, help="folder or s3://... of the shards that training reads"
    )
    parser.add_argument("--url", default="", help="of a server, e.g. http://127.0.0.1:8000; its key in VLADVA_API_KEY")
    parser.add_argument(
        "--out",
        type=location,
        default=".vladva/verify",
        help="folder or s3://... for the table that the job writes",
    )
    parser.add_argument("--samples", type=int, default=32, help="images, and as many captions")
    parser.add_argument("--dtype", default="float32", choices=list(TOLERANCE), help="of the model here")
    parser.add_argument("--tolerance", type=float, help="that passes (float32: 1e-5, bfloat16: 0.02)")
    options = parser.parse_args(arguments)
    if options.tolerance is None:
        options.tolerance = TOLERANCE[options.dtype]
    return options


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])

    from vladva.core import ray_tasks
    from vladva.core.shared_path import check_paths
    from vladva.evaluate.parity import compare, differences
    from vladva.models.resolve import describe, pin

    describe(pin(options.model), adapter=True, dtype=options.dtype)  # a mistake in a name is told before a cluster
    ray_tasks.connect()
    key = os.environ.get("VLADVA_API_KEY", "")
    check_paths(reads=[("RUN_OR_MODEL", options.model), ("--data", options.data)], writes=[("--out", options.out)])
    paths = compare(
        options.model,
        options.data,
        options.out,
        samples=options.samples,
        dtype=options.dtype,
        url=options.url,
        key=key,
    )
    largest = 0.0
    for first, second, kind, difference in differences(paths):
        print(f"{first:8} and {second:8} {len(paths[first][kind]):5} {kind}s   largest difference {difference:.1e}")
        largest = max(largest, difference)
    if not largest <= options.tolerance:
        print(f"they differ by {largest:.1e}, more than {options.tolerance:.1e}")
        sys.exit(1)
    print(f"the same, to {options.tolerance:.1e}")


if __name__ == "__main__":
    main()
