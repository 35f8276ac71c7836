#!/usr/bin/env python
"""How fast benchmarks are scored, and in how much memory: COCO's size against clip-benchmark, ImageNet's alone.

    tests/bench/score.py [--width 512]

Random embeddings, without a model. Both scorers get the same normalised float32 embeddings and compute R@1, R@5 and
R@10 both ways. The last line is JSON: `max_diff` between their scores, `vs_clip_benchmark` (their time over ours), and
for the two rehearsals through a benchmark's own `score` the seconds and the highest memory of the process in MB.
"""

from __future__ import annotations

import argparse
import json
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[2] / ".venv/peers"))  # where `make install` puts clip-benchmark

from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

from vladva.benchmarks.kinds.classification import ClassificationTask
from vladva.benchmarks.kinds.retrieval import CUTOFFS, RetrievalTask
from vladva.benchmarks.readers.images import ImageRef
from vladva.metrics import hits_at, rank, unit_rows

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """A result and the seconds it took."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def peak_mb() -> float:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def refs(count: int) -> list[ImageRef]:
    return [ImageRef(f"image/{number}", f"{number}.jpg", "", 0, 0) for number in range(count)]


def coco(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """25,010 captions of 5,000 pictures: the first ten pictures have six."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(5000), [6] * 10 + [5] * 4990)
    images = rng.standard_normal((5000, width)).astype(np.float32)
    texts = images[owners] + 6 * rng.standard_normal((len(owners), width)).astype(np.float32)
    return unit_rows(texts), unit_rows(images), owners


def ours(texts: np.ndarray, images: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    numbers = np.arange(len(images))
    ways = {"t2i": rank(texts, images, owners, numbers), "i2t": rank(images, texts, numbers, owners)}
    return {f"{way}_r{k}": hits_at(ranks, k).mean("strict") for way, ranks in ways.items() for k in CUTOFFS}


def theirs(texts: np.ndarray, images: np.ndarray, owners: np.ndarray, batch: int = 64) -> dict[str, float]:
    """What clip_benchmark.metrics.zeroshot_retrieval.evaluate does once it has embeddings."""
    scores = torch.from_numpy(texts) @ torch.from_numpy(images).t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), torch.from_numpy(owners)] = True
    found = {}
    for k in CUTOFFS:
        for way, matrix, target in (("t2i", scores, positive), ("i2t", scores.T, positive.T)):
            hits = batchify(recall_at_k, matrix, target, batch, "cpu", k=k) > 0
            found[f"{way}_r{k}"] = hits.double().mean().item()
    return found


def rehearse_coco(texts: np.ndarray, images: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    names = tuple(f"caption {number}" for number in range(len(texts)))
    task = RetrievalTask(
        names, refs(len(images)), np.arange(len(texts)), owners, "expected", {}, {}, np.repeat("", len(images))
    )
    return task.score(texts, images).scores


def rehearse_imagenet(width: int) -> dict[str, float]:
    """50,000 random vectors against 1,000 classes of 80 prompts."""
    rng = np.random.default_rng(1)
    prompts = rng.standard_normal((80_000, width), dtype=np.float32)
    images = rng.standard_normal((50_000, width), dtype=np.float32)
    labels = np.arange(50_000) % 1000
    rows = {"": np.arange(80_000).reshape(1000, 80)}
    texts = tuple(f"prompt {number}" for number in range(80_000))
    return ClassificationTask(texts, refs(50_000), labels, rows, 1000, "expected", {}, {}).score(prompts, images).scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="dimension of the embeddings")
    width = parser.parse_args().width

    print(f"after the imports: {peak_mb():.0f} MB")
    texts, images, owners = coco(width)
    _, coco_s = timed(lambda: rehearse_coco(texts, images, owners))
    coco_mb = peak_mb()
    top, imagenet_s = timed(lambda: rehearse_imagenet(width))
    imagenet_mb = peak_mb()
    print(
        f"COCO form: {coco_s:.1f} s, {coco_mb:.0f} MB; ImageNet form: {imagenet_s:.1f} s, {imagenet_mb:.0f} MB, {top}"
    )

    scores, ours_s = timed(lambda: ours(texts, images, owners))
    reference, theirs_s = timed(lambda: theirs(texts, images, owners))
    for metric, value in scores.items():
        print(f"{metric:8} ours {value:.6f}  clip-benchmark {reference[metric]:.6f}")
    figures = {
        "width": width,
        "max_diff": max(abs(value - reference[metric]) for metric, value in scores.items()),
        "ours_s": ours_s,
        "clip_benchmark_s": theirs_s,
        "vs_clip_benchmark": theirs_s / ours_s,
        "coco_rehearsal_s": coco_s,
        "coco_rehearsal_peak_mb": coco_mb,
        "imagenet_rehearsal_s": imagenet_s,
        "imagenet_rehearsal_peak_mb": imagenet_mb,
    }
    print(json.dumps({name: round(value, 4) for name, value in figures.items()}))


if __name__ == "__main__":
    main()
