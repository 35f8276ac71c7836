"""Hits page: the answer to one query as a self-contained HTML page, with images."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from vladva.embed.corpus import PLACE, read_item_images
from vladva.index.store import Hit


def hits_page(query: str, hits: Sequence[Hit], corpus: str) -> str:
    """The page; images come from the corpus that was embedded, and are left out where it has moved."""
    from jinja2 import Environment, PackageLoader

    template = Environment(loader=PackageLoader("vladva.report"), autoescape=True).get_template("hits.html.j2")
    shown = [
        {"id": hit.id, "score": hit.score, "caption": caption_of(hit), "image": _image(hit.columns, corpus)}
        for hit in hits
    ]
    return template.render(query=query, hits=shown)


def caption_of(hit: Hit) -> str:
    """What a hit's row says about itself: the image's caption, or the text that was embedded."""
    return hit.columns.get("caption") or hit.columns.get("text") or ""


def _image(columns: dict[str, Any], corpus: str) -> str | None:
    """The image as a data URI, where the row says where it is."""
    from PIL import Image

    if columns["kind"] != "image" or not columns.get("shard"):
        return None
    try:
        (data,) = read_item_images(corpus, [{name: columns.get(name) for name in PLACE}])
    except (OSError, ValueError):
        return None
    mime = Image.MIME[Image.open(io.BytesIO(data)).format or "PNG"]
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
