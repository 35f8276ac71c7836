#!/usr/bin/env python
"""Search an index: `jobs/search.py INDEX "a red circle" --model RUN_OR_MODEL`, or `--image IMAGE` in place of a text.

Prints the hits with their scores and captions; --html writes a page that also shows the images.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vladva.core.cli import location, user_errors

if TYPE_CHECKING:
    import numpy as np

    from vladva.index.store import Hit
    from vladva.models.interface import Embeds


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments. Raises ValueError for no query, or two."""
    parser = argparse.ArgumentParser(
        prog="jobs/search.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", type=location, metavar="INDEX", help="folder or s3://... of the index")
    parser.add_argument("query", nargs="?", help="a text")
    parser.add_argument("--image", type=location, help="an image to search with: path or s3://...")
    parser.add_argument("--model", required=True, metavar="RUN_OR_MODEL", help="the model that made the index")
    parser.add_argument("--no-adapter", action="store_true", help="the base model, zero-shot")
    parser.add_argument("-k", "--k", type=int, default=5, help="hits")
    parser.add_argument(
        "--rerank", type=int, default=0, metavar="K", help="put the K nearest in the order of the generator's P(yes)"
    )
    parser.add_argument("--filter", help="SQL condition on the columns: \"kind = 'image' AND length < 5000\"")
    parser.add_argument("--version", help="tag or number of the version; the newest by default")
    parser.add_argument("--html", type=location, help="page to write, with images")
    options = parser.parse_intermixed_args(arguments)
    if (options.query is None) == (options.image is None):
        raise ValueError("give one query: a text, or --image IMAGE")
    return options


def embed_query(embedder: Embeds, options: argparse.Namespace) -> np.ndarray:
    """The query's vector [D]."""
    from vladva.core import storage
    from vladva.core.images import decode_image

    if options.image is None:
        return embedder.embed_texts([options.query])[0]
    return embedder.embed_images([decode_image(storage.read_bytes(options.image))])[0]


def in_generators_order(embedder: Embeds, options: argparse.Namespace, hits: list[Hit], corpus: str) -> list[Hit]:
    """The hits with P("yes") as their score, best first. Raises ValueError for a pair of two images, or two texts."""
    from dataclasses import replace

    from vladva.core import storage
    from vladva.core.images import decode_image
    from vladva.embed.corpus import read_item_images
    from vladva.models.embedder import Embedder
    from vladva.models.yes_probability import yes_probabilities

    if not isinstance(embedder, Embedder):
        raise ValueError(f"--rerank: {options.model} only embeds; name a model that can answer")
    wanted = "text" if options.image else "image"
    for hit in hits:
        if hit.columns["kind"] != wanted:
            raise ValueError(
                f"--rerank: {hit.id} is {hit.columns['kind']}, and the generator compares an image with a text; add "
                f"--filter \"kind = '{wanted}'\""
            )
    if options.image:
        images = [decode_image(storage.read_bytes(options.image))] * len(hits)
        texts = [hit.columns["text"] for hit in hits]
    else:
        images = [decode_image(data) for data in read_item_images(corpus, [hit.columns for hit in hits])]
        texts = [options.query] * len(hits)
    answers = yes_probabilities(embedder, images, texts)
    judged = [replace(hit, score=float(answer)) for hit, answer in zip(hits, answers, strict=True)]
    return sorted(judged, key=lambda hit: -hit.score)


def print_hits(hits: list[Hit]) -> None:
    """A line a hit."""
    from rich.console import Console
    from rich.table import Table

    from vladva.report.search_page import caption_of

    table = Table("score", "id", "caption", box=None, header_style="dim")
    for hit in hits:
        table.add_row(f"{hit.score:.4f}", hit.id, caption_of(hit))
    Console().print(table)


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])

    from vladva.index.vector_index import open_index
    from vladva.models.embedder import load_embedder

    version = int(options.version) if options.version and options.version.isdecimal() else options.version
    index = open_index(options.index, version=version)  # before the model: a wrong path is told at once
    embedder = load_embedder(options.model, adapter=not options.no_adapter)
    index.check(embedder.fingerprint)
    hits = index.search(embed_query(embedder, options), max(options.k, options.rerank), filter=options.filter)
    if options.rerank:
        hits = in_generators_order(embedder, options, hits[: options.rerank], index.corpus)
    hits = hits[: options.k]
    print_hits(hits)
    if options.html:
        from vladva.core import storage
        from vladva.report.search_page import hits_page

        query = options.query or options.image
        storage.write_bytes_atomically(options.html, hits_page(query, hits, index.corpus).encode())
        print(f"images: {options.html}")


if __name__ == "__main__":
    main()
