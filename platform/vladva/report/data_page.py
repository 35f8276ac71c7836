"""Summary page: what a source has become, with plots and images, as one self-contained HTML page."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from textwrap import shorten
from typing import Any

import pyarrow.parquet as pq

from vladva.config import DataConfig
from vladva.core import storage
from vladva.core.sampling import spread
from vladva.data.shard_index import ShardIndex, read_samples
from vladva.prepare.pipeline import Prepared
from vladva.prepare.statistics import CAPTIONS_PER_IMAGE, MEGAPIXEL_BOUNDS, SIDE_BOUNDS, TOKEN_BOUNDS, DatasetStatistics
from vladva.report.html import Highlight, data_uri, page_environment
from vladva.report.svg import heat_map, histogram

SHEET_IMAGES = 12
EXAMPLES = 3  # of each reason
CAPTIONS_SHOWN = 3  # of each image
CAPTION_WIDTH = 240  # characters of each
SHORT, LONG, UNUSED = 1, 2, 0  # numbers of colours


@dataclass(frozen=True)
class Shown:
    """An image of the contact sheet, with a few of its captions and how many more there are."""

    id: str
    image: str
    size: str
    captions: Sequence[str]
    more: int


def write_page(uri: str, prepared: Prepared, summary: DatasetStatistics, command: str) -> str:
    """Write the page to `uri`, or to summary.html beside the index; where it is."""
    page = (
        page_environment()
        .get_template("summary.html.j2")
        .render(
            title=f"Data: {prepared.uri.rpartition('/')[2]}",
            prepared=prepared,
            summary=summary,
            kinds=summary.kinds(),
            data=DataConfig,
            highlights=highlights(prepared, summary),
            ledger=ledger(prepared),
            tokens=token_figure(summary),
            captions_per_image=per_image_figure(summary),
            megapixels=megapixel_figure(summary),
            sizes=size_figure(summary),
            copies={"images": summary.images, "captions": summary.captions},
            quarantine=quarantine(prepared.quarantine_uri),
            images=contact_sheet(prepared.uri),
            command=command,
        )
    )
    uri = uri or storage.join(prepared.uri, "_index/summary.html")
    storage.write_bytes_atomically(uri, page.encode())
    return uri


def highlights(prepared: Prepared, summary: DatasetStatistics) -> list[Highlight]:
    """The figures at the head of the page."""
    kinds = summary.kinds()
    images = summary.num_samples - summary.texts_alone
    mean = summary.image_bytes / max(1, images)
    per_sample = summary.num_captions / max(1, summary.num_samples)
    bad = sum(prepared.quarantined.values())
    return [
        Highlight("samples", f"{summary.num_samples:,}", f"in {summary.num_shards:,} shards"),
        Highlight("images", size_of(summary.image_bytes), f"{size_of(mean)} each"),
        Highlight("captions", f"{summary.num_captions:,}", f"{per_sample:.1f} per sample; {kinds['long']:,} long"),
        Highlight("quarantined", f"{bad:,}", f"{bad / max(1, bad + summary.num_samples):.2%} of the samples"),
        Highlight(
            "copies", f"{summary.images.num_duplicates:,}", f"images; {summary.captions.num_duplicates:,} captions"
        ),
    ]


def ledger(prepared: Prepared) -> list[tuple[str, int]]:
    """What the source named, and where it went; the rest of the lines add up to the first."""
    return [
        ("found in the source", prepared.found),
        ("samples in the index", prepared.samples),
        *([("further rows of the same images: their captions were added", prepared.merged)] if prepared.merged else []),
        *((f"left out: {reason}", count) for reason, count in prepared.left_out.items()),
        *((f"quarantined: {reason}", count) for reason, count in prepared.quarantined.items()),
    ]


# --- figures ---------------------------------------------------------------------------------------------------------


def token_figure(summary: DatasetStatistics) -> str:
    """Captions by length, coloured by what training does with them."""
    bins = bins_of(summary.tokens, len(TOKEN_BOUNDS))
    kinds = [
        SHORT if TOKEN_BOUNDS[bin_] < DataConfig.short_below else LONG if TOKEN_BOUNDS[bin_] < DataConfig.long_below
        else UNUSED
        for bin_ in bins
    ]  # fmt: skip
    names = [span(TOKEN_BOUNDS, bin_, 1) for bin_ in bins]
    counts = {name: summary.tokens[bin_] for name, bin_ in zip(names, bins, strict=True)}
    return histogram(counts, kinds=kinds, label="Captions by length in tokens", width=760)


def per_image_figure(summary: DatasetStatistics) -> str:
    """Samples by their number of captions."""
    bins = bins_of(summary.captions_per_image, CAPTIONS_PER_IMAGE + 1)
    counts = {f"{n}{'+' * (n == CAPTIONS_PER_IMAGE)}": summary.captions_per_image[n] for n in bins}
    return histogram(counts, label="Samples by number of captions")


def megapixel_figure(summary: DatasetStatistics) -> str:
    """Images by area."""
    bins = bins_of(summary.megapixels, len(MEGAPIXEL_BOUNDS))
    counts = {span(MEGAPIXEL_BOUNDS, bin_): summary.megapixels[bin_] for bin_ in bins}
    return histogram(counts, label="Images by area in megapixels")


def size_figure(summary: DatasetStatistics) -> str:
    """Images by width and height."""
    return heat_map(
        summary.sizes, SIDE_BOUNDS, label="Images by width and height", axes=("width, pixels", "height, pixels")
    )


def bins_of(counts: Counter[int], number: int) -> range:
    """The bins from the first to the last that holds something."""
    return range(min(counts, default=0), max(counts, default=number - 1) + 1)


def span(bounds: Sequence[float], bin_: int, step: int = 0) -> str:
    """A bin's name: from its lower bound to `step` below the next."""
    if bin_ == len(bounds) - 1:
        return f"{bounds[bin_]:g}+"
    return f"{bounds[bin_]:g}\N{EN DASH}{bounds[bin_ + 1] - step:g}"


def size_of(count: float) -> str:
    """Bytes in a unit that gives few digits."""
    power = min(4, int(math.log(max(count, 1), 1000)))
    return f"{count / 1000**power:,.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB', 'TB')[power]}"


# --- samples ---------------------------------------------------------------------------------------------------------


def quarantine(uri: str) -> dict[str, tuple[int, list[dict[str, Any]]]]:
    """Reason -> how many, and the first few, most frequent first."""
    counts: Counter[str] = Counter()
    examples: dict[str, list[dict[str, Any]]] = {}
    for batch in pq.ParquetFile(storage.RangedFile(uri)).iter_batches():
        for row in batch.to_pylist():
            counts[row["reason"]] += 1
            if counts[row["reason"]] <= EXAMPLES:
                examples.setdefault(row["reason"], []).append(row)
    return {reason: (count, examples[reason]) for reason, count in counts.most_common()}


def contact_sheet(data_folder_uri: str) -> list[Shown]:
    """Images at even distances of the whole data set."""
    index = ShardIndex.open(data_folder_uri)
    refs = [index.samples(number, 1)[0] for number in spread(index.num_samples, SHEET_IMAGES)]
    refs = [ref for ref in refs if ref.width]
    return [
        Shown(
            id=ref.id,
            image=data_uri(data),
            size=f"{ref.width} x {ref.height}",
            captions=[shorten(caption, CAPTION_WIDTH, placeholder=" ...") for caption in ref.captions[:CAPTIONS_SHOWN]],
            more=max(0, len(ref.captions) - CAPTIONS_SHOWN),
        )
        for ref, data in zip(refs, read_samples(data_folder_uri, refs), strict=True)
    ]
