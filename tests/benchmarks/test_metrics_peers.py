"""metrics.py against other packages, on data without ties (with ties they are wrong: a constant model scores 100%).

`make install` puts clip-benchmark apart, in .venv/peers: its own requirements include torchvision, which is not used.
"""

from __future__ import annotations

import json
from importlib import resources

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import image_caption_selection as selection
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from sklearn.metrics import top_k_accuracy_score
from torchmetrics.classification import MulticlassAccuracy
from torchmetrics.retrieval import RetrievalHitRate

from vladva.benchmarks.benchmark import find_benchmark
from vladva.benchmarks.metrics import all_above, class_embeddings, hits_at, rank, unit_rows, winoground


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
    texts, images, owners = pairs(captions)
    numbers = np.arange(200)
    scores = torch.from_numpy(texts @ images.T)
    positive = torch.from_numpy(owners[:, None] == numbers)
    ways = {
        "t2i": (hits_at(rank(texts, images, owners, numbers), k), scores, positive),
        "i2t": (hits_at(rank(images, texts, numbers, owners), k), scores.T.contiguous(), positive.T.contiguous()),
    }
    for way, (ours, matrix, target) in ways.items():
        found = (zeroshot_retrieval.recall_at_k(matrix, target, k) > 0).numpy()
        assert np.array_equal(ours.strict, found), way
    true_recall = zeroshot_retrieval.recall_at_k(scores.T, positive.T, k).mean().item()
    assert true_recall != pytest.approx(ways["i2t"][0].mean("strict"), abs=0.01)  # negative control: another measure


@pytest.mark.parametrize("captions", ["ragged", "ten"])
def test_retrieval_end_to_end(captions: str) -> None:
    """Its whole evaluation, with images and texts that already are their embeddings."""
    texts, images, owners = pairs(captions)
    words = Words([str(number) for number in range(len(texts))], 32)
    words.table = torch.from_numpy(texts)
    words.encode_image = lambda pixels: pixels.flatten(1)
    batch = [
        (
            torch.from_numpy(images)[:, :, None, None],
            [[str(t) for t in np.flatnonzero(owners == i)] for i in range(200)],
        )
    ]
    theirs = zeroshot_retrieval.evaluate(words, batch, words, "cpu", amp=False, recall_k_list=[1, 5, 10])
    for k in (1, 5, 10):
        ours = hits_at(rank(texts, images, owners, np.arange(200)), k).mean("strict")
        assert ours == pytest.approx(theirs[f"image_retrieval_recall@{k}"], abs=1e-7)
        ours = hits_at(rank(images, texts, np.arange(200), owners), k).mean("strict")
        assert ours == pytest.approx(theirs[f"text_retrieval_recall@{k}"], abs=1e-7)


def test_hit_rate() -> None:
    texts, images, owners = pairs("ragged")
    matrix, target = torch.from_numpy(images @ texts.T), torch.from_numpy(np.arange(200)[:, None] == owners)
    queries = torch.arange(200)[:, None].expand_as(matrix)
    hit_rate = RetrievalHitRate(top_k=5)(matrix.ravel(), target.ravel(), indexes=queries.ravel())
    ours = hits_at(rank(images, texts, np.arange(200), owners), 5)
    assert ours.mean("strict") == pytest.approx(float(hit_rate), abs=1e-7)


class Identity:
    """A model whose images and texts already are embeddings."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)

    encode_text = encode_image


def test_pairs_and_winoground() -> None:
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
    rng = np.random.default_rng(2)
    prompts = rng.standard_normal((50 * 7, 24))
    classes = class_embeddings(prompts, np.arange(350).reshape(50, 7))
    labels = rng.integers(0, 50, 1000)
    images = unit_rows(classes[labels] + 0.4 * rng.standard_normal((1000, 24)))
    top = MulticlassAccuracy(num_classes=50, top_k=k, average="micro")
    scores = images @ classes.T
    ours = hits_at(rank(images, classes, labels, np.arange(50)), k).mean("strict")
    assert ours == pytest.approx(float(top(torch.from_numpy(scores), torch.from_numpy(labels))), abs=1e-6)
    assert ours == pytest.approx(top_k_accuracy_score(labels, scores, k=k, labels=range(50)), abs=1e-12)


class Words:
    """A tokenizer that numbers prompts, and a model that has one random vector for each number."""

    def __init__(self, prompts: list[str], width: int) -> None:
        self.number = {prompt: number for number, prompt in enumerate(prompts)}
        self.table = torch.from_numpy(np.random.default_rng(3).standard_normal((len(prompts), width)))

    def __call__(self, prompts: list[str]) -> torch.Tensor:
        return torch.tensor([self.number[prompt] for prompt in prompts])

    def encode_text(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.table[numbers]


def test_class_embeddings_are_clips() -> None:
    names, templates = [f"thing {n}" for n in range(6)], [f"view {n} of a {{c}}." for n in range(80)]
    prompts = [template.replace("{c}", name) for name in names for template in templates]
    words = Words(prompts, 24)
    theirs = zeroshot_classification.zero_shot_classifier(words, words, names, templates, "cpu", amp=False)
    ours = class_embeddings(words.table.numpy(), np.arange(480).reshape(6, 80))
    assert np.abs(ours - theirs.T.numpy()).max() < 1e-7
    raw = words.table.reshape(6, 80, 24).mean(dim=1)
    raw = (raw / raw.norm(dim=1, keepdim=True)).numpy()  # negative control: prompts averaged before they are normalised
    assert np.abs(ours - raw).max() > 1e-3


def test_imagenet_names_and_templates() -> None:
    folder = resources.files("clip_benchmark").joinpath("datasets")
    ours = json.loads(
        resources.files("vladva.benchmarks.tasks").joinpath(find_benchmark("imagenet").prompts).read_text()
    )
    names = json.loads(folder.joinpath("en_classnames.json").read_text())["imagenet1k"]
    templates = json.loads(folder.joinpath("en_zeroshot_classification_templates.json").read_text())["imagenet1k"]
    assert ours["class_names"] == names
    assert ours["templates"][""] == templates
