"""mteb runs our embedder on a task of its own and agrees with our scorer; it reads our result files."""

from __future__ import annotations

import io
import json
from pathlib import Path

import datasets
import mteb
import numpy as np
import pytest
from mteb.models.models_protocols import EncoderProtocol
from mteb.results import TaskResult
from mteb.tasks.image_text_pair_classification.eng.winoground import Winoground
from PIL import Image

from tests.support.checkpoints import build_blip_2, build_clip
from vladva.benchmarks.metrics import cosines, unit_rows, winoground
from vladva.evaluate.mteb_adapter import MtebEncoder, write_results

CAPTIONS = [bytes(row).decode() for row in np.random.default_rng(1).integers(ord("a"), ord("z"), (80, 12), np.uint8)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> MtebEncoder:
    return MtebEncoder(build_clip(tmp_path_factory.mktemp("clip")))


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 255, (count, 3))
    return [Image.fromarray((colour * rng.random((32, 32, 1))).astype(np.uint8)) for colour in colours]


class SmallWinoground(Winoground):
    """mteb's own task, with forty examples made here instead of the gated data set."""

    def load_data(self, **_: object) -> None:
        columns = {f"caption_{side}": CAPTIONS[side::2] for side in (0, 1)}
        images = pictures(80)
        columns |= {f"image_{side}": images[side::2] for side in (0, 1)}
        self.dataset = datasets.DatasetDict({"test": datasets.Dataset.from_dict(columns)})
        self.data_loaded = True


def test_mteb_evaluates_our_embedder(encoder: MtebEncoder) -> None:
    assert isinstance(encoder, EncoderProtocol)
    assert not isinstance(object(), EncoderProtocol)
    results = mteb.evaluate(encoder, SmallWinoground(), cache=None, co2_tracker=False, show_progress_bar=False)
    [theirs] = results[0].scores["test"]
    texts, images = encoder.embedder.embed_texts(CAPTIONS), encoder.embedder.embed_images(pictures(80))
    pairs = [[cosines(images[i::2], texts[c::2]) for i in (0, 1)] for c in (0, 1)]
    ours = winoground(np.array(pairs).transpose(2, 0, 1))
    names = {"text_acc": "text", "image_acc": "image", "accuracy": "group"}
    assert {name: theirs[name] for name in names} == pytest.approx(
        {name: ours[metric].mean("strict") for name, metric in names.items()}
    )
    assert min(ours[metric].mean("strict") for metric in ("text", "image")) > 0  # or this would say little
    assert results.model_name.startswith("vladva/")


def test_similarities_are_cosines(encoder: MtebEncoder) -> None:
    rows = np.random.default_rng(0).standard_normal((3, 24))
    expected = unit_rows(rows) @ unit_rows(rows[:2]).T
    assert np.allclose(encoder.similarity(rows, rows[:2]), expected, atol=1e-6)
    assert np.allclose(
        encoder.similarity_pairwise(rows, rows[::-1]), np.diag(unit_rows(rows) @ unit_rows(rows[::-1]).T)
    )
    both = encoder.encode([{"text": CAPTIONS[:2], "image": pictures(2)}])
    assert np.allclose(both, encoder.embedder.embed_texts(CAPTIONS[:2]) + encoder.embedder.embed_images(pictures(2)))


def test_several_vectors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gives an image several vectors, and mteb takes one"):
        MtebEncoder(build_blip_2(tmp_path))


def test_mteb_reads_our_result_files(tmp_path: Path) -> None:
    about = {"title": "Flickr30K", "files": {"dataset_flickr30k.json": "ab" * 32}}
    scores = {
        "benchmarks": {"winoground": about | {"title": "Winoground"}, "flickr30k": about},
        "models": {
            "ours": {
                "fingerprint": "f" * 16,
                "scores": {
                    "winoground": {"text": 0.5, "image": 0.25, "group": 0.125},
                    "flickr30k": {"t2i_r1": 0.75, "i2t_r1": 0.875},
                },
            }
        },
    }
    write_results(scores, str(tmp_path))
    folder = tmp_path / "mteb/ours" / ("f" * 16)
    found = {path.stem: TaskResult.from_disk(path) for path in folder.iterdir()}
    assert set(found) == {"Winoground", "Flickr30K"}
    assert found["Winoground"].task_name == Winoground.metadata.name
    assert found["Winoground"].dataset_revision == Winoground.metadata.dataset["revision"]
    assert (
        found["Winoground"].get_score()
        == found["Winoground"].scores["test"][0][Winoground.metadata.main_score]
        == 0.125
    )
    assert found["Flickr30K"].get_score() == 0.75
    again = io.StringIO(json.dumps(found["Winoground"].to_dict()))
    assert TaskResult.from_dict(json.load(again)).scores == found["Winoground"].scores
