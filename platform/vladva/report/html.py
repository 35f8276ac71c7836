"""HTML: what the pages share: the template environment, header rows, images as data URIs."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from markupsafe import Markup, escape
from PIL import Image

from vladva.core.images import decode_image
from vladva.report.svg import colour
from vladva.report.tables import ScoreTable

if TYPE_CHECKING:
    import jinja2


THUMBNAIL = 256  # pixels; larger images are shrunk to this


class Highlight(NamedTuple):
    """A figure for the head of the page."""

    label: str
    value: str
    detail: str = ""


def page_environment() -> jinja2.Environment:
    """What renders the templates of pages."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("vladva.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {
        "data_uri": data_uri,
        "header": header_rows,
        "colour": _colour,
        "seconds": _seconds,
        "mark": _mark,
    }
    return environment


def header_rows(table: ScoreTable) -> list[list[tuple[str, int, bool]]]:
    """The headings of a table row by row: (text, columns it spans, whether a group of columns starts here)."""
    rows = []
    for level in range(len(table.headings[0])):
        row, column = [], 0
        for prefix, same in groupby(heading[: level + 1] for heading in table.headings):
            width = len(list(same))
            row.append((prefix[-1], width, column in table.group_starts))
            column += width
        rows.append(row)
    return rows


def data_uri(image_bytes: bytes) -> str:
    """An encoded image as a `data:` URI, shrunk to what the page can show."""
    opened = Image.open(io.BytesIO(image_bytes))
    form = opened.format
    if max(opened.size) > THUMBNAIL:
        small = decode_image(image_bytes)  # upright and on white, as the model saw it
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        data = io.BytesIO()
        small.save(data, "JPEG", quality=85)
        image_bytes, form = data.getvalue(), "JPEG"
    return f"data:image/{str(form).lower()};base64,{base64.b64encode(image_bytes).decode()}"


def _colour(label: str, labels: Sequence[str]) -> str:
    return colour(list(labels).index(label), len(labels))


def _mark(caption: str, objects: Sequence[str]) -> Markup:
    """The caption as HTML, with the objects that it names marked."""
    if not objects:
        return escape(caption)
    parts = re.split(rf"\b({'|'.join(map(re.escape, objects))})(?=s?\b)", caption, flags=re.IGNORECASE)
    return Markup("").join(
        escape(part) if i % 2 == 0 else Markup("<mark>{}</mark>").format(part) for i, part in enumerate(parts)
    )


def _seconds(value: float) -> str:
    return f"{value:.1f} s" if value < 60 else f"{int(value // 60)} min {value % 60:.0f} s"
