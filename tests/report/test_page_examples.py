"""What the report shows of compositional benchmarks: the false captions that won, and only those."""

from pathlib import Path

import numpy as np
from PIL import Image

from vladva.benchmarks.protocols.matching import MatchingTask
from vladva.benchmarks.protocols.two_captions import TwoCaptionsTask
from vladva.benchmarks.readers.sugar_crepe import CaptionChoiceRow
from vladva.benchmarks.readers.winoground import WinogroundExample
from vladva.data.image_refs import ImageRef
from vladva.report.page_examples import choices_of, wrong_choices


def images(folder: Path, names: list[str]) -> list[ImageRef]:
    refs = []
    for name in names:
        Image.new("RGB", (2, 2), (ord(name[0]), 0, 0)).save(folder / name)
        refs.append(ImageRef(name, name, str(folder / name), 0, (folder / name).stat().st_size))
    return refs


def at(*degrees: float) -> np.ndarray:
    return np.stack([(np.cos(np.radians(angle)), np.sin(np.radians(angle))) for angle in degrees])


def test_of_two_true_captions_the_weaker_one_is_shown(tmp_path: Path) -> None:
    rows = [
        CaptionChoiceRow("0", "a.png", "near", "far", "between"),
        CaptionChoiceRow("1", "b.png", "far", "near", "opposite"),
    ]
    task = TwoCaptionsTask(
        ("near", "far", "between", "opposite"),
        images(tmp_path, ["a.png", "b.png"]),
        {"swap_object": np.array([[0, 1], [0, 1], [1, 0], [2, 3]])},
        {"swap_object": rows},
        "strict",
        counts={},
        files={},
    )
    outcomes = task.score(at(0, 60, 30, 180), at(0, 0)).outcomes
    [wrong] = wrong_choices(choices_of(task, outcomes))
    assert (wrong.kind, wrong.caption, wrong.negative) == ("swap_object", "far", "between")
    assert wrong.image == (tmp_path / "a.png").read_bytes()
    np.testing.assert_allclose([wrong.caption_score, wrong.negative_score], np.cos(np.radians([60, 30])), rtol=1e-6)


def test_winogrounds_images_are_shown_with_each_others_captions(tmp_path: Path) -> None:
    task = MatchingTask(
        ("a", "b"),
        images(tmp_path, ["0.png", "1.png"]),
        np.array([[0], [1]]),
        [WinogroundExample(7, ("a", "b"), ("0.png", "1.png"), "Object")],
        "strict",
        counts={},
        files={},
    )
    outcomes = task.score(at(0, 50), at(10, 20)).outcomes  # both images are nearer to caption a
    [wrong] = wrong_choices(choices_of(task, outcomes))
    assert (wrong.kind, wrong.caption, wrong.negative) == ("Object, 7", "b", "a")
    assert wrong.image == (tmp_path / "1.png").read_bytes()
    np.testing.assert_allclose([wrong.caption_score, wrong.negative_score], np.cos(np.radians([30, 20])), rtol=1e-6)
