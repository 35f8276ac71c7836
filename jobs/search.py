#!/usr/bin/env python
"""Search an index: `jobs/search.py INDEX "a red circle" --model RUN_OR_MODEL`, or `--image IMAGE` in place of a text.

Prints the hits with their scores and captions; --html writes a page that also shows the images.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from vladva.core.cli import user_errors

if TYPE_CHECKING:
    import numpy as np

    from vladva.index.store import Hit
    from vladva.models.interface import Embeds


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments. Raises ValueError for no query, or two."""
    parser = argparse.ArgumentParser(
        prog="jobs/search.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("index", metavar="INDEX", help="folder or s3://... of the index")
    parser.add_argument("query", nargs="?", help="a text")
    parser.add_argument("--image", help="an image to search with: path or s3://...")
    parser.add_argument("--model", required=True, metavar="RUN_OR_MODEL", help="the model that made the index")
    parser.add_argument("--no-adapter", action="store_true", help="the base model, zero-shot")
    parser.add_argument("-k", "--k", type=int, default=5, help="hits")
    parser.add_argument("--filter", help="SQL condition on the columns: \"kind = 'image' AND length < 5000\"")
    parser.add_argument("--version", help="tag or number of the version; the newest by default")
    parser.add_argument("--html", help="page to write, with images")
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
    hits = index.search(embed_query(embedder, options), options.k, filter=options.filter)
    print_hits(hits)
    if options.html:
        from vladva.core import storage
        from vladva.report.search_page import hits_page

        query = options.query or options.image
        storage.write_bytes_atomically(options.html, hits_page(query, hits, index.corpus).encode())
        print(f"images: {options.html}")


if __name__ == "__main__":
    main()
