"""The scenes corpus: captions claim what is true, hard negatives what is not, the test split holds combinations out."""

from __future__ import annotations

import json
import re
from itertools import combinations, islice, pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest
from transformers import AutoTokenizer

from vladva.data.scenes import captions, corpus
from vladva.data.scenes.captions import HARD_NEGATIVES, OPPOSITE, RELATION_WORDS, SIZE_WORDS
from vladva.data.scenes.scene import COLOURS, SHAPES, Scene, is_held_out, relation, render, siblings

WORD_OF_SIZE = {word: size for size, words in SIZE_WORDS.items() for word in words}
RELATION_OF = {words: name for name, wordings in RELATION_WORDS.items() for words in wordings}
PHRASE = re.compile(rf"\b(?:({'|'.join(WORD_OF_SIZE)}) )?({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")


def is_true(caption: str, scene: Scene) -> bool:
    """An independent reading of a caption: parse phrases and the relations between them, look at the coordinates."""
    objects = {(o.colour, o.shape): o for o in scene.objects}
    found = list(PHRASE.finditer(caption))
    for match in found:
        size, colour, shape = match.groups()
        thing = objects.get((colour, shape))
        if thing is None or (size and WORD_OF_SIZE[size] != thing.size):
            return False
    for a, b in pairwise(found):
        between = caption[a.end() : b.start()].strip().removeprefix("is ").removesuffix(" the").removesuffix(" an")
        between = between.removesuffix(" a").strip()
        if between in RELATION_OF:
            first, second = objects[a.groups()[1:]], objects[b.groups()[1:]]
            dx, dy = first.x - second.x, first.y - second.y
            along_x, along_y = ("left" if dx < 0 else "right"), ("above" if dy < 0 else "below")
            if RELATION_OF[between] != (along_x if abs(dx) > abs(dy) else along_y):
                return False
    return True


@pytest.fixture(scope="module")
def sampled() -> list[tuple[Scene, Random]]:
    return [*islice(corpus.scenes("train"), 300), *islice(corpus.scenes("test"), 300)]


def test_captions_are_true_and_the_reading_can_tell(sampled: list[tuple[Scene, Random]]) -> None:
    for scene, random in sampled:
        for caption in captions.captions(scene, random):
            assert is_true(caption, scene), (caption, scene)
    # The control: captions of one scene are false of another (but for the rare scenes that share objects).
    false = sum(not is_true(captions.captions(a, random)[0], b) for (a, random), (b, _) in pairwise(sampled))
    assert false > 0.95 * (len(sampled) - 1)


@pytest.mark.parametrize("kind", HARD_NEGATIVES)
def test_hard_negatives_are_false_and_differ_as_their_kind_says(sampled: list, kind: str) -> None:
    pairs = [(scene, captions.hard_negative(kind, scene, random)) for scene, random in sampled]
    pairs = [(scene, *pair) for scene, pair in pairs if pair]
    assert len(pairs) > 150
    for scene, caption, negative in pairs:
        assert is_true(caption, scene), caption
        assert not is_true(negative, scene), (caption, negative, scene)
        words, other = re.findall(r"[a-z]+", caption), re.findall(r"[a-z]+", negative)
        if kind == "swap_att":
            # Colours changed places; sizes keep theirs, articles and wording are the same.
            assert [w for w in words if w not in (*COLOURS, "a", "an")] == [
                w for w in other if w not in (*COLOURS, "a", "an")
            ]
        if kind.startswith("add"):
            assert len(other) > len(words)


def test_sizes_shapes_and_relations_cover_what_the_corpus_promises(sampled: list) -> None:
    objects = [o for scene, _ in sampled for o in scene.objects]
    assert {o.shape for o in objects} == set(SHAPES)
    assert len(SHAPES) >= 6
    assert {o.colour for o in objects} == set(COLOURS)
    assert len(COLOURS) >= 8
    assert {o.size for o in objects} == {"small", "large"}
    relations = {relation(a, b) for scene, _ in sampled for a, b in combinations(scene.objects, 2)}
    assert relations == set(OPPOSITE)
    assert {len(scene.objects) for scene, _ in sampled} == {2, 3}


def test_no_training_scene_has_a_held_out_pair_and_every_test_scene_has_one(sampled: list) -> None:
    def held_out(scene: Scene) -> bool:
        kinds = [(o.colour, o.shape) for o in scene.objects]
        return any(is_held_out(a, b) for a, b in combinations(kinds, 2))

    assert not any(held_out(scene) for scene, _ in sampled[:300])
    assert all(held_out(scene) for scene, _ in sampled[300:])


def test_siblings_are_training_scenes_that_differ_in_one_thing(sampled: list) -> None:
    kinds = {"moved": 0, "recoloured": 0}
    for scene, random in sampled[:300]:
        for sibling in siblings(scene, random):
            assert not any(
                is_held_out((a.colour, a.shape), (b.colour, b.shape)) for a, b in combinations(sibling.objects, 2)
            )
            before, after = set(scene.objects), set(sibling.objects)
            assert len(after - before) <= 2
            fields = [{(o.shape, o.colour, o.size) for o in objects} for objects in (before, after)]
            places = [{(o.x, o.y) for o in objects} for objects in (before, after)]
            assert places[0] == places[1]
            kind = "moved" if fields[0] == fields[1] else "recoloured"
            kinds[kind] += 1
    assert min(kinds.values()) > 50, kinds


def test_short_captions_are_short_and_long_ones_long(sampled: list, tiny: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    for scene, random in sampled:
        *short, long = (len(tokenizer(text).input_ids) for text in captions.captions(scene, random))
        assert max(short) < 30 <= long < 500
    assert tokenizer.decode(tokenizer("any Text, größer").input_ids).strip() == "any text, größer"


def test_a_thousand_test_captions_are_different_and_true_of_one_image_only() -> None:
    held_out = list(corpus.held_out_scenes(1000))
    assert len({worded[0] for _, worded, _ in held_out}) == 1000
    for i, (_, worded, _) in enumerate(held_out[:100]):
        true_of = [j for j, (other, _, _) in enumerate(held_out) if is_true(worded[0], other)]
        assert true_of == [i]


def test_the_corpus_follows_from_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        corpus.write_scenes(str(tmp_path / name), train=12, test=8, negatives=2, seed=seed, samples_per_shard=5)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert [f.name for f in files].count("000002.tar") == 1  # 12 samples: shards of 5, 5 and 2
    assert all((tmp_path / "a" / f).read_bytes() == (tmp_path / "b" / f).read_bytes() for f in files)
    assert any((tmp_path / "a" / f).read_bytes() != (tmp_path / "c" / f).read_bytes() for f in files)
    rows = json.loads((tmp_path / "a" / "compositionality" / "swap_obj.json").read_text())
    assert set(rows["0"]) == {"filename", "caption", "negative_caption"}


def test_the_image_shows_the_objects_in_their_colours(sampled: list) -> None:
    for scene, _ in sampled[:50]:
        pixels = np.asarray(render(scene))
        for thing in scene.objects:
            x0, x1 = int(thing.x - thing.radius), int(thing.x + thing.radius) + 1
            y0, y1 = int(thing.y - thing.radius), int(thing.y + thing.radius) + 1
            distance = np.abs(pixels[y0:y1, x0:x1].astype(int) - COLOURS[thing.colour]).sum(-1)
            assert distance.min() < 12, thing
