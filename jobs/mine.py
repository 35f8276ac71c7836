#!/usr/bin/env python
"""Mine hard negatives from a model's mistakes: `jobs/mine.py RUN_OR_MODEL --data SHARDS --out URI`.

The shards are copied with more "negatives" in the samples' JSON: for each image the captions that the model ranks near
it, and the captions of the images that it ranks near the sample's captions, each less similar than the sample's own by
a margin; never one of the same or an equal image. Training reads them with --data.hard-negatives. A page shows fifty.

With --order an order of the samples is written as well, in which neighbours are alike: training with --data.order
makes global batches of neighbours.

The same command goes on where it was interrupted. Next: jobs/train.py RECIPE --data.uri URI --data.hard-negatives 2
"""

from __future__ import annotations

import argparse
import sys

from vladva.core.cli import location, parse_actors, user_errors


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments."""
    from vladva.mine.negatives import MiningConfig

    default = MiningConfig()
    parser = argparse.ArgumentParser(
        prog="jobs/mine.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="run or checkpoint folder, `tiny` or Hugging Face name")
    parser.add_argument("--data", type=location, required=True, help="folder or s3://... of the shards")
    parser.add_argument("--out", type=location, required=True, help="folder or s3://... for the shards with negatives")
    parser.add_argument("--no-adapter", action="store_true", help="mine with the base model, zero-shot")
    parser.add_argument("--per-sample", type=int, default=default.per_sample, help="negatives of a sample, at most")
    parser.add_argument("--neighbours", type=int, default=default.neighbours, help="hits looked at for each query")
    parser.add_argument(
        "--margin", type=float, default=default.margin, help="less similar than the sample's own by so much, at least"
    )
    parser.add_argument(
        "--relative", type=float, default=default.relative, help="and no more than this fraction of its similarity"
    )
    parser.add_argument(
        "--short-below", type=int, default=default.short_below, help="tokens; longer captions are not used"
    )
    parser.add_argument("--order", type=location, metavar="FILE", default="", help="also write an order of the samples")
    parser.add_argument("--actors", default="2", help="processes that hold the model: a number, or LEAST,MOST")
    parser.add_argument("--cpus-per-actor", type=int, default=1)
    parser.add_argument("--gpus-per-actor", type=float, help="0: on CPUs; default: one, where the cluster has GPUs")
    parser.add_argument("--batch-size", type=int, default=64, help="items embedded at a time, at most")
    parser.add_argument(
        "--html", type=location, metavar="PAGE", default="", help="default: _mine/negatives.html in URI"
    )
    options = parser.parse_args(arguments)
    options.actors = parse_actors(options.actors)
    return options


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])

    from vladva.core import ray_tasks, storage
    from vladva.core.devices import gpus_for
    from vladva.core.shared_path import check_paths
    from vladva.data.scan import scan
    from vladva.data.shard_index import ShardIndex
    from vladva.mine.negatives import MINED, MiningConfig, mine
    from vladva.mine.neighbours import order_samples
    from vladva.models.resolve import describe, dtype_for, preprocessor_of
    from vladva.report.negatives_page import write_negatives_page

    config = MiningConfig(options.per_sample, options.neighbours, options.margin, options.relative, options.short_below)
    model_config, _ = describe(options.model, adapter=not options.no_adapter, dtype="float32")
    ray_tasks.connect()
    gpus = gpus_for(options.gpus_per_actor)
    check_paths(
        reads=[("RUN_OR_MODEL", options.model), ("--data", options.data)],
        writes=[("--out", options.out), ("--order", options.order), ("--html", options.html)],
    )
    print(scan(options.data, preprocessor_of(model_config).count_tokens), flush=True)
    summary = mine(
        options.model,
        options.data,
        options.out,
        config,
        adapter=not options.no_adapter,
        actors=options.actors,
        batch_size=options.batch_size,
        dtype=dtype_for(options.model, gpus),
        cpus_per_actor=options.cpus_per_actor,
        gpus_per_actor=gpus,
    )
    print(summary)
    if summary.unreadable:
        print(f"{summary.unreadable:,} members of the shards are no files, or damaged: they are in no copy")
    index = ShardIndex.open(options.data)
    page = write_negatives_page(options.html, index, summary)
    print(f"fifty of them: {page}")
    more = ""
    if options.order:
        order_samples(storage.join(options.out, MINED, "table"), index, options.order)
        more = f" --data.order {options.order}"
    print(f"Next: jobs/train.py RECIPE --name NEW --data.uri {options.out} --data.hard-negatives 2{more}")


if __name__ == "__main__":
    main()
