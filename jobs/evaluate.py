#!/usr/bin/env python
"""Score models in benchmarks: `jobs/evaluate.py zero-shot=tiny trained=.vladva/tiny --data .vladva/scenes`.

Prints the tables in the paper's layout and leaves scores.json, the outcome of every sample and report.html. What a
model has embedded before is not embedded again.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Iterable
from typing import Any

from vladva.core.cli import location, user_errors


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments; `models` maps a label to a run, checkpoint or model name."""
    parser = argparse.ArgumentParser(
        prog="jobs/evaluate.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "models",
        nargs="+",
        metavar="RUN_OR_MODEL",
        help="run or checkpoint folder, `tiny`, Hugging Face name or one of --systems; LABEL=... names its row",
    )
    parser.add_argument("--systems", action=ListSystems, nargs=0, help="list the paper's systems and how each is run")
    parser.add_argument(
        "--benchmarks",
        default="all",
        help="names with commas between (coco:5 for 5 captions an image), `retrieval` for images and captions of your "
        "own (--data is a table, shards or a folder then), or `all` that --data holds",
    )
    parser.add_argument(
        "--data", type=location, default=".vladva/scenes", help="folder or s3://... with the benchmarks' files"
    )
    parser.add_argument(
        "--out", type=location, default=".vladva/evaluation", help="folder or s3://... for scores and embeddings"
    )
    parser.add_argument("--actors", type=int, default=2, help="processes that hold the model")
    parser.add_argument("--gpus-per-actor", type=float, help="0: on CPUs; default: one, where the cluster has GPUs")
    parser.add_argument("--batch-size", type=int, default=64, help="items embedded at a time")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="of the model; default: float32, on GPUs that of its run"
    )
    parser.add_argument("--layers", default="", help="embed from these layers too, e.g. 32,31,28,24,20,16 (table 6)")
    parser.add_argument(
        "--bootstrap", type=int, default=0, metavar="N", help="resamples for 95%% intervals; 1000 is usual"
    )
    parser.add_argument(
        "--rerank",
        type=int,
        default=0,
        metavar="K",
        help="score each model again with the K nearest in the order of its generator's P(yes)",
    )
    parser.add_argument(
        "--captions", type=int, default=0, metavar="N", help="caption N images with each model (figure 1)"
    )
    parser.add_argument(
        "--images", type=location, default="", help="folder of the images to caption, instead of the benchmarks'"
    )
    options = parser.parse_args(arguments)
    options.models = distinct(map(labelled, options.models))
    options.layers = whole_numbers(options.layers)
    if options.captions < 0 or (options.images and not options.captions):
        raise ValueError(f"--captions is {options.captions}; say how many images to caption, e.g. 16")
    if options.rerank == 1 or options.rerank < 0:
        raise ValueError(f"--rerank is {options.rerank}; give how many of the nearest to put in order, e.g. 10")
    if options.bootstrap < 0:
        raise ValueError(f"--bootstrap is {options.bootstrap}; give a number of resamples, e.g. 1000, or 0 for none")
    return options


def distinct(models: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Label -> model. Raises ValueError for a label that names two."""
    found: dict[str, str] = {}
    for label, model in models:
        if label in found:
            raise ValueError(f"two models have the label {label!r}; tell them apart with LABEL={model}")
        found[label] = model
    return found


def whole_numbers(text: str) -> list[int]:
    """Numbers with commas between."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--layers is {text!r}; give numbers with commas between, e.g. 32,31,28,24,20,16")
    return [int(part) for part in parts]


class ListSystems(argparse.Action):
    """`--systems`: print every row of the paper's tables and how it is run, and stop."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from rich.console import Console

        from vladva.report.tables import systems_table

        Console().print(systems_table())
        parser.exit()


def labelled(argument: str) -> tuple[str, str]:
    """`LABEL=MODEL` or just MODEL, whose label is then its last part."""
    label, equals, model = argument.partition("=")
    if equals and "/" not in label:
        return label, model
    return argument.rstrip("/").rpartition("/")[2], argument


def check_models(options: argparse.Namespace) -> None:
    """A mistake in a name or number is told before a cluster is started."""
    from vladva.models.backbones import backbone_of
    from vladva.models.dual_encoders import is_dual_encoder
    from vladva.models.resolve import describe, find_model, pin

    for model in options.models.values():
        checkpoint = find_model(model).checkpoint
        if not is_dual_encoder(checkpoint):
            backbone_of(checkpoint)
        for layer in options.layers:
            describe(pin(model), adapter=True, dtype=options.dtype or "float32", layer=layer)


@user_errors
def main() -> None:
    started = time.monotonic()
    options = parse(sys.argv[1:])
    command = shlex.join(["jobs/evaluate.py", *sys.argv[1:]])

    from vladva.evaluate.scoring import evaluate, read_benchmarks

    tasks = read_benchmarks(options.benchmarks.split(","), options.data)

    from rich.console import Console

    from vladva.core import ray_tasks, storage
    from vladva.core.devices import gpus_for, say_where
    from vladva.core.shared_path import check_paths
    from vladva.evaluate.captioning import find_images_to_caption, write_captions, writers
    from vladva.evaluate.mteb_adapter import write_results
    from vladva.report.comparison_tables import comparison_tables, layer_tables
    from vladva.report.evaluation_page import headline_highlights, write_report
    from vladva.report.page_examples import caption_comparisons, grids_of, wrong_choices_of
    from vladva.report.tables import as_rich, score_tables, statistics_table

    check_models(options)
    images = find_images_to_caption(tasks, options.images, options.captions) if options.captions else []
    systems = writers(options.models) if options.captions else {}
    ray_tasks.connect()
    check_paths(
        reads=[*(("RUN_OR_MODEL", model) for model in options.models.values()), ("--data", options.data)],
        writes=[("--out", options.out)],
    )
    gpus = gpus_for(options.gpus_per_actor)
    if gpus and options.gpus_per_actor is None:
        say_where(print, gpus, options.dtype or "each run's own dtype")
    resources = {"actors": options.actors, "gpus_per_actor": gpus, "dtype": options.dtype}
    scores = evaluate(
        options.models,
        tasks,
        options.data,
        options.out,
        batch_size=options.batch_size,
        layers=options.layers,
        bootstrap=options.bootstrap,
        rerank_top=options.rerank,
        command=command,
        **resources,
    )
    tables = [*score_tables(scores), *comparison_tables(scores), *layer_tables(scores)]
    timings = {
        f"{stage}, {name}": of["seconds"][stage] for name, of in scores["models"].items() for stage in of["seconds"]
    }
    captioned: dict[str, Any] = {}
    if images:
        began = time.monotonic()
        captions = write_captions(systems, images, options.out, **resources)
        timings["captions"] = time.monotonic() - began
        captioned["caption_table"] = statistics_table(captions)
        captioned["captions"] = caption_comparisons(captions, [picture.image for picture in images])
        tables.append(captioned["caption_table"])
    write_results(scores, options.out)
    console = Console()
    for table in tables:
        console.print(as_rich(table))
    last = list(options.models)[-1]
    report = storage.join(options.out, "report.html")
    write_report(
        report,
        title="Evaluation: " + ", ".join(options.models),
        command=command,
        scores=scores,
        grids=grids_of(scores, tasks, options.out, last),
        wrong_choices=wrong_choices_of(scores, tasks, options.out, last),
        timings=timings,
        highlights=headline_highlights(scores),
        **captioned,
    )
    print(f"{storage.join(options.out, 'scores.json')} and {report}, in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
