"""Composed retrieval on scenes: an image, a change in words ("but the red circle in blue"), and the image after it.

Of every scene there are several changes, so the image alone does not tell which picture is meant; nor do the words
alone, which fit many scenes. Changes are held out like pairs of objects are: one in five (from one colour and shape to
another) is never seen in training, and every test query asks for such a one, of a test scene.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from random import Random

from vladva.data.scenes.corpus import scenes
from vladva.data.scenes.scene import COLOURS, SHAPES, Scene, is_held_out, is_possible, png, render

CHANGES_OF_A_SCENE = 4
RECOLOURED = ("but the {old} in {new}", "make the {old} {new}", "the {old} turns {new}")
RESHAPED = ("but a {new} in place of the {old}", "turn the {old} into a {new}", "the {old} becomes a {new}")


@dataclass(frozen=True)
class ChangedScene:
    """A scene, what is to change in it, and the scene after it."""

    before: Scene
    words: str
    after: Scene


def changes(scene: Scene, random: Random, split: str) -> list[ChangedScene]:
    """Changes of one object's colour or shape, in random order: in `test` held-out ones, in `train` others."""
    found = []
    kinds = [(thing.colour, thing.shape) for thing in scene.objects]
    for i, (colour, shape) in enumerate(kinds):
        wanted = [(new, shape, RECOLOURED, new) for new in COLOURS if new != colour]
        wanted += [(colour, new, RESHAPED, new) for new in SHAPES if new != shape]
        for new_colour, new_shape, wordings, new in wanted:
            changed = replace(scene.objects[i], colour=new_colour, shape=new_shape)
            objects = (*scene.objects[:i], changed, *scene.objects[i + 1 :])
            held_out = is_held_out((colour, shape), (new_colour, new_shape))
            allowed = held_out if split == "test" else not held_out and is_possible(objects)
            if allowed and (new_colour, new_shape) not in kinds:
                words = random.choice(wordings).format(old=f"{colour} {shape}", new=new)
                found.append(ChangedScene(scene, words, Scene(objects, scene.background)))
    return random.sample(found, len(found))


def changed_scenes(split: str, seed: int = 0) -> Iterator[list[ChangedScene]]:
    """Endless scenes of a split, each with several changes."""
    for scene, random in scenes(split, seed):
        found = changes(scene, random, split)[:CHANGES_OF_A_SCENE]
        if len(found) > 1:
            yield found


def write_composed(
    uri: str,
    *,
    train: int = 8_000,
    test: int = 1_000,
    seed: int = 0,
    samples_per_shard: int = 1_000,
    progress: Callable[[int], None] = lambda done: None,
) -> None:
    """Write `train` pairs as shards under `uri`/train, `test` queries as images and composed.json under `uri`/test.

    A pair's image is asked with the words, and its positive is another image; the pairs of one scene are neighbours.
    composed.json: a list of {"image", "text", "target"}.
    """
    from vladva.core import storage
    from vladva.data.shard_writer import ShardWriter

    done = 0
    every = (change for found in changed_scenes("train", seed) for change in found)
    with ShardWriter(storage.join(uri, "train"), samples_per_shard) as shards:
        for number, change in enumerate(islice(every, train)):
            pair = {"query": {"text": change.words}, "positive": {"image": "positive.png"}}
            members = {"png": png(render(change.before)), "positive.png": png(render(change.after))}
            shards.write(f"{number:06d}", {**members, "json": json.dumps(pair).encode()})
            done += 1
            progress(done)
    queries: list[dict[str, str]] = []
    with ShardWriter(storage.join(uri, "test"), samples_per_shard) as shards:
        for number, found in enumerate(changed_scenes("test", seed)):
            shards.write(f"{number:06d}", {"png": png(render(found[0].before))})
            for i, change in enumerate(found[: test - len(queries)]):
                shards.write(f"{number:06d}-{i}", {"png": png(render(change.after))})
                image, target = f"{number:06d}.png", f"{number:06d}-{i}.png"
                queries.append({"image": image, "text": change.words, "target": target})
                done += 1
                progress(done)
            if len(queries) == test:
                break
    storage.write_json(storage.join(uri, "test", "composed.json"), queries)
