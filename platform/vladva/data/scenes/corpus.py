"""The corpus of scenes: training and held-out scenes, written as shards and benchmark files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from itertools import combinations
from random import Random
from typing import TYPE_CHECKING

from vladva.data.scenes.captions import HARD_NEGATIVES, captions, hard_negative
from vladva.data.scenes.scene import Scene, png, random_scene, relation, render, siblings

if TYPE_CHECKING:
    from collections.abc import Callable


def scenes(split: str, seed: int = 0) -> Iterator[tuple[Scene, Random]]:
    """Endless scenes of a split with the random generator that words them; the n-th is the same in every run."""
    number = 0
    while True:
        random = Random(f"{seed}/{split}/{number}")
        yield random_scene(random, split), random
        number += 1


def training_scenes(seed: int = 0) -> Iterator[tuple[Scene, Random]]:
    """Endless training scenes, each followed by its siblings."""
    for scene, random in scenes("train", seed):
        for member in (scene, *siblings(scene, random)):
            yield member, random


def pair_facts(scene: Scene) -> set[tuple[object, ...]]:
    """What a caption of two objects can state of the scene: two objects, with sizes, and their relation."""
    things = sorted(scene.objects, key=lambda o: (o.size, o.colour, o.shape))
    return {(*((o.size, o.colour, o.shape) for o in pair), relation(*pair)) for pair in combinations(things, 2)}


def held_out_scenes(count: int, seed: int = 0) -> Iterator[tuple[Scene, list[str], Random]]:
    """Test scenes with captions, such that no caption repeats and no complete caption of one is true of another."""
    pairs: set[tuple[object, ...]] = set()  # facts of every scene
    whole: set[tuple[object, ...]] = set()  # facts that are the whole of a scene: of two objects, or the three objects
    texts: set[str] = set()
    for scene, random in scenes("test", seed):
        if len(texts) == count:
            return
        facts, worded = pair_facts(scene), captions(scene, random)
        three = tuple(sorted((o.size, o.colour, o.shape) for o in scene.objects)) if len(scene.objects) == 3 else None
        ambiguous = facts & (whole if three else pairs) or three in whole
        if not ambiguous and worded[0] not in texts:
            pairs |= facts
            whole |= {three} if three else facts
            texts.add(worded[0])
            yield scene, worded, random


def write_scenes(
    uri: str,
    *,
    train: int = 20_000,
    test: int = 1_000,
    negatives: int = 250,
    seed: int = 0,
    samples_per_shard: int = 1_000,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write the corpus under `uri`: train/ and test/ shards, test/retrieval.json, compositionality/KIND.json.

    `retrieval.json` is a list of {"image", "caption": [str]} with one complete caption an image, the compositionality
    files are in SugarCrepe's own form with `negatives` rows each (fewer where the test scenes do not give as many).
    """
    from vladva.core import storage
    from vladva.data.shard_writer import ShardWriter

    done = 0
    with ShardWriter(storage.join(uri, "train"), samples_per_shard) as shards:
        for number, (scene, random) in zip(range(train), training_scenes(seed), strict=False):
            meta = {"captions": captions(scene, random), "scene": asdict(scene)}
            shards.write(f"{number:06d}", {"png": png(render(scene)), "json": json.dumps(meta).encode()})
            done += 1
            progress(done)

    queries: list[dict[str, object]] = []
    rows: dict[str, dict[str, dict[str, str]]] = {kind: {} for kind in HARD_NEGATIVES}
    with ShardWriter(storage.join(uri, "test"), samples_per_shard) as shards:
        for number, (scene, worded, random) in enumerate(held_out_scenes(test, seed)):
            name = f"{number:06d}"
            meta = {"captions": worded, "scene": asdict(scene)}
            shards.write(name, {"png": png(render(scene)), "json": json.dumps(meta).encode()})
            queries.append({"image": f"{name}.png", "caption": [worded[0]]})
            for kind in HARD_NEGATIVES:
                pair = hard_negative(kind, scene, random)
                if pair and len(rows[kind]) < negatives:
                    row = {"filename": f"{name}.png", "caption": pair[0], "negative_caption": pair[1]}
                    rows[kind][str(len(rows[kind]))] = row
            done += 1
            progress(done)
    storage.write_json(storage.join(uri, "test", "retrieval.json"), queries)
    for kind, content in rows.items():
        storage.write_json(storage.join(uri, "compositionality", f"{kind}.json"), content)


def write_triplets(uri: str, *, count: int = 20_000, seed: int = 0, samples_per_shard: int = 1_000) -> None:
    """Write shards of text alone, in the form of NLI data: a sentence, another that follows from it, and a false one.

    All three are captions of a training scene; the false one is a hard negative of the true one.
    """
    from vladva.data.shard_writer import ShardWriter

    with ShardWriter(uri, samples_per_shard) as shards:
        for number, (scene, random) in zip(range(count), training_scenes(seed), strict=False):
            sentence = captions(scene, random)[0]
            pairs = (hard_negative(random.choice(HARD_NEGATIVES), scene, random) for _ in range(100))
            entailed, contradicted = next(pair for pair in pairs if pair)
            content = {"text": sentence, "captions": [entailed], "negatives": [contradicted]}
            shards.write(f"{number:06d}", {"json": json.dumps(content).encode()})
