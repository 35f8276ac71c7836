#!/usr/bin/env python
"""Embed a corpus: `jobs/embed.py RUN_OR_MODEL --data URI --out URI`.

The corpus is what jobs/prepare.py reads (shards, Parquet, tables, folders of images, COCO or Karpathy JSON), or a text
file with one text a line. The same command goes on with a table that was interrupted, and embeds what is new in a
corpus that has grown.
"""

from __future__ import annotations

import argparse
import sys

from vladva.core.cli import location, parse_actors, user_errors


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments."""
    from vladva.data.source_arguments import add_source_arguments

    parser = argparse.ArgumentParser(
        prog="jobs/embed.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="run or checkpoint folder, `tiny` or Hugging Face name")
    parser.add_argument("--data", type=location, required=True, help="folder, file or s3://... of the corpus")
    parser.add_argument("--out", type=location, required=True, help="folder or s3://... of the embeddings table")
    parser.add_argument("--kinds", default="image,text", help="what to embed: image, text or image,text")
    parser.add_argument("--no-adapter", action="store_true", help="embed with the base model, zero-shot")
    parser.add_argument("--actors", default="2", help="processes that hold the model: a number, or LEAST,MOST")
    parser.add_argument("--cpus-per-actor", type=int, default=1)
    parser.add_argument("--gpus-per-actor", type=float, help="0: on CPUs; default: one, where the cluster has GPUs")
    parser.add_argument("--batch-size", type=int, default=64, help="items embedded at a time, at most")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the model; default: float32, on GPUs that of its run"
    )
    parser.add_argument(
        "--store-as",
        choices=("float32", "float16", "int8"),
        help="type of the stored numbers: float32 by default, or what a table that is there has",
    )
    parser.add_argument("--max-bad-fraction", type=float, default=0.05, help="stop when more of the items are bad")
    add_source_arguments(parser)
    options = parser.parse_args(arguments)
    options.kinds = options.kinds.split(",")
    options.actors = parse_actors(options.actors)
    return options


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])

    from vladva.core import ray_tasks
    from vladva.core.devices import gpus_for, say_where
    from vladva.core.shared_path import check_paths
    from vladva.data.source_arguments import source_options
    from vladva.embed.corpus import open_corpus
    from vladva.embed.pipeline import encode
    from vladva.models.resolve import describe, dtype_for, preprocessor_of

    config, description = describe(options.model, adapter=not options.no_adapter, dtype=options.dtype or "float32")
    if description.get("vectors_per_image", 1) > 1:
        raise ValueError(f"{options.model} gives an image several vectors, which no index takes; jobs/evaluate.py does")
    ray_tasks.connect()
    gpus = gpus_for(options.gpus_per_actor)
    dtype = options.dtype or dtype_for(options.model, gpus)
    if gpus and options.gpus_per_actor is None:
        say_where(print, gpus, dtype)
    check_paths(reads=[("RUN_OR_MODEL", options.model), ("--data", options.data)], writes=[("--out", options.out)])
    count_tokens = preprocessor_of(config).count_tokens
    corpus = open_corpus(options.data, options.kinds, source_options(options), count_tokens=count_tokens)
    print(*corpus.remarks, sep="\n", end="\n" * bool(corpus.remarks), flush=True)
    summary = encode(
        corpus.items,
        options.model,
        options.out,
        adapter=not options.no_adapter,
        actors=options.actors,
        batch_size=options.batch_size,
        dtype=dtype,
        cpus_per_actor=options.cpus_per_actor,
        gpus_per_actor=gpus,
        read_images=corpus.read_images,
        corpus=corpus.uri,
        total=corpus.num_items,
        max_bad_fraction=options.max_bad_fraction,
        stored_as=options.store_as,
    )
    print(
        f"{options.out}: {summary.rows:,} embeddings of {summary.dimension} numbers by model {summary.fingerprint}; "
        f"{summary.embedded:,} now, {summary.repeated:,} repeats, {summary.skipped:,} from before, "
        f"{summary.quarantined:,} quarantined"
    )
    if summary.cleaned:
        print(f"{summary.cleaned:,} captions cleaned of marks and control characters")
    if summary.halvings:
        times = "once" if summary.halvings == 1 else f"{summary.halvings} times"
        print(f"{times} there was no memory for a batch, and it was halved: a smaller --batch-size would be faster")
    print(
        f"{summary.items_per_s:,.1f} items/s and {summary.tokens_per_s:,.0f} tokens/s over {summary.seconds:.0f} s. "
        f"Next: jobs/index.py {options.out} --out INDEX"
    )


if __name__ == "__main__":
    main()
