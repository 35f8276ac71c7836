#!/usr/bin/env python
"""Draw the tiny model's data: `jobs/scenes.py [--out .vladva/scenes]`, with --triplets or --composed other data.

Without --triplets: shards of images with captions in train/ and test/, and the files of the benchmarks
scenes_retrieval and scenes_compositionality; what the recipe `tiny` trains on. With it: shards of texts alone, a
sentence, one that follows from it and a false one; what the recipe `tiny_e5_v` trains on. With --composed: pairs of an
image with a change in words, and the image after it, in train/, and the benchmark scenes_composed in test/; what the
recipe `tiny_composed` trains on.

The same options draw the same data. Next: jobs/train.py tiny, tiny_e5_v or tiny_composed
"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from vladva.core.cli import location, user_errors

SCENES, TRIPLETS, COMPOSED = ".vladva/scenes", ".vladva/triplets", ".vladva/composed"


def parse(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="jobs/scenes.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="", help=f"folder or s3://... (default: {SCENES}, {TRIPLETS} or {COMPOSED})")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--triplets", action="store_true", help="texts alone, for the recipe tiny_e5_v")
    other.add_argument("--composed", action="store_true", help="images with changes, for the recipe tiny_composed")
    parser.add_argument("--train", type=int, default=20_000, help="images to train on, or triplets, or changes")
    parser.add_argument("--test", type=int, default=1_000, help="held-out images, or changes")
    parser.add_argument("--negatives", type=int, default=250, help="hard negatives of each of the seven kinds")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    options.out = location(options.out or (TRIPLETS if options.triplets else COMPOSED if options.composed else SCENES))
    return options


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])
    if options.train < 1:
        raise ValueError(f"--train is {options.train}; it must be at least 1")

    from vladva.core.progress import Progress
    from vladva.core.shared_path import refuse_temporary
    from vladva.data.scenes.composed import write_composed
    from vladva.data.scenes.corpus import write_scenes, write_triplets

    out = options.out
    refuse_temporary("--out", out)
    if options.triplets:
        write_triplets(out, count=options.train, seed=options.seed)
        print(f"{out}: {options.train:,} triplets. Next: jobs/train.py tiny_e5_v --data.uri {out}")
        return
    write = write_composed if options.composed else partial(write_scenes, negatives=options.negatives)
    with Progress("drawing", options.train + options.test) as progress:
        write(
            out,
            train=options.train,
            test=options.test,
            seed=options.seed,
            progress=lambda _: progress.advance(1),
        )
    what, recipe = ("changes", "tiny_composed") if options.composed else ("images", "tiny")
    told = f"{options.train:,} {what} to train on, {options.test:,} held out"
    print(f"{out}: {told}. Next: jobs/train.py {recipe} --data.uri {out}/train")


if __name__ == "__main__":
    main()
