#!/usr/bin/env python
"""Make tables of emoji from packages: `jobs/emoji.py google=G.tgz twitter=T.tgz --test-vendors ... --names N.tgz`.

Pictures of several vendors with the names and keywords of Unicode's CLDR, to train on some vendors and to search
another's. A package is as `npm pack` leaves it, or a folder; its pictures are the PNG and WebP files that are called by
their code points (1f600.png). The names are those of emojibase-data.

Written to --out: train.parquet, and to test on seen-VENDOR.parquet (a held-out vendor's pictures of emoji that training
has seen) and unseen-VENDOR.parquet (every vendor's, of emoji that it has not); which emoji are in no table is counted.
The same packages give the same tables.

    npm pack emoji-datasource-google@16.0.0 emoji-datasource-twitter@16.0.0 @lobehub/fluent-emoji-3d@1.1.0
    npm pack emojibase-data@17.0.0
    jobs/emoji.py google=emoji-datasource-google-16.0.0.tgz twitter=emoji-datasource-twitter-16.0.0.tgz \\
        fluent=lobehub-fluent-emoji-3d-1.1.0.tgz --test-vendors fluent --names emojibase-data-17.0.0.tgz

Next: jobs/prepare.py TABLE --out SHARDS --id-column id, jobs/train.py tiny --data.uri SHARDS
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vladva.core.cli import location, user_errors


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="jobs/emoji.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vendors", nargs="+", metavar="VENDOR=PACKAGE", help="pictures: a .tgz or a folder")
    parser.add_argument(
        "--names", required=True, type=Path, metavar="PACKAGE", help="emojibase-data, with the captions"
    )
    parser.add_argument("--test-vendors", required=True, help="vendors that are not trained on, commas between")
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the emoji that are not trained on")
    parser.add_argument("--out", type=location, default=".vladva/emoji", help="folder or s3://... of the tables")
    return parser.parse_args(arguments)


def vendor_packages(arguments: list[str]) -> dict[str, Path]:
    """Vendor -> package. Raises ValueError."""
    packages = {}
    for argument in arguments:
        vendor, equals, package = argument.partition("=")
        if not equals or not package or not vendor.isidentifier() or vendor in packages:
            raise ValueError(f"{argument!r} is no VENDOR=PACKAGE, or its vendor comes twice: write google=FILE.tgz")
        packages[vendor] = Path(package)
    return packages


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])
    packages = vendor_packages(options.vendors)
    held_out = options.test_vendors.split(",")
    unknown = [vendor for vendor in held_out if vendor not in packages]
    if unknown or len(held_out) == len(packages):
        told = f"names {', '.join(unknown)}" if unknown else "leaves no vendor to train on"
        raise ValueError(f"--test-vendors {options.test_vendors} {told}; there are {', '.join(packages)}")

    from vladva.core.shared_path import refuse_temporary
    from vladva.data.emoji.corpus import choose_emoji, write_tables
    from vladva.data.emoji.package import read_names, read_pictures

    refuse_temporary("--out", options.out)
    names = read_names(options.names)
    pictures = {vendor: read_pictures(package) for vendor, package in packages.items()}
    corpus = choose_emoji(names, pictures, options.held_out)
    for reason, count in corpus.left_out.most_common():
        print(f"left out: {count:,} {reason}")
    print(f"{len(corpus.train):,} emoji to train on, {len(corpus.unseen):,} held out")
    for name, rows in write_tables(options.out, corpus, pictures, held_out).items():
        print(f"{options.out}/{name}.parquet: {rows:,} images")
    shards = f"{options.out}/shards"
    print(f"Next: jobs/prepare.py {options.out}/train.parquet --out {shards} --id-column id")
    print(f"      jobs/train.py tiny --data.uri {shards}")


if __name__ == "__main__":
    main()
