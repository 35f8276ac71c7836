#!/usr/bin/env python
"""Build an index from an embeddings table: `jobs/index.py TABLE --out INDEX`.

Few rows are searched exactly; many are partitioned and quantised, and searched as thoroughly as it takes to find 98% of
the exact ten neighbours, which is measured at the end. Readers of an older version or tag are not disturbed.
"""

from __future__ import annotations

import argparse
import sys

from vladva.core.cli import location, user_errors


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="jobs/index.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=location, metavar="TABLE", help="folder or s3://... of the embeddings table")
    parser.add_argument("--out", type=location, required=True, help="folder or s3://... of the index")
    parser.add_argument("--kind", default="image", choices=("image", "text", "all"), help="rows that can be found")
    parser.add_argument("--type", default="IVF_SQ", choices=("exact", "IVF_SQ", "IVF_HNSW_SQ", "IVF_PQ"))
    parser.add_argument("--exact-below", type=int, default=20_000, help="rows below which the search is exact")
    parser.add_argument("--filter-columns", default="", help="carried columns often used in conditions, commas between")
    parser.add_argument("--tag", help="name of this version; v<version> by default")
    parser.add_argument("--replace", action="store_true", help="also in place of another model's index")
    parser.add_argument(
        "--workers", type=int, help="Ray workers that build, 1 to 8; by default one a node, from a million rows"
    )
    return parser.parse_args(arguments)


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])

    from vladva.core import ray_tasks
    from vladva.core.shared_path import check_paths
    from vladva.embed.table import open_table
    from vladva.index.build import PARALLEL_FROM, build_index

    if (options.workers or 0) > 1 or open_table(options.table).num_rows >= PARALLEL_FROM:
        ray_tasks.connect()
    check_paths(reads=[("TABLE", options.table)], writes=[("--out", options.out)])
    summary = build_index(
        options.table,
        options.out,
        kind=options.kind,
        index_type=options.type,
        exact_below=options.exact_below,
        filter_columns=[name for name in options.filter_columns.split(",") if name],
        tag=options.tag,
        replace=options.replace,
        workers=options.workers,
    )
    found = summary.settings
    how = (
        "exact search" if found.index_type == "exact" else f"{found.index_type}, {found.nprobes} of {found.partitions}"
    )
    print(
        f"{options.out}: {summary.num_rows:,} rows of {summary.dimension} numbers, {how}; "
        f"recall@10 {found.recall_at_10:.3f}, {found.p50_ms:.1f} ms a search; "
        f"version {summary.version}, tag {summary.tag}, {summary.index_bytes / 1e6:,.1f} MB, {summary.seconds:.1f} s"
    )
    print(f'Next: jobs/search.py {options.out} "a query" --model RUN_OR_MODEL')


if __name__ == "__main__":
    main()
