"""Composed retrieval: scored by hand, read from files, and drawn so that neither part of a query is enough."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from vladva.benchmarks.benchmark import AsksMixed, find_benchmark
from vladva.benchmarks.protocols.composed import ComposedTask
from vladva.data.image_refs import ImageRef
from vladva.data.scenes.composed import changed_scenes, write_composed
from vladva.data.scenes.scene import Scene, is_held_out, is_possible


def task_of(image: list[int], text: list[int], target: list[int], images: int) -> ComposedTask:
    refs = [ImageRef(f"{i}", f"{i}.png", "") for i in range(images)]
    numbers = (np.array(each, np.int64) for each in (image, text, target))
    texts = tuple(f"change {i}" for i in range(max(text) + 1))
    return ComposedTask(texts, refs, *numbers, "expected", {}, {})


def one_hot(*places: int, width: int = 6) -> np.ndarray:
    return np.eye(width, dtype=np.float32)[list(places)]


def test_scores_by_hand() -> None:
    """Two queries of image 0, whose targets are images 1 and 2; what is nearest to a query is its own image."""
    task = task_of([0, 0], [0, 1], [1, 2], 4)
    images = one_hot(0, 1, 2, 3) + 0.5 * one_hot(0, 0, 0, 3)
    texts = one_hot(1, 3)
    composed = np.stack([2 * images[0] + images[1], images[0] + 2 * images[3] + 0.5 * images[2]])
    scores = task.score_mixed(texts, images, composed).scores
    assert (scores["composed_r1"], scores["composed_r5"]) == (0.5, 1.0)  # the first; the second finds image 3 first
    assert scores["text_only_r1"] == 0.5
    assert scores["image_only_r1"] == pytest.approx(0.5)  # images 1 and 2 are equally near to image 0
    assert scores["halfway_r1"] == 0.5
    without = task.score(texts, images).scores
    assert without["composed_r1"] == without["halfway_r1"]
    same = np.ones((4, 6), np.float32)
    blind = task.score_mixed(same[:2], same, same[:2])
    assert blind.scores == pytest.approx(task.chance | {"composed_r5": 1.0, "composed_r10": 1.0})
    assert blind.tie_rates["composed_r1"] == 1
    outcome = task.score_mixed(texts, images, composed).outcomes.to_pylist()[1]
    assert (outcome["target"], outcome["above"], outcome["nearest"][0]) == ("2.png", 1, "3.png")


def test_changes_of_the_test_are_not_seen_in_training() -> None:
    seen: dict[str, set] = {}
    for split in ("train", "test"):
        for found in islice(changed_scenes(split), 200):
            assert 2 <= len(found) <= 4
            assert len({change.after for change in found}) == len(found)
            for change in found:
                pairs = zip(change.before.objects, change.after.objects, strict=True)
                [(old, new)] = [(a, b) for a, b in pairs if a != b]
                assert (old.colour == new.colour) != (old.shape == new.shape)
                assert f"{old.colour} {old.shape}" in change.words
                assert (new.colour if old.shape == new.shape else new.shape) in change.words
                move = (old.colour, old.shape), (new.colour, new.shape)
                assert is_held_out(*move) == (split == "test")
                assert split == "test" or is_possible(change.after.objects)
                seen.setdefault(split, set()).add(frozenset(move))
    assert not seen["train"] & seen["test"]


def test_files_are_read_and_what_is_wrong_with_them_is_said(tmp_path: Path) -> None:
    write_composed(str(tmp_path), train=10, test=9, samples_per_shard=5)
    task = find_benchmark("scenes_composed").read(str(tmp_path))
    assert isinstance(task, AsksMixed)
    assert task.counts["queries"] == len(task.mixed) == 9
    assert len(list((tmp_path / "train").glob("*.tar"))) == 2
    again = tmp_path / "again"
    write_composed(str(again), train=10, test=9, samples_per_shard=5)
    assert (again / "train/000000.tar").read_bytes() == (tmp_path / "train/000000.tar").read_bytes()
    file = tmp_path / "test/composed.json"
    rows = json.loads(file.read_text())
    for wrong, message in (
        ([{"image": "000000.png"}], "expected a list of"),
        ([], "expected a list of"),
        ([{**rows[0], "target": rows[0]["image"]}], "that ask for their own image"),
        ([{**rows[0], "target": "gone.png"}], "missing gone.png"),
    ):
        file.write_text(json.dumps(wrong))
        with pytest.raises(ValueError, match=message):
            find_benchmark("scenes_composed").read(str(tmp_path))


def test_one_part_of_a_query_cannot_tell_the_target() -> None:
    """An embedder that knows scenes exactly: the right vector finds every target, image or words alone few."""
    found = [change for several in islice(changed_scenes("test"), 60) for change in several]
    originals = list(dict.fromkeys(change.before for change in found))
    scenes = [*originals, *(change.after for change in found)]
    kinds = sorted({(o.colour, o.shape) for scene in scenes for o in scene.objects})
    vectors = dict(zip(kinds, np.random.default_rng(0).normal(size=(len(kinds), 64)), strict=True))
    places = dict(zip(originals, np.random.default_rng(1).normal(size=(len(originals), 64)), strict=True))
    where = [*originals, *(change.before for change in found)]

    def seen(scene: Scene, before: Scene) -> np.ndarray:
        return 0.3 * places[before] + sum(vectors[o.colour, o.shape] for o in scene.objects)

    images = np.stack([seen(scene, before) for scene, before in zip(scenes, where, strict=True)])
    new = [next(b for a, b in zip(c.before.objects, c.after.objects, strict=True) if a != b) for c in found]
    words = np.stack([vectors[o.colour, o.shape] for o in new])
    target = np.arange(len(found)) + len(originals)
    task = task_of([originals.index(c.before) for c in found], list(range(len(found))), target.tolist(), len(scenes))
    scores = task.score_mixed(words, images, images[target]).scores
    assert scores["composed_r1"] == 1.0
    assert scores["image_only_r1"] < 0.6
    assert scores["text_only_r1"] < 0.3
