"""Captioning: what models write about the same images, asked with the same prompts (the paper's figure 1).

    images --actors that hold a model--> captions/<model>/<image>.json -> captions.parquet, captions.json

An image's captions are kept as soon as they are written, in a folder named after the model's exact contents, so that
an interrupted run goes on where it was. A model with an adapter writes with the adapter on: the question is what
training an embedder has left of the generator.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from vladva.benchmarks.benchmark import Task
from vladva.benchmarks.protocols.retrieval import RetrievalTask
from vladva.benchmarks.readers.images import find_images
from vladva.core.hashing import digest
from vladva.core.progress import Progress
from vladva.core.sampling import spread
from vladva.core.storage import absolute, exists, join, read_json, write_json
from vladva.data.image_refs import ImageRef
from vladva.data.scenes.scene import COLOURS, SHAPES
from vladva.embed.table import write_rows
from vladva.evaluate.caption_actor import CaptionActor

SCENE_OBJECT = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
FUNCTION_WORDS = frozenset(
    re.findall(
        r"\w+",
        "and are another as at be being behind beside between both by down each for from front has have her his in "
        "into its near next off one other out over own several she some that the their them there these they this "
        "three two under very while who with image photo picture",
    )
)


class ImageToCaption(NamedTuple):
    """An image to be captioned, and the objects that are known to be in it (none where nothing is known)."""

    image: ImageRef
    objects: frozenset[str]


def find_images_to_caption(tasks: Mapping[str, Task], folder_uri: str, count: int) -> list[ImageToCaption]:
    """`count` images of the folder, or where none is named of each retrieval benchmark."""
    return images_in(folder_uri, count) if folder_uri else images_of(tasks, count)


def images_of(tasks: Mapping[str, Task], count: int) -> list[ImageToCaption]:
    """`count` images at even distances of each retrieval benchmark, with the objects their captions name.

    Raises ValueError where there is no retrieval benchmark.
    """
    images: list[ImageToCaption] = []
    for name, task in tasks.items():
        if isinstance(task, RetrievalTask):
            read = scene_objects if name.startswith("scenes_") else agreed_words
            for number in spread(len(task.images), count):
                references = [task.texts[text] for text in task.caption_text[task.caption_image == number]]
                images.append(ImageToCaption(task.images[number], read(references)))
    if not images:
        raise ValueError("captions: no retrieval benchmark says what is in its images; name a folder with --images")
    return images


def images_in(folder_uri: str, count: int) -> list[ImageToCaption]:
    """`count` images at even distances of a folder of image files or tar shards. Raises ValueError for none."""
    parent, _, name = absolute(folder_uri).rstrip("/").rpartition("/")
    found = sorted((image.name, image) for image in find_images(parent, [name]))
    if not found:
        raise ValueError(f"--images: there are no images under {folder_uri}")
    return [ImageToCaption(found[number][1], frozenset()) for number in spread(len(found), count)]


def scene_objects(captions: Iterable[str]) -> frozenset[str]:
    """The objects of a scene that captions name, with their colour: `red circle`."""
    return frozenset(" ".join(found) for caption in captions for found in SCENE_OBJECT.findall(caption.lower()))


def agreed_words(captions: Sequence[str]) -> frozenset[str]:
    """Words that at least two captions of an image share (of a lone caption, all), function words left out."""
    counts = Counter(word for caption in captions for word in words_of(caption))
    return frozenset(word for word, count in counts.items() if count >= min(2, len(captions)))


def words_of(caption: str) -> set[str]:
    """The content words of a caption, in lower case and without a plural s."""
    words = {word for word in re.findall(r"[a-z]{3,}", caption.lower()) if word not in FUNCTION_WORDS}
    return {word[:-1] if len(word) > 3 and word.endswith("s") and not word.endswith("ss") else word for word in words}


def named(caption: str, objects: frozenset[str]) -> frozenset[str]:
    """Those of the objects that a caption names."""
    return objects & (scene_objects([caption]) | words_of(caption))


# ------------------------------------------------------------------------------------------------------------- writing


def write_captions(
    models: Mapping[str, str],
    images: Sequence[ImageToCaption],
    out_uri: str,
    *,
    actors: int = 2,
    gpus_per_actor: float = 0,
    dtype: str | None = None,
    max_tokens: int = 256,
) -> pa.Table:
    """Captions of all models (label -> run, checkpoint or model name) for all prompts; needs a Ray cluster.

    One row per (system, image, prompt): caption, words, tokens, objects named and objects known. Also written to
    `<out_uri>/captions.parquet`, and their statistics to `captions.json`.
    """
    rows = []
    for label, model in models.items():
        uris = _write(label, model, images, out_uri, actors, gpus_per_actor, dtype, max_tokens)
        for (image, objects), uri in zip(images, uris, strict=True):
            for caption in read_json(uri):
                found = named(caption["caption"], objects)
                row = {"system": label, "picture": image.id, **caption, "words": len(caption["caption"].split())}
                rows.append({**row, "named": sorted(found), "objects": sorted(objects)})
    table = pa.Table.from_pylist(rows)
    write_rows(join(out_uri, "captions.parquet"), table)
    means = {system: {p: of._asdict() for p, of in prompts.items()} for system, prompts in statistics(table).items()}
    write_json(join(out_uri, "captions.json"), {"pictures": len(images), "systems": means})
    return table


def writers(models: Mapping[str, str]) -> dict[str, str]:
    """The models that can write, and before them the base model of each adapter where it is not among them.

    Raises ValueError where none can: dual encoders only embed.
    """
    from vladva.models.dual_encoders import is_dual_encoder
    from vladva.models.resolve import find_model

    references = {label: find_model(model) for label, model in models.items()}
    references = {label: each for label, each in references.items() if not is_dual_encoder(each.checkpoint)}
    if not references:
        raise ValueError(f"captions: {', '.join(models)} only embed; name a model that can write")
    given = {reference.checkpoint for reference in references.values() if not reference.adapter}
    bases = {reference.checkpoint for reference in references.values() if reference.adapter} - given
    named_bases = {f"{base.rstrip('/').rpartition('/')[2]}, no adapter": base for base in sorted(bases)}
    return named_bases | {label: models[label] for label in references}


def _write(
    label: str,
    model: str,
    images: Sequence[ImageToCaption],
    out_uri: str,
    actors: int,
    gpus_per_actor: float,
    dtype: str | None,
    max_tokens: int,
) -> list[str]:
    """Write what is missing of one model's captions; where those of each image are."""
    import ray.data

    from vladva.core.ray_tasks import actor_cpus, actor_pool
    from vladva.models.resolve import describe, dtype_for, pin

    model = pin(model)
    dtype = dtype or dtype_for(model, gpus_per_actor)
    _, description = describe(model, adapter=True, dtype=dtype)
    folder = join(absolute(out_uri), "captions", f"{description['fingerprint']}-{dtype}-{max_tokens}")
    uris = [join(folder, f"{digest(each.image.id).hex()}.json") for each in images]
    missing = [
        {"image": json.dumps(each.image._asdict()), "uri": uri}
        for each, uri in zip(images, uris, strict=True)
        if not exists(uri)
    ]
    if missing:
        rows = ray.data.from_arrow([pa.Table.from_pylist([row]) for row in missing])
        rows.context.enable_progress_bars = False
        written = rows.map_batches(
            CaptionActor,
            fn_constructor_args=({"model": model, "merge": True, "dtype": dtype}, max_tokens),
            batch_size=1,
            batch_format="pyarrow",
            compute=actor_pool(min(actors, len(missing)), 1, gpus_per_actor),
            num_cpus=actor_cpus(1),
            num_gpus=gpus_per_actor,
        )
        with Progress(f"captions, {label}", len(missing)) as progress:
            for _ in written.iter_rows():
                progress.advance(1)
    return uris


# ---------------------------------------------------------------------------------------------------------- statistics


class CaptionStatistics(NamedTuple):
    """Means over the images, for one system and one prompt."""

    words: float
    tokens: float
    object_recall: float | None  # share of the known objects that a caption names; None where nothing is known


def statistics(captions: pa.Table) -> dict[str, dict[str, CaptionStatistics]]:
    """System -> prompt -> statistics."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in captions.to_pylist():
        found.setdefault(row["system"], {}).setdefault(row["prompt"], []).append(row)
    return {system: {prompt: _means(rows) for prompt, rows in prompts.items()} for system, prompts in found.items()}


def _means(rows: list[dict[str, Any]]) -> CaptionStatistics:
    recalls = [len(row["named"]) / len(row["objects"]) for row in rows if row["objects"]]
    return CaptionStatistics(
        words=float(np.mean([row["words"] for row in rows])),
        tokens=float(np.mean([row["tokens"] for row in rows])),
        object_recall=float(np.mean(recalls)) if recalls else None,
    )
