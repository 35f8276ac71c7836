#!/usr/bin/env python
"""What each part of the method adds: `jobs/ablate.py tiny --data .vladva/scenes --seeds 3 [--train.steps 200 ...]`.

Trains the recipe with parts left out, several seeds each, scores every run on held-out data and prints one table. The
same command goes on where it was interrupted. The last line is one JSON object with the scores of every seed.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace

from vladva.core.cli import location, user_errors
from vladva.recipes import parse_recipe

COLUMNS = {
    "scenes_retrieval/t2i_r1": "T2I R@1",
    "scenes_retrieval/i2t_r1": "I2T R@1",
    "scenes_compositionality/swap_object": "swap obj",
    "scenes_compositionality/swap_attribute": "swap att",
    "scenes_compositionality/average_macro": "compositionality",
}


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Options of the ablation, and what is left for the recipe."""
    parser = argparse.ArgumentParser(
        prog="jobs/ablate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", default="tiny", help="as in jobs/train.py; overrides may follow")
    parser.add_argument(
        "--data", type=location, default=".vladva/scenes", help="folder with train/ shards and the benchmarks' files"
    )
    parser.add_argument(
        "--out", type=location, default=".vladva/ablation", help="folder or s3://... for runs, embeddings and scores"
    )
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant")
    return parser.parse_known_args(arguments)


@user_errors
def main() -> None:
    options, overrides = parse(sys.argv[1:])
    if options.seeds < 1:
        raise ValueError(f"--seeds is {options.seeds}; it must be at least 1")

    recipe = parse_recipe([options.recipe, *overrides], prog="jobs/ablate.py")
    recipe = replace(recipe, storage=options.out, data=replace(recipe.data, uri=f"{options.data}/train"))

    from rich.console import Console

    from vladva.core import ray_tasks
    from vladva.core.shared_path import check_paths
    from vladva.evaluate.ablation import ablate, ablation_table

    ray_tasks.connect()
    check_paths(reads=[("--data", options.data)], writes=[("--out", options.out)])
    benchmarks = list(dict.fromkeys(name.split("/")[0] for name in COLUMNS))
    result = ablate(recipe, benchmarks, options.data, options.out, seeds=options.seeds, tell=print)
    Console().print(ablation_table(result["scores"], COLUMNS))
    print(json.dumps(result))


if __name__ == "__main__":
    main()
