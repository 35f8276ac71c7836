"""What holds for every file in benchmarks/, whatever it measures."""

import hashlib
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from vladva.benchmarks import tasks
from vladva.benchmarks.benchmark import benchmark_names, find_benchmark
from vladva.benchmarks.tasks import sugar_crepe

OFFICIAL = Path(__file__).parent / "sugar_crepe"
FOLDER = Path(tasks.__file__).parent


def test_the_folder_is_the_menu() -> None:
    files = {path.stem for path in FOLDER.glob("*.py")} - {"__init__"}
    assert set(benchmark_names()) == files
    assert {"scenes_retrieval", "scenes_compositionality", "flickr30k", "coco", "nocaps", "imagenet"} < files


@pytest.mark.parametrize("name", benchmark_names())
def test_declaration_is_complete(name: str, tmp_path: Path) -> None:
    benchmark = find_benchmark(name)
    assert benchmark.title
    assert benchmark.source
    assert benchmark.licence
    assert benchmark.ties in ("strict", "expected")
    if benchmark.only_by_name:
        with pytest.raises(FileNotFoundError, match="looked"):
            benchmark.read(str(tmp_path / "nothing"))
        with pytest.raises(ValueError, match="holds nothing of a known format"):
            benchmark.read(str(tmp_path))
        return
    with pytest.raises(FileNotFoundError, match="looked"):
        benchmark.read(str(tmp_path))


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(ValueError, match=r"no 'imagnet'; known are coco, flickr30k, imagenet"):
        find_benchmark("imagnet")


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """SugarCrepe as published, with images of the right names."""
    shutil.copytree(OFFICIAL, tmp_path / "sugar_crepe")
    (tmp_path / "coco/val2017").mkdir(parents=True)
    rows = [row for path in OFFICIAL.glob("*.json") for row in json.loads(path.read_text()).values()]
    with tarfile.open(tmp_path / "coco/val2017/000000.tar", "w") as tar:
        for name in {row["filename"] for row in rows}:
            tar.addfile(tarfile.TarInfo(name))
    return tmp_path


def test_official_sugar_crepe(official: Path) -> None:
    task = sugar_crepe.BENCHMARK.read(str(official))
    assert task.counts["swap_object"] == 245
    assert sum(count for name, count in task.counts.items() if name != "images") == 7511
    assert task.counts["images"] == len(task.images) == 1560
    assert task.files["sugar_crepe/swap_obj.json"].startswith("073cdb8e253d0536")


def test_altered_sugar_crepe_is_refused(official: Path) -> None:
    path = official / "sugar_crepe/add_att.json"
    path.write_text(path.read_text().replace(" a ", " the ", 1))
    with pytest.raises(ValueError, match=r"add_att\.json is not the published file: expected sha256 012d88d7.*found"):
        sugar_crepe.BENCHMARK.read(str(official))


def test_sugar_crepe_with_the_row_taken_out_later(official: Path) -> None:
    path = official / "sugar_crepe/swap_obj.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(rows | {"108": rows["107"]}))
    assert sugar_crepe.BENCHMARK.read(str(official)).counts["swap_object"] == 246


def test_missing_images_are_an_error_not_an_absence(official: Path) -> None:
    shutil.rmtree(official / "coco")
    with pytest.raises(ValueError, match=r"expected 1560 images .* found 0; missing"):
        sugar_crepe.BENCHMARK.read(str(official))


def test_imagenet_names_and_templates_are_the_published_ones() -> None:
    words = json.loads((FOLDER / "imagenet_prompts.json").read_text())

    def digest(lines: list[str]) -> str:
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()

    assert digest(words["class_names"]) == "571ae1c583b4be7da87519494c52bf405a46af05d5815627c7a0dee997068b60"
    assert digest(words["templates"][""]) == "c078f4d4ced9e360a3050ace0c5abd7bed09693bceb3ed0c7a39aba61a668c5c"
    assert set(words["templates"]["_seven"]) < set(words["templates"][""])
    assert [words["class_names"][n] for n in (0, 657, 744, 836, 837, 999)] == [
        "tench", "missile", "missile", "sunglasses", "sunglasses", "toilet paper"
    ]  # fmt: skip


def test_scenes_files_are_found_in_the_corpus_and_beside_other_benchmarks(tmp_path: Path) -> None:
    for root in (tmp_path, tmp_path / "scenes"):
        (root / "test").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(root / "test/000000.png")
        (root / "test/retrieval.json").write_text(json.dumps([{"image": "000000.png", "caption": ["a"]}]))
        task = find_benchmark("scenes_retrieval").read(str(tmp_path))
        assert task.counts["images"] == 1
    assert list(task.files) == ["scenes/test/retrieval.json"]
