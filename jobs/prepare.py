#!/usr/bin/env python
"""Make images with captions ready for training: `jobs/prepare.py SOURCE [--out URI]`.

Tar shards (as img2dataset writes them) are used where they are, and only scanned. Anything else is written as tar
shards to --out, the images byte for byte as they were, and then scanned:

{formats}

The scan leaves an index in _index/ beside the shards; what cannot be used is not lost from sight but listed, with the
reason, in a table that the job names. A page with counts, histograms and images is written too.

    jobs/prepare.py /data/cc3m                                                  # tars, in place
    jobs/prepare.py s3://lake/hf --out s3://lake/shards --caption-column text   # Parquet
    jobs/prepare.py dataset_coco.json --images /data/coco --split train,restval --out /data/coco-train
    jobs/prepare.py pairs.csv --out shards --captions-from long.jsonl --join-on stem=image_id

With --recaption URI tar shards are copied to URI with the short and long captions that samples lack, written by a
generator and marked in the data ("generated" in the samples' JSON):

    jobs/prepare.py /data/cc3m --recaption /data/cc3m-captioned --captioner llava-hf/llava-1.5-7b-hf

The same command goes on where it was interrupted. Next: jobs/train.py RECIPE --data.uri URI
"""

from __future__ import annotations

import argparse
import sys

from vladva.core.cli import location, user_errors


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments."""
    from vladva.data.source import find_format, format_names
    from vladva.data.source_arguments import add_source_arguments

    formats = "\n".join(f"    {name:13} {find_format(name).TITLE}" for name in format_names())
    parser = argparse.ArgumentParser(
        prog="jobs/prepare.py",
        description=__doc__.format(formats=formats),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=location, metavar="SOURCE", help="folder, file or s3://... with images and captions"
    )
    parser.add_argument(
        "--out", type=location, default="", help="folder or s3://... for the shards; without it tars are used in place"
    )
    add_source_arguments(parser)
    join = parser.add_argument_group("more captions for the same images, from a table (images captioned again)")
    join.add_argument(
        "--captions-from", type=location, metavar="TABLE", default="", help=".parquet, .csv, .tsv or .jsonl"
    )
    join.add_argument(
        "--join-on",
        metavar="[FIELD=]COLUMN",
        default="",
        help="the TABLE's column that holds the samples' id, or another FIELD: key (of a tar's sample), path, "
        "name (of the file), stem (name without ending)",
    )
    join.add_argument(
        "--join-caption-column", action="append", default=[], help="the TABLE's captions; may be repeated"
    )
    again = parser.add_argument_group("captions that are missing, written by a generator")
    again.add_argument(
        "--recaption", type=location, metavar="URI", default="", help="folder or s3://... for the shards"
    )
    again.add_argument("--captioner", metavar="RUN_OR_MODEL", default="", help="that writes them (default: --model)")
    again.add_argument("--caption-kinds", default="short,long", help="what is filled in: short, long or short,long")
    again.add_argument("--actors", type=int, default=2, help="processes that hold the captioner")
    again.add_argument("--gpus-per-actor", type=float, help="0: on CPUs; default: one, where the cluster has GPUs")
    parser.add_argument("--model", default="tiny", help="model whose tokens the captions are counted in")
    parser.add_argument("--samples-per-shard", type=int, default=1000)
    parser.add_argument(
        "--verify",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image, reading all of its data (a JPEG at an eighth of its size, which is a third of the "
        "time). With --no-verify only headers are read; training then scans again, since it wants images decoded",
    )
    parser.add_argument("--max-bad-fraction", type=float, default=0.05, help="stop when more of the samples are bad")
    parser.add_argument("--overwrite", action="store_true", help="replace the shards of another source in --out")
    parser.add_argument(
        "--html", type=location, metavar="PAGE", default="", help="the page (default: summary.html in _index/)"
    )
    options = parser.parse_args(arguments)
    if bool(options.captions_from) != bool(options.join_on):
        raise ValueError("--captions-from and --join-on belong together: which table, and which of its columns")
    if options.recaption and (options.out or options.captions_from):
        raise ValueError("--recaption takes tar shards as they are: write them first, with --out, then caption those")
    if options.samples_per_shard < 1:
        raise ValueError(f"--samples-per-shard is {options.samples_per_shard}; it must be at least 1")
    return options


def recaption_source(options: argparse.Namespace) -> str:
    """Copy the source's shards with the captions that are missing; where the copy is."""
    from vladva.core import ray_tasks
    from vladva.core.devices import gpus_for
    from vladva.core.shared_path import check_paths
    from vladva.prepare.recaption import RecaptionConfig, recaption

    captioner = options.captioner or options.model
    config = RecaptionConfig(tuple(options.caption_kinds.split(",")))
    ray_tasks.connect()
    reads = [("SOURCE", options.source), ("--captioner", captioner)]
    check_paths(reads=reads, writes=[("--recaption", options.recaption)])
    gpus = gpus_for(options.gpus_per_actor)
    print(
        recaption(options.source, options.recaption, captioner, config, actors=options.actors, gpus_per_actor=gpus),
        flush=True,
    )
    return options.recaption


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])

    from vladva.data.source_arguments import source_options
    from vladva.models.preprocessor import Preprocessor
    from vladva.models.resolve import find_model
    from vladva.prepare.join import Join
    from vladva.prepare.pipeline import prepare
    from vladva.prepare.statistics import compute_statistics
    from vladva.report.data_page import write_page

    count_tokens = Preprocessor(find_model(options.model).checkpoint).count_tokens
    join = None
    if options.captions_from:
        join = Join.parse(options.captions_from, options.join_on, options.join_caption_column)
    source = options.source
    if options.recaption:
        source = recaption_source(options)
    prepared = prepare(
        source,
        options.out,
        count_tokens,
        source_options(options),
        join=join,
        samples_per_shard=options.samples_per_shard,
        verify=options.verify,
        max_bad_fraction=options.max_bad_fraction,
        overwrite=options.overwrite,
    )
    summary = compute_statistics(prepared.uri)
    page = write_page(options.html, prepared, summary, command=" ".join(["jobs/prepare.py", *sys.argv[1:]]))
    print(f"{prepared}\n{summary}\nThe page: {page}. Next: jobs/train.py RECIPE --data.uri {prepared.uri}")


if __name__ == "__main__":
    main()
