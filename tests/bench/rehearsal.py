#!/usr/bin/env python
"""Scoring benchmarks of full size, without a model: how long, and in how much memory.

    tests/bench/rehearsal.py [--width 1024]

Random embeddings through a benchmark's own `score`: COCO's form (5,000 images with 5 captions each) and ImageNet's
(50,000 images against 1,000 classes in 80, 7 and 1 templates). The last line is JSON: the seconds of each, the
highest resident memory of the process so far in MB, the embeddings included, and how far the scores are from chance in
standard errors (random embeddings know nothing).
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib import resources

import numpy as np

from vladva.benchmarks.protocols.classification import ClassificationTask
from vladva.benchmarks.protocols.retrieval import RetrievalTask
from vladva.benchmarks.protocols.unique_items import UniqueItems
from vladva.data.image_refs import ImageRef


def peak_mb() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refs(count: int) -> list[ImageRef]:
    """Images that nobody will read."""
    return [ImageRef(f"image/{number}", f"{number}.jpg", "", 0, 0) for number in range(count)]


def coco() -> RetrievalTask:
    """5,000 images with 5 captions each, all different."""
    owners = np.repeat(np.arange(5000), 5)
    captions = tuple(f"caption {number}" for number in range(len(owners)))
    numbers, groups = np.arange(len(owners)), np.repeat("", 5000)
    return RetrievalTask(captions, refs(5000), numbers, owners, "expected", {}, {}, groups)


def imagenet() -> ClassificationTask:
    """50 images of each of the 1,000 classes, and the published names in all three sets of templates."""
    words = json.loads(resources.files("vladva.benchmarks.tasks").joinpath("imagenet_prompts.json").read_bytes())
    texts = UniqueItems()
    prompts = {
        suffix: np.stack([texts.add(t.replace("{c}", name) for t in templates) for name in words["class_names"]])
        for suffix, templates in words["templates"].items()
    }
    labels = np.repeat(np.arange(1000), 50)
    return ClassificationTask(texts.items, refs(50_000), labels, prompts, 1000, "expected", {}, {})


def rehearse(name: str, task: RetrievalTask | ClassificationTask, width: int) -> dict[str, float]:
    """Score random embeddings of a task's texts and images."""
    rng = np.random.default_rng(0)
    texts = rng.standard_normal((len(task.texts), width), dtype=np.float32)
    images = rng.standard_normal((len(task.images), width), dtype=np.float32)
    started = time.perf_counter()
    scores = task.score(texts, images).scores
    seconds = time.perf_counter() - started
    queries = {"t2i": len(task.texts), "i2t": len(task.images), "top": len(task.images)}
    errors = {m: (p * (1 - p) / queries[m[:3]]) ** 0.5 for m, p in task.chance.items()}
    off = max(abs(scores[metric] - chance) / errors[metric] for metric, chance in task.chance.items())
    print(f"{name}: {len(texts):,} texts, {len(images):,} images, {seconds:.1f} s, peak {peak_mb():,.0f} MB")
    return {f"{name}_s": seconds, f"{name}_peak_mb": peak_mb(), f"{name}_from_chance": off}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024, help="dimension of the embeddings")
    width = parser.parse_args().width
    figures = {"width": width, "imports_mb": peak_mb()}
    figures |= rehearse("coco", coco(), width) | rehearse("imagenet", imagenet(), width)
    print(json.dumps({name: round(value, 3) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
