#!/usr/bin/env python
"""Whether the memory of the contrastive losses grows with the global batch G, or with its square.

    tests/bench/losses.py [--large 32768]

Forward and backward of each loss on 512-dimensional float32 embeddings, every size in a process of its own. The last
line is JSON; of each loss, the memory that the process takes at its peak above what embeddings and libraries take:

    *_growth   at G = 32,768 over that at 8,192: linear is 4, a matrix of G x G would make it 16
    *_gib      at G = 32,768; the matrix of the naive loss alone is 4 GiB, and its gradient another
    *_share    processor time of one of 64 workers for its share of G = 4,096, over that for the whole loss
    *_error    largest difference of the gradients from the naive loss's at G = 512, relative to their largest value
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize, softplus

from vladva.config import LossConfig
from vladva.losses.contrastive import contrastive_loss, find_loss
from vladva.losses.pairs import select_pairs

WIDTH, DIMS = 512, (128, 256)
SCALE, BIAS = math.log(10.0), -10.0
LOSSES = ("info_nce", "sigmoid", "matryoshka")


def embeddings(pairs: int) -> tuple[Tensor, Tensor]:
    """Random images and texts [G, D] of unit norm, each text a little like its image."""
    generator = torch.Generator().manual_seed(0)
    images, noise = torch.randn(2, pairs, WIDTH, generator=generator)
    return normalize(images, dim=-1).requires_grad_(), normalize(images + noise, dim=-1).requires_grad_()


def ours(loss: str, images: Tensor, texts: Tensor) -> Tensor:
    """The loss as training computes it."""
    found = find_loss(LossConfig(contrastive="sigmoid" if loss == "sigmoid" else "info_nce"))
    scalars = {"log_scale": torch.tensor(SCALE), "bias": torch.tensor(BIAS)}
    return contrastive_loss(
        found, select_pairs(images, texts), scalars, widths=DIMS if loss == "matryoshka" else ()
    ).loss


def naive(loss: str, images: Tensor, texts: Tensor) -> Tensor:
    """The same from the whole matrix of similarities."""
    target, values = torch.arange(len(images)), []
    for width in (*DIMS, WIDTH) if loss == "matryoshka" else (WIDTH,):
        x, y = ((side if width == WIDTH else normalize(side[:, :width], dim=-1)) for side in (images, texts))
        logits = x @ y.T * math.exp(SCALE)
        if loss == "sigmoid":
            values.append(softplus((1 - 2 * torch.eye(len(images))) * (logits + BIAS)).sum() / len(images))
        else:
            values.append((cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2)
    return torch.stack(values).mean()


def share_of(loss: str, workers: int = 64, pairs: int = 4096) -> float:
    """Time for one worker's rows and columns, figures included, over that for all of them."""
    found = find_loss(LossConfig(contrastive="sigmoid" if loss == "sigmoid" else "info_nce"))
    scalars = {"log_scale": torch.tensor(SCALE), "bias": torch.tensor(BIAS)}
    widths, sides = DIMS if loss == "matryoshka" else (), embeddings(pairs)
    whole = select_pairs(*sides)
    seconds = []
    for pairs_of in (whole, whole, replace(whole, share=range(pairs // 2, pairs // 2 + pairs // workers))):
        began = time.process_time()
        torch.autograd.grad(contrastive_loss(found, pairs_of, scalars, widths=widths).loss, sides)
        seconds.append(time.process_time() - began)
    return seconds[-1] / seconds[1]


def error(loss: str, pairs: int = 512) -> float:
    """Largest relative difference of both gradients."""
    sides = embeddings(pairs)
    found, expected = (torch.autograd.grad(function(loss, *sides), sides) for function in (ours, naive))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, expected, strict=True))


def resident(field: str) -> int:
    """VmRSS, the resident memory of this process, or VmHWM, its highest since it was reset; bytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def memory_of(loss: str, pairs: int) -> int:
    """Bytes that a forward and backward takes above its inputs, at its peak."""
    torch.autograd.grad(ours(loss, *(sides := embeddings(256))), sides)  # the libraries' own
    sides = embeddings(pairs)
    Path("/proc/self/clear_refs").write_text("5")  # resets the highest
    before = resident("VmRSS")
    torch.autograd.grad(ours(loss, *sides), sides)
    return resident("VmHWM") - before


def in_a_process(loss: str, pairs: int) -> int:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", loss, "--pairs", str(pairs)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--large", type=int, default=32_768)
    parser.add_argument("--memory-of", default="", help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.memory_of:
        print(memory_of(options.memory_of, options.pairs))
        return
    figures = {}
    for loss in LOSSES:
        small, large = map(partial(in_a_process, loss), (options.large // 4, options.large))
        figures |= {f"{loss}_growth": round(large / small, 2), f"{loss}_gib": round(large / 2**30, 3)}
        figures[f"{loss}_share"] = round(share_of(loss), 3)
        figures[f"{loss}_error"] = float(f"{error(loss):.1e}")
        print(loss, figures, flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
