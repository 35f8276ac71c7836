"""Outcomes -> images to look at: what was found, what was confused with what, and which false caption won.

Successes are taken at even distances, not picked. Failures are picked to teach: first the near misses of which the
model was surest (the right one is among the five, another is clearly ahead), then the right ones ranked lowest.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa

from vladva.benchmarks.benchmark import Task
from vladva.benchmarks.protocols.caption_choice import CaptionChoiceTask
from vladva.benchmarks.protocols.matching import MatchingTask
from vladva.benchmarks.protocols.retrieval import RetrievalTask
from vladva.benchmarks.protocols.two_captions import TwoCaptionsTask
from vladva.core.sampling import spread
from vladva.data.image_refs import ImageRef, read_images
from vladva.evaluate.scores import Scores
from vladva.evaluate.scoring import read_outcomes

HITS = 5


class GridHit(NamedTuple):
    """One neighbour of a query: an image (encoded bytes) or a text."""

    content: bytes | str
    similarity: float
    right: bool


class GridRow(NamedTuple):
    """A query and its nearest neighbours, best first. `answer` is the right one where it is not among them."""

    query: bytes | str
    hits: list[GridHit]
    rank: int  # of the right one, from 1
    answer: bytes | str | None = None


class Grid(NamedTuple):
    """Rows that show one thing."""

    title: str
    note: str
    rows: list[GridRow]


class Choice(NamedTuple):
    """An image, a true and a false caption, and their cosines with it."""

    kind: str
    image: ImageRef
    caption: str
    negative: str
    caption_score: float
    negative_score: float


class WrongChoice(NamedTuple):
    """An image for which the false caption won."""

    kind: str
    image: bytes
    caption: str
    negative: str
    caption_score: float
    negative_score: float


class CaptionComparison(NamedTuple):
    """What several systems write about one image."""

    image: bytes
    prompt: str
    captions: Mapping[str, str]  # by system
    objects: Sequence[str] = ()  # known to be in the image


def grids_of(scores: Scores, tasks: Mapping[str, Task], out_uri: str, label: str) -> dict[str, list[Grid]]:
    """Grids of all retrieval benchmarks of an evaluation for the system `label`, by a heading that names both."""
    return {
        _heading(scores, name, label): retrieval_grids(read_outcomes(out_uri, label, name), task.images)
        for name, task in tasks.items()
        if isinstance(task, RetrievalTask)
    }


def wrong_choices_of(
    scores: Scores, tasks: Mapping[str, Task], out_uri: str, label: str
) -> dict[str, list[WrongChoice]]:
    """Wrong choices in all compositional benchmarks of an evaluation for the system `label`, by a heading."""
    found: dict[str, list[WrongChoice]] = {}
    for name, task in tasks.items():
        if isinstance(task, (CaptionChoiceTask, TwoCaptionsTask, MatchingTask)):
            choices = choices_of(task, read_outcomes(out_uri, label, name))
            found[_heading(scores, name, label)] = wrong_choices(choices)
    return found


def caption_comparisons(captions: pa.Table, images: Sequence[ImageRef], *, count: int = 6) -> list[CaptionComparison]:
    """From the table of `write_captions`: a few images at even distances, each with all prompts."""
    by_prompt: dict[tuple[str, str], dict[str, str]] = {}
    objects: dict[str, list[str]] = {}
    for row in captions.to_pylist():
        by_prompt.setdefault((row["picture"], row["prompt"]), {})[row["system"]] = row["caption"]
        objects[row["picture"]] = row["objects"]
    prompts = list(dict.fromkeys(prompt for _, prompt in by_prompt))
    chosen = [images[i] for i in spread(len(images), count)]
    return [
        CaptionComparison(data, prompt, by_prompt[image.id, prompt], objects[image.id])
        for image, data in zip(chosen, read_images(chosen), strict=True)
        for prompt in prompts
    ]


def retrieval_grids(
    outcomes: pa.Table, images: Sequence[ImageRef], *, successes: int = 3, near: int = 4, far: int = 2
) -> list[Grid]:
    """Grids of a retrieval benchmark, from its outcomes and the images of its task."""
    by_name = {image.name: image for image in images}
    rows = [row for row in outcomes.to_pylist() if row["task"] == "t2i"]
    first = [row for row in rows if row["rank"] == 1]
    missed = [row for row in rows if 1 < row["rank"] <= HITS]
    missed.sort(key=lambda row: row["similarity"][row["rank"] - 1] - row["similarity"][0])
    lost = sorted((row for row in rows if row["rank"] > HITS), key=lambda row: -row["rank"])
    grids = [
        (
            "Found first",
            f"{len(first):,} of {len(rows):,} captions; shown at even distances.",
            [first[i] for i in spread(len(first), successes)],
        ),
        ("Near misses", f"{len(missed):,} captions; the surest mistakes first.", missed[:near]),
        (f"Not among the first {HITS}", f"{len(lost):,} captions; the right image is ranked lowest.", lost[:far]),
    ]
    contents = _images([row for _, _, chosen in grids for row in chosen], by_name)
    return [
        Grid(title, note, [_text_to_image(row, contents) for row in chosen]) for title, note, chosen in grids if chosen
    ] + _image_to_text(outcomes, by_name, successes)


def choices_of(task: CaptionChoiceTask | TwoCaptionsTask | MatchingTask, outcomes: pa.Table) -> list[Choice]:
    """Every image with a true and a false caption that a compositional benchmark sets against each other.

    Of two true captions (SugarCrepe++) the weaker one; Winoground sets each image's caption against the other's.
    """
    rows = outcomes.to_pylist()
    if isinstance(task, MatchingTask):
        return [
            Choice(
                f"{row['tag']}, {row['sample']}",
                task.images[side * len(rows) + number],
                row[f"caption_{side}"],
                row[f"caption_{1 - side}"],
                row[f"cosine_c{side}_i{side}"],
                row[f"cosine_c{1 - side}_i{side}"],
            )
            for number, row in enumerate(rows)
            for side in (0, 1)
        ]
    by_name = {image.name: image for image in task.images}
    if isinstance(task, TwoCaptionsTask):
        for row in rows:
            weaker = min(("caption", "cosine_i_p1"), ("caption2", "cosine_i_p2"), key=lambda names: row[names[1]])
            row["caption"], row["caption_score"] = (row[name] for name in weaker)
            row["negative_score"] = row["cosine_i_n"]
    columns = ("caption", "negative_caption", "caption_score", "negative_score")
    return [Choice(row["task"], by_name[row["image"]], *(row[column] for column in columns)) for row in rows]


def wrong_choices(choices: Sequence[Choice], *, per_kind: int = 2, most: int = 14) -> list[WrongChoice]:
    """For each kind of choice, the images where the false caption won by most; kinds with the worst ones first."""
    lost: dict[str, list[Choice]] = {}
    for choice in sorted(choices, key=lambda choice: choice.caption_score - choice.negative_score):
        if choice.negative_score >= choice.caption_score:
            lost.setdefault(choice.kind, []).append(choice)
    chosen = [choice for of_kind in lost.values() for choice in of_kind[:per_kind]][:most]
    data = read_images([choice.image for choice in chosen])
    return [WrongChoice(choice.kind, image, *choice[2:]) for choice, image in zip(chosen, data, strict=True)]


def _heading(scores: Scores, benchmark: str, label: str) -> str:
    return f"{scores['benchmarks'][benchmark]['title']}, {label}"


def _image_to_text(outcomes: pa.Table, by_name: dict[str, ImageRef], count: int) -> list[Grid]:
    rows = [row for row in outcomes.to_pylist() if row["task"] == "i2t"]
    missed = sorted(
        (row for row in rows if row["rank"] > 1), key=lambda row: (row["rank"] > HITS, -row["similarity"][0])
    )[:count]
    contents = read_images([by_name[row["query"]] for row in missed])
    grid = [
        GridRow(content, _hits(row, row["nearest"]), row["rank"]) for row, content in zip(missed, contents, strict=True)
    ]
    total = sum(row["rank"] > 1 for row in rows)
    note = f"{total:,} of {len(rows):,} images whose nearest caption belongs to another image; the surest first."
    return [Grid("Images given another's caption", note, grid)] if grid else []


def _text_to_image(row: dict[str, Any], contents: dict[str, bytes]) -> GridRow:
    hits = _hits(row, [contents[name] for name in row["nearest"][:HITS]])
    answer = None if any(hit.right for hit in hits) else contents[row["image"]]
    return GridRow(row["query"], hits, row["rank"], answer)


def _hits(row: dict[str, Any], contents: Sequence[bytes | str]) -> list[GridHit]:
    found = zip(contents[:HITS], row["similarity"], row["right"], strict=False)
    return [GridHit(content, similarity, right) for content, similarity, right in found]


def _images(rows: list[dict[str, Any]], by_name: dict[str, ImageRef]) -> dict[str, bytes]:
    names = list(dict.fromkeys(name for row in rows for name in [*row["nearest"][:HITS], row["image"]]))
    return dict(zip(names, read_images([by_name[name] for name in names]), strict=True))
