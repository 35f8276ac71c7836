#!/usr/bin/env python
"""Export a model for other people's software: `jobs/export.py RUN_OR_MODEL --out FOLDER [--to sentence-transformers]`.

    adapter                the adapter alone, in PEFT's format
    hf                     a merged checkpoint for transformers
    sentence-transformers  the same, for SentenceTransformer(FOLDER).encode(...)
    vllm                   the same, for vllm serve FOLDER --runner pooling

The last three are one folder that is right for all of them, with a model card that shows the call for each tool. Before
the folder appears, plain transformers embeds a probe text and a probe image from it: token ids must be ours, and the
embeddings as close to ours as the precision allows.
"""

from __future__ import annotations

import argparse
import sys

from vladva.core.cli import local_folder, location, user_errors
from vladva.export.checkpoint import DTYPES
from vladva.export.pipeline import EXPORT_FORMS


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="jobs/export.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="RUN_OR_MODEL", help="run or checkpoint folder, `tiny` or Hugging Face name")
    parser.add_argument("--out", required=True, type=local_folder, help="new folder for the exported model")
    parser.add_argument("--to", choices=EXPORT_FORMS, default="sentence-transformers", help="what to write")
    parser.add_argument("--layers", type=int, metavar="K", help="keep K layers, and embed from the last of them")
    parser.add_argument("--dimensions", type=int, metavar="D", help="cut embeddings to D numbers; trained for")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the written weights")
    parser.add_argument("--name", default="", help="of the model in its card (default: the folder's)")
    parser.add_argument("--licence", default="", help="of the base model, by the Hub's short name, e.g. apache-2.0")
    parser.add_argument(
        "--scores", type=location, default="", metavar="URI", help="scores.json of jobs/evaluate.py, for the card"
    )
    parser.add_argument("--push", default="", metavar="USER/NAME", help="upload to the Hub as this, private")
    parser.add_argument("--public", action="store_true", help="with --push: for everybody to see")
    return parser.parse_args(arguments)


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])
    if options.public and not options.push:
        raise ValueError("--public says how to push; say where to with --push USER/NAME")

    from vladva.core import storage
    from vladva.export.pipeline import export_model, push

    exported = export_model(
        options.model,
        options.out,
        to=options.to,
        layer=options.layers,
        dimensions=options.dimensions,
        dtype=options.dtype,
        licence=options.licence,
        scores=storage.read_json(options.scores) if options.scores else None,
        name=options.name,
    )
    proof = "" if exported.cosine is None else f"; probe embedded by transformers: cosine {exported.cosine:.6f} to ours"
    print(f"{exported.folder}: exported as {options.to}{proof}")
    if options.push:
        print(push(exported.folder, options.push, private=not options.public))


if __name__ == "__main__":
    main()
