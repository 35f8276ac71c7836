"""metrics.py against other packages, on data without ties (with ties they are wrong: a constant model scores 100%).

    pip install --no-deps clip-benchmark==1.6.2 torchmetrics==1.9.0 lightning-utilities==0.15.3

Without them these tests are skipped: clip-benchmark's own requirements include torchvision, which is not used here.
"""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
import torch

from vladva.benchmarks import find
from vladva.metrics import all_above, class_embeddings, hits_at, rank, unit_rows, winoground


def pairs(captions: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Texts, images and owners: 200 images, with their captions near enough to be found now and then."""
    rng = np.random.default_rng(0)
    counts = {"five": np.full(200, 5), "ragged": rng.integers(5, 8, 200), "ten": np.full(200, 10)}[captions]
    owners = rng.permutation(np.repeat(np.arange(200), counts))
    images = rng.standard_normal((200, 32))
    return unit_rows(images[owners] + 1.5 * rng.standard_normal((len(owners), 32))), unit_rows(images), owners


@pytest.mark.parametrize("k", [1, 5, 10])
@pytest.mark.parametrize("captions", ["five", "ragged", "ten"])
def test_retrieval(captions: str, k: int) -> None:
    recall = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    texts, images, owners = pairs(captions)
    numbers = np.arange(200)
    scores = torch.from_numpy(texts @ images.T)
    positive = torch.from_numpy(owners[:, None] == numbers)
    ways = {
        "t2i": (hits_at(rank(texts, images, owners, numbers), k), scores, positive),
        "i2t": (hits_at(rank(images, texts, numbers, owners), k), scores.T.contiguous(), positive.T.contiguous()),
    }
    for way, (ours, matrix, target) in ways.items():
        found = (recall.recall_at_k(matrix, target, k) > 0).numpy()
        assert np.array_equal(ours.strict, found), way
    true_recall = recall.recall_at_k(scores.T, positive.T, k).mean().item()
    assert true_recall != pytest.approx(ways["i2t"][0].mean("strict"), abs=0.01)  # negative control: another measure


def test_hit_rate() -> None:
    retrieval = pytest.importorskip("torchmetrics.retrieval")
    texts, images, owners = pairs("ragged")
    matrix, target = torch.from_numpy(images @ texts.T), torch.from_numpy(np.arange(200)[:, None] == owners)
    queries = torch.arange(200)[:, None].expand_as(matrix)
    hit_rate = retrieval.RetrievalHitRate(top_k=5)(matrix.ravel(), target.ravel(), indexes=queries.ravel())
    ours = hits_at(rank(images, texts, np.arange(200), owners), 5)
    assert ours.mean("strict") == pytest.approx(float(hit_rate), abs=1e-7)


class Identity:
    """A model whose pictures and texts already are embeddings."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)

    encode_text = encode_image


def test_pairs_and_winoground() -> None:
    selection = pytest.importorskip("clip_benchmark.metrics.image_caption_selection")
    rng = np.random.default_rng(1)
    texts, images = unit_rows(rng.standard_normal((400, 16))), unit_rows(rng.standard_normal((400, 16)))
    batch = [(torch.from_numpy(images.reshape(200, 2, 16, 1, 1)), list(texts.reshape(200, 2, 16)))]

    def tokenizer(rows: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.array(rows))

    theirs = selection.evaluate(Identity(), batch, tokenizer, "cpu", amp=False)
    scores = np.einsum("ncd,nid->nci", texts.reshape(200, 2, 16), images.reshape(200, 2, 16))
    ours = winoground(scores)
    names = {"text": "text_acc", "image": "image_acc", "group": "acc"}
    assert {name: ours[name].mean("strict") for name in names} == pytest.approx(
        {name: theirs[key] for name, key in names.items()}
    )
    single = [(torch.from_numpy(images.reshape(200, 2, 16, 1, 1)[:, :1]), list(texts.reshape(200, 2, 16)))]
    theirs = selection.evaluate(Identity(), single, tokenizer, "cpu", amp=False)
    assert all_above(scores[:, :1, 0], scores[:, 1:, 0]).mean("strict") == pytest.approx(theirs["text_acc"])


@pytest.mark.parametrize("k", [1, 5])
def test_classification(k: int) -> None:
    classification = pytest.importorskip("torchmetrics.classification")
    rng = np.random.default_rng(2)
    prompts = rng.standard_normal((50 * 7, 24))
    classes = class_embeddings(prompts, np.arange(350).reshape(50, 7))
    labels = rng.integers(0, 50, 1000)
    images = unit_rows(classes[labels] + 0.4 * rng.standard_normal((1000, 24)))
    top = classification.MulticlassAccuracy(num_classes=50, top_k=k, average="micro")
    theirs = float(top(torch.from_numpy(images @ classes.T), torch.from_numpy(labels)))
    assert hits_at(rank(images, classes, labels, np.arange(50)), k).mean("strict") == pytest.approx(theirs, abs=1e-6)


def test_class_embeddings_are_clips() -> None:
    """Section by section what clip-benchmark's zero_shot_classifier does (it needs scikit-learn to be imported)."""
    rng = np.random.default_rng(3)
    prompts = torch.from_numpy(rng.standard_normal((6, 80, 24)).astype(np.float32))
    normal = torch.nn.functional.normalize
    theirs = normal(normal(prompts, dim=-1).mean(dim=1), dim=-1).numpy()
    assert np.allclose(
        class_embeddings(prompts.reshape(480, 24).numpy(), np.arange(480).reshape(6, 80)), theirs, atol=1e-6
    )


def test_imagenet_names_and_templates() -> None:
    pytest.importorskip("clip_benchmark")
    folder = resources.files("clip_benchmark").joinpath("datasets")
    ours = json.loads(resources.files("vladva.benchmarks").joinpath(find("imagenet").prompts).read_text())
    names = json.loads(folder.joinpath("en_classnames.json").read_text())["imagenet1k"]
    templates = json.loads(folder.joinpath("en_zeroshot_classification_templates.json").read_text())["imagenet1k"]
    assert ours["class_names"] == names
    assert ours["templates"][""] == templates
