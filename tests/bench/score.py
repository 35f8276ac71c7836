#!/usr/bin/env python
"""How fast retrieval of COCO's size is scored, against clip-benchmark's scorer, and that the numbers are the same.

    tests/bench/score.py [--width 512]

Random embeddings, without a model. Both scorers get the same normalised float32 embeddings and compute R@1, R@5 and
R@10 both ways, in turns; the best of each counts. The last line is JSON: `max_diff` between their scores, and
`vs_clip_benchmark`, their time over ours. Memory is the matter of rehearsal.py.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[2] / ".venv/peers"))  # where `make install` puts clip-benchmark

from clip_benchmark.metrics.zeroshot_retrieval import batchify, recall_at_k

from vladva.benchmarks.metrics import hits_at, rank, unit_rows
from vladva.benchmarks.protocols.retrieval import RETRIEVAL_CUTOFFS

T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """A result and the seconds it took."""
    started = time.perf_counter()
    return work(), time.perf_counter() - started


def coco(width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """25,010 captions of 5,000 images: the first ten images have six."""
    rng = np.random.default_rng(0)
    owners = np.repeat(np.arange(5000), [6] * 10 + [5] * 4990)
    images = rng.standard_normal((5000, width)).astype(np.float32)
    texts = images[owners] + 6 * rng.standard_normal((len(owners), width)).astype(np.float32)
    return unit_rows(texts), unit_rows(images), owners


def ours(texts: np.ndarray, images: np.ndarray, owners: np.ndarray) -> dict[str, float]:
    numbers = np.arange(len(images))
    ways = {"t2i": rank(texts, images, owners, numbers), "i2t": rank(images, texts, numbers, owners)}
    return {f"{way}_r{k}": hits_at(ranks, k).mean("strict") for way, ranks in ways.items() for k in RETRIEVAL_CUTOFFS}


def theirs(texts: np.ndarray, images: np.ndarray, owners: np.ndarray, batch: int = 64) -> dict[str, float]:
    """What clip_benchmark.metrics.zeroshot_retrieval.evaluate does once it has embeddings."""
    scores = torch.from_numpy(texts) @ torch.from_numpy(images).t()
    positive = torch.zeros_like(scores, dtype=torch.bool)
    positive[torch.arange(len(scores)), torch.from_numpy(owners)] = True
    found = {}
    for k in RETRIEVAL_CUTOFFS:
        for way, matrix, target in (("t2i", scores, positive), ("i2t", scores.T, positive.T)):
            hits = batchify(recall_at_k, matrix, target, batch, "cpu", k=k) > 0
            found[f"{way}_r{k}"] = hits.double().mean().item()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=512, help="dimension of the embeddings")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is timed")
    width = parser.parse_args().width

    texts, images, owners = coco(width)
    times: dict[str, list[float]] = {"ours": [], "theirs": []}
    for _ in range(parser.parse_args().rounds):
        scores, seconds = timed(lambda: ours(texts, images, owners))
        times["ours"].append(seconds)
        reference, seconds = timed(lambda: theirs(texts, images, owners))
        times["theirs"].append(seconds)
    for metric, value in scores.items():
        print(f"{metric:8} ours {value:.6f}  clip-benchmark {reference[metric]:.6f}")
    figures = {
        "width": width,
        "max_diff": max(abs(value - reference[metric]) for metric, value in scores.items()),
        "ours_s": min(times["ours"]),
        "clip_benchmark_s": min(times["theirs"]),
        "vs_clip_benchmark": min(times["theirs"]) / min(times["ours"]),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
