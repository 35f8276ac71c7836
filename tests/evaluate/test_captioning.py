"""Captions: what counts as an object, statistics by hand, and the tiny model's captions, written and gone on with."""

import json
from pathlib import Path

import pyarrow as pa
import pytest

from tests.support.checkpoints import build_clip
from vladva.core.sampling import spread
from vladva.data.image_refs import read_images
from vladva.data.scenes.corpus import held_out_scenes
from vladva.evaluate.caption_actor import CAPTION_PROMPTS
from vladva.evaluate.captioning import (
    CaptionStatistics,
    ImageToCaption,
    agreed_words,
    images_in,
    images_of,
    named,
    scene_objects,
    statistics,
    write_captions,
    writers,
)
from vladva.evaluate.scoring import read_benchmarks
from vladva.report.page_examples import caption_comparisons
from vladva.report.tables import statistics_table


def test_scene_objects_are_those_of_the_scene() -> None:
    for scene, worded, _ in held_out_scenes(40):
        truth = {f"{thing.colour} {thing.shape}" for thing in scene.objects}
        assert scene_objects([worded[0]]) == truth
        assert named(worded[-1], frozenset(truth)) == truth  # the long caption names every object
    # Negative control: the right shapes in each other's colours are not the objects.
    assert not named("a blue circle left of a red star", frozenset({"red circle", "blue star"}))


def test_objects_elsewhere_are_the_words_that_captions_share() -> None:
    captions = ["Two dogs run on the beach.", "A dog is running at a beach", "A brown dog plays by the sea"]
    assert agreed_words(captions) == {"dog", "beach"}
    assert agreed_words(["A glass bus."]) == {"glass", "bus"}  # one caption: all of its words
    assert named("Dogs on grass", agreed_words(captions)) == {"dog"}


def test_numbers_at_even_distances() -> None:
    assert spread(10, 3) == [0, 4, 9]
    assert spread(2, 5) == [0, 1]


def rows_of(system: str, *written: tuple[str, int, list[str], list[str]]) -> list[dict]:
    return [
        {"system": system, "picture": str(number), "prompt": prompt, "caption": caption, "tokens": tokens}
        | {"words": len(caption.split()), "named": found, "objects": known}
        for prompt in CAPTION_PROMPTS
        for number, (caption, tokens, found, known) in enumerate(written)
    ]


def test_statistics_by_hand() -> None:
    rows = rows_of(
        "base", ("a red star and a blue ring", 9, ["red star"], ["red star", "blue ring"]), ("a b", 3, [], [])
    )
    rows += rows_of("short", ("star", 1, [], ["red star", "blue ring"]), ("", 0, [], []))
    table = pa.Table.from_pylist(rows)
    found = statistics(table)
    assert found["base"][CAPTION_PROMPTS[0]] == CaptionStatistics(words=4.5, tokens=6.0, object_recall=0.5)
    assert found["short"][CAPTION_PROMPTS[3]] == CaptionStatistics(words=0.5, tokens=0.5, object_recall=0.0)
    shown = statistics_table(table)
    assert [cell.value for cell in shown.rows[0].cells] == [4.5, 6.0, 50.0, 0.5, 0.5, 0.0]
    assert shown.headings[2] == ("base", "objects named, %")
    unknown = statistics_table(pa.Table.from_pylist(rows_of("base", ("a b", 3, [], []))))
    assert [cell.value for cell in unknown.rows[0].cells] == [2.0, 3.0]


def test_the_base_of_an_adapter_is_captioned_too(tmp_path: Path) -> None:
    (tmp_path / "vladva.json").write_text(json.dumps({"checkpoint": "tiny"}))
    (tmp_path / "adapter_config.json").write_text("{}")
    trained = str(tmp_path)
    assert list(writers({"ours": trained}).items()) == [("tiny, no adapter", "tiny"), ("ours", trained)]
    assert writers({"base": "tiny", "ours": trained}) == {"base": "tiny", "ours": trained}


def test_dual_encoders_do_not_write(tiny: str, tmp_path: Path) -> None:
    clip = build_clip(tmp_path)
    assert writers({"clip": clip, "base": tiny}) == {"base": tiny}
    with pytest.raises(ValueError, match="captions: clip only embed; name a model that can write"):
        writers({"clip": clip})


def test_captions_of_the_tiny_model(ray_cluster: None, scenes: Path, tiny: str, tmp_path: Path) -> None:
    from vladva.core.images import decode_image
    from vladva.models.embedder import load_embedder

    images = images_of(read_benchmarks(["scenes_retrieval"], str(scenes)), 2)
    assert len(images) == 2
    assert all(each.objects for each in images)
    options = {"actors": 1, "max_tokens": 24}
    captions = write_captions({"base": tiny}, images, str(tmp_path), **options).to_pylist()
    assert len(captions) == 2 * len(CAPTION_PROMPTS)
    [data] = read_images([images[1].image])
    embedder = load_embedder(tiny)
    for row in captions[4:6]:
        messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": row["prompt"]}]}]
        again = "".join(embedder.generate(messages, [decode_image(data)], max_tokens=24)).strip()
        assert row["caption"] == again
        assert row["named"] == sorted(scene_objects([again]) & images[1].objects)
    assert sum(len(row["named"]) for row in captions) > 0

    files = sorted((tmp_path / "captions").rglob("*.json"))
    kept = {path: path.stat().st_mtime_ns for path in files[1:]}
    files[0].unlink()  # as if it had been interrupted
    assert write_captions({"base": tiny}, images, str(tmp_path), **options).to_pylist() == captions
    assert kept == {path: path.stat().st_mtime_ns for path in files[1:]}
    assert json.loads((tmp_path / "captions.json").read_text())["pictures"] == 2
    compared = caption_comparisons(pa.Table.from_pylist(captions), [each.image for each in images], count=1)
    assert [row.captions["base"] for row in compared] == [captions[i]["caption"] for i in range(4)]


def test_images_of_a_folder(tmp_path: Path, scenes: Path) -> None:
    found = images_in(f"{scenes}/test", 5)
    assert [each.image.name for each in found] == [
        "000000.png",
        "000015.png",
        "000031.png",
        "000047.png",
        "000063.png",
    ]
    assert isinstance(found[0], ImageToCaption)
    assert found[0].objects == frozenset()
    with pytest.raises(ValueError, match="there are no images under"):
        images_in(str(tmp_path), 5)
