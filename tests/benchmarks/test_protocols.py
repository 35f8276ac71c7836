"""Each kind of benchmark, read from small files written here and scored with embeddings made up here: no model."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from vladva.benchmarks.benchmark import Task
from vladva.benchmarks.bootstrap import means
from vladva.benchmarks.protocols.caption_choice import CaptionChoice
from vladva.benchmarks.protocols.classification import Classification
from vladva.benchmarks.protocols.matching import Matching
from vladva.benchmarks.protocols.retrieval import Retrieval
from vladva.benchmarks.protocols.subsets import Subset
from vladva.benchmarks.protocols.two_captions import TwoCaptions

ABOUT = {"source": "written by this test", "licence": "none"}
WIDTH = 64


def write(folder: Path, name: str, content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def draw(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2), (number % 256, number // 256, 0)).save(folder / name)


def vectors(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def constant(task: Task) -> tuple[np.ndarray, np.ndarray]:
    one = vectors(1, 0)
    return np.repeat(one, len(task.texts), axis=0), np.repeat(one, len(task.images), axis=0)


# Retrieval ------------------------------------------------------------------------------------------------------------


def retrieval_files(folder: Path, captions: tuple[int, ...]) -> None:
    names = [f"{number}.png" for number in range(len(captions))]
    rows = [
        {"image": name, "caption": [f" caption {number} of {name}\n" for number in range(count)]}
        for name, count in zip(names, captions, strict=True)
    ]
    rows[1]["caption"][0] = "the same words"
    rows[2]["caption"][0] = "the same words "
    write(folder, "test.json", rows)
    draw(folder / "images", names)


RETRIEVAL = Retrieval(title="Small", annotations=("test.json",), images=("images",), **ABOUT)


def test_retrieval_counts_strips_and_joins(tmp_path: Path) -> None:
    retrieval_files(tmp_path, (5, 6, 7, 2))
    task = RETRIEVAL.read(str(tmp_path))
    assert task.counts == {"images": 4, "captions": 20, "distinct_captions": 19}
    assert all(text == text.strip() for text in task.texts)
    assert task.caption_image.tolist() == [0] * 5 + [1] * 6 + [2] * 7 + [3] * 2
    assert task.caption_text[5] == task.caption_text[11]


def test_perfect_retrieval_but_for_the_caption_two_images_share(tmp_path: Path) -> None:
    retrieval_files(tmp_path, (5, 6, 7, 2))
    task = RETRIEVAL.read(str(tmp_path))
    images = vectors(4, 1)
    texts = np.stack([images[task.caption_image[list(task.caption_text).index(n)]] for n in range(len(task.texts))])
    result = task.score(texts, images)
    assert set(result.scores) == {f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)}
    # Image 2's copy of the shared caption is embedded as image 1: 19 of 20 right.
    assert result.scores["t2i_r1"] == pytest.approx(19 / 20)
    assert result.scores["t2i_r5"] == 1.0
    assert result.scores["i2t_r1"] == pytest.approx((1 + 6 / 7 + 1 + 1) / 4)
    assert result.tie_rates["i2t_r1"] == pytest.approx(1 / 4)


def test_retrieval_outcomes_give_the_scores_again(tmp_path: Path) -> None:
    retrieval_files(tmp_path, tuple(3 + number % 4 for number in range(30)))
    task = RETRIEVAL.read(str(tmp_path))
    images = vectors(30, 1)
    texts = vectors(len(task.texts), 2)
    result = task.score(texts, images)
    rows = result.outcomes.to_pylist()
    for way in ("t2i", "i2t"):
        ranks = [row["rank"] for row in rows if row["task"] == way]
        assert len(ranks) == {"t2i": task.counts["captions"], "i2t": 30}[way]
        for k in (1, 5, 10):
            assert np.mean(np.array(ranks) <= k) == pytest.approx(result.scores[f"{way}_r{k}"], abs=0.02)
    assert means(result.samples, result.averages) == pytest.approx(result.scores)
    for row in rows:
        if row["rank"] <= 10 and not row["tied"]:
            assert row["right"].index(True) == row["rank"] - 1


def test_constant_model_retrieves_at_chance(tmp_path: Path) -> None:
    retrieval_files(tmp_path, (5, 6, 7, 2, 5, 5, 5, 5, 5, 5, 5, 5))
    task = RETRIEVAL.read(str(tmp_path))
    result = task.score(*constant(task))
    assert result.scores == pytest.approx(task.chance)
    assert task.chance["t2i_r5"] == pytest.approx(5 / 12)
    assert result.tie_rates["t2i_r1"] == 1.0


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"num_images": 5}, r"expected 5 images in test\.json, found 4"),
        ({"num_captions": (19, 21)}, r"expected 19 or 21 captions in test\.json, found 20"),
        ({"min_captions_per_image": 5}, "expected 0 images with fewer than 5 captions, found 1"),
    ],
)
def test_wrong_counts_say_expected_and_found(tmp_path: Path, declared: dict, message: str) -> None:
    retrieval_files(tmp_path, (5, 6, 7, 2))
    benchmark = Retrieval(title="Small", annotations=("test.json",), images=("images",), **declared, **ABOUT)
    with pytest.raises(ValueError, match=message):
        benchmark.read(str(tmp_path))


def test_captions_can_be_capped(tmp_path: Path) -> None:
    retrieval_files(tmp_path, (5, 6, 7, 2))
    capped = Retrieval(title="S", annotations=("test.json",), images=("images",), max_captions_per_image=5, **ABOUT)
    assert capped.read(str(tmp_path)).counts["captions"] == 17


def test_groups_restrict_the_queries_and_not_the_gallery(tmp_path: Path) -> None:
    groups = ["in-domain", "out-domain", "in-domain", "near-domain"]
    content = {
        "images": [{"id": n, "file_name": f"{n}.png", "domain": group} for n, group in enumerate(groups)],
        "annotations": [{"image_id": n, "caption": f"{n} {k}"} for n in range(4) for k in range(3)],
    }
    write(tmp_path, "val.json", content)
    draw(tmp_path / "images", [f"{n}.png" for n in range(4)])
    declared = {"in-domain": 2, "near-domain": 1, "out-domain": 1}
    benchmark = Retrieval(title="N", annotations=("val.json",), images=("images",), groups=declared, **ABOUT)
    task = benchmark.read(str(tmp_path))
    images = np.eye(4, WIDTH, dtype=np.float32)
    texts = images[task.caption_image].copy()
    texts[:3] = images[1]  # the captions of image 0 say image 1, which is in another group
    result = task.score(texts, images)
    scores = {name: result.scores[f"t2i_r1{name}"] for name in ("", "_in_domain", "_out_domain", "_near_domain")}
    assert scores == {"": 3 / 4, "_in_domain": 1 / 2, "_out_domain": 1.0, "_near_domain": 1.0}
    # Image 1's own captions tie with image 0's: the gallery is that of all groups.
    assert result.tie_rates["i2t_r1_out_domain"] == 1.0
    assert set(task.chance) == set(result.scores)
    assert task.score(*constant(task)).scores == pytest.approx(task.chance)
    wrong = Retrieval(title="N", annotations=("val.json",), images=("images",), groups={"in-domain": 3}, **ABOUT)
    with pytest.raises(ValueError, match=r"expected 3 in-domain images in val\.json, found 2"):
        wrong.read(str(tmp_path))


def test_the_numbers_of_the_images_are_known(tmp_path: Path) -> None:
    names = [f"COCO_val2014_{number:012}.png" for number in (42, 1042, 7)]
    write(tmp_path, "test.json", [{"image": name, "caption": ["c"]} for name in names])
    draw(tmp_path / "images", names)
    expected = hashlib.sha256(b"7\n42\n1042\n").hexdigest()
    declared = {"title": "C", "annotations": ("test.json",), "images": ("images",), **ABOUT}
    assert Retrieval(image_ids=expected, **declared).read(str(tmp_path)).counts["images"] == 3
    with pytest.raises(ValueError, match=r"not those of the split: expected sha256 000.*, found " + expected[:16]):
        Retrieval(image_ids="0" * 64, **declared).read(str(tmp_path))


# Caption choice (SugarCrepe) ------------------------------------------------------------------------------------------

CHOICE = CaptionChoice(
    title="Small",
    annotations=("files",),
    images=("images",),
    subsets=(Subset("swap_object", ("swap_obj.json",), {4: None, 5: None}), Subset("add_object", ("add_obj.json",))),
    groups={"swap_macro": ("swap_object",)},
    **ABOUT,
)


def choice_files(folder: Path) -> None:
    row = {"filename": "0.png", "caption": "c", "negative_caption": "n"}
    swap = {str(k): row | {"caption": f"c{k}", "negative_caption": f"n{k}", "filename": f"{k}.png"} for k in range(4)}
    write(folder / "files", "swap_obj.json", swap)
    write(folder / "files", "add_obj.json", {"0": row, "5": row | {"negative_caption": "c"}})
    draw(folder / "images", [f"{number}.png" for number in range(4)])


def test_caption_choice_scores_and_averages(tmp_path: Path) -> None:
    choice_files(tmp_path)
    task = CHOICE.read(str(tmp_path))
    images = np.eye(4, WIDTH, dtype=np.float32)
    right = {"c0": images[0], "c1": images[1], "c2": images[2], "c3": -images[3], "c": images[0]}
    texts = np.stack([right.get(text, 0.5 * images[0] + images[3]) for text in task.texts])
    result = task.score(texts, images)
    assert result.scores["swap_object"] == 3 / 4  # c3 points away
    assert result.scores["add_object"] == 1 / 2  # one row's false caption reads like the true one: a tie, a failure
    assert result.tie_rates["add_object"] == 1 / 2
    assert result.scores["swap_macro"] == 3 / 4
    assert result.scores["average_macro"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert result.scores["average_micro"] == pytest.approx(4 / 6)
    assert means(result.samples, result.averages) == pytest.approx(result.scores)
    assert result.outcomes.filter(pa.array([task == "add_object" for task in result.outcomes["task"].to_pylist()]))[
        "sample"
    ].to_pylist() == ["0", "5"]
    assert set(task.chance) == set(result.scores)


def test_constant_model_chooses_nothing(tmp_path: Path) -> None:
    choice_files(tmp_path)
    task = CHOICE.read(str(tmp_path))
    result = task.score(*constant(task))
    assert set(result.scores.values()) == {0.0}
    assert set(result.tie_rates.values()) == {1.0}


def test_unlisted_edition_is_refused(tmp_path: Path) -> None:
    choice_files(tmp_path)
    write(tmp_path / "files", "swap_obj.json", {})
    with pytest.raises(ValueError, match=r"expected 4 or 5 rows in files/swap_obj\.json, found 0"):
        CHOICE.read(str(tmp_path))


# Two captions (SugarCrepe++) ------------------------------------------------------------------------------------------

TWO = TwoCaptions(
    title="Small",
    annotations=("files",),
    images=("images",),
    subsets=(Subset("swap_object", ("swap_obj.json",)),),
    num_images=2,
    **ABOUT,
)


def two_files(folder: Path) -> None:
    rows = [
        {"id": 0, "filename": "0.png", "caption": "a", "caption2": "b", "negative_caption": "n"},
        {"id": 1, "filename": "1.png", "caption": "a", "caption2": "b", "negative_caption": "a"},  # cannot be won
        {"id": 2, "filename": "1.png", "caption": "a", "caption2": "a", "negative_caption": "n"},
    ]
    write(folder / "files", "swap_obj.json", rows)
    draw(folder / "images", ["0.png", "1.png"])


def test_two_captions_against_one(tmp_path: Path) -> None:
    two_files(tmp_path)
    task = TWO.read(str(tmp_path))
    assert task.counts["rows_that_cannot_be_won"] == 1
    direction = {"a": [1.0, 0.1, 0], "b": [1.0, -0.1, 0], "n": [0.5, 0, 1.0]}
    texts = np.array([direction[text] for text in task.texts])
    result = task.score(texts, np.array([[1.0, 0, 0], [1.0, 0, 0]]))
    assert result.scores["swap_object_itt"] == pytest.approx(2 / 3)
    assert result.scores["swap_object_tot"] == pytest.approx(2 / 3)
    assert result.scores["swap_object_p1"] == pytest.approx(2 / 3)
    # Row 1: the second caption is as near to the image as the negative is, mirrored; a tie fails.
    assert result.scores["swap_object_p2"] == pytest.approx(2 / 3)
    assert result.scores["itt_macro"] == result.scores["swap_object_itt"]
    assert means(result.samples, result.averages) == pytest.approx(result.scores)
    assert set(task.chance) == set(result.scores)
    constant_result = task.score(*constant(task))
    assert set(constant_result.scores.values()) == {0.0}


# Matching (Winoground) ------------------------------------------------------------------------------------------------


def test_matching_tells_text_from_image(tmp_path: Path) -> None:
    rows = [
        {"id": n, "caption_0": f"{n} a", "caption_1": f"{n} b", "collapsed_tag": "Both"}
        | {"image_0": f"ex_{n}_img_0", "image_1": f"ex_{n}_img_1"}
        for n in range(2)
    ]
    (tmp_path / "examples.jsonl").write_text("\n".join(map(json.dumps, rows)))
    draw(tmp_path / "images", [f"ex_{n}_img_{side}.png" for n in range(2) for side in (0, 1)])
    benchmark = Matching(title="W", annotations=("examples.jsonl",), images=("images",), num_examples=2, **ABOUT)
    task = benchmark.read(str(tmp_path))
    assert [image.name for image in task.images] == [
        "ex_0_img_0.png", "ex_1_img_0.png", "ex_0_img_1.png", "ex_1_img_1.png"
    ]  # fmt: skip
    # Images are the axes, so that a caption's first two coordinates are its cosines with them.
    images = np.eye(2, 3)[[0, 0, 1, 1]]

    def score(cosines: dict[str, tuple[float, float]]) -> dict[str, float]:
        texts = [[x, y, (1 - x * x - y * y) ** 0.5] for x, y in (cosines[text] for text in task.texts)]
        result = task.score(np.array(texts, np.float32), images)
        assert means(result.samples, result.averages) == pytest.approx(result.scores)
        return result.scores

    right = {"0 a": (0.9, 0.1), "0 b": (0.2, 0.8)}
    assert score(right | {"1 a": (0.3, 0.35), "1 b": (0.25, 0.45)}) == {"text": 1.0, "image": 0.5, "group": 0.5}
    assert score(right | {"1 a": (0.3, 0.1), "1 b": (0.35, 0.45)}) == {"text": 0.5, "image": 1.0, "group": 0.5}
    assert score(right | {"1 a": (0.25, 0.2), "1 b": (0.25, 0.45)}) == {"text": 0.5, "image": 1.0, "group": 0.5}
    assert set(task.score(*constant(task)).scores.values()) == {0.0}


# Classification (ImageNet) --------------------------------------------------------------------------------------------


def test_classification_with_two_classes_of_one_name(tmp_path: Path) -> None:
    words = json.loads(
        Path(__file__).parents[2].joinpath("platform/vladva/benchmarks/tasks/imagenet_prompts.json").read_text()
    )
    names = words["class_names"]
    draw(tmp_path / "val", [f"n{number:04}/0.png" for number in range(1000)])
    benchmark = Classification(title="I", images=("val",), prompts="imagenet_prompts.json", num_images=1000, **ABOUT)
    task = benchmark.read(str(tmp_path))
    assert task.counts == {"images": 1000, "classes": 1000, "prompts": 79_840}
    unique = {name: vectors(1, number)[0] for number, name in enumerate(dict.fromkeys(names))}
    by_text = {
        text: unique[name]
        for number, name in enumerate(names)
        for rows in task.prompts.values()
        for text in (task.texts[row] for row in rows[number])
    }
    texts = np.stack([by_text[text] for text in task.texts])
    images = np.stack([unique[name] for name in names])
    result = task.score(texts, images)
    assert means(result.samples, result.averages) == pytest.approx(result.scores)
    # missile (657, 744) and sunglasses (836, 837): half of four images.
    assert {name for name in names if names.count(name) == 2} == {"missile", "sunglasses"}
    for suffix in ("", "_seven", "_single"):
        assert result.scores[f"top1{suffix}"] == pytest.approx(0.998)
        assert result.scores[f"top5{suffix}"] == 1.0
        assert result.tie_rates[f"top1{suffix}"] == pytest.approx(0.004)
    assert task.score(*constant(task)).scores == pytest.approx(task.chance)
