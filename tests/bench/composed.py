#!/usr/bin/env python
"""Does training on images with words help to find by both? The tiny model on scenes, one process, several seeds.

    python tests/bench/composed.py                   # three seeds, 200 steps; `--limit-s 500` does some of the runs
    python tests/bench/composed.py --out /tmp/try --steps 4 --train 400 --test 100 --seeds 1

    captions    the recipe `tiny`: images and captions; it has never seen an image with words
    composed    the recipe `tiny_composed`: an image with a change in words, and the image after it

Both have the same steps, batches and learning rate. Scored on held-out scenes and held-out changes, in percent:
composed_r1 by one vector of both, and the controls image_only_r1, text_only_r1 and halfway_r1 (the sum of the two
vectors) of the same model. A run that is done is not done again. The last line is one JSON object: for each variant
and score the mean and the standard deviation over the seeds, the variants of each seed, and the seconds of a run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.mistakes import train_here, without_ray
from vladva.config import RunConfig
from vladva.data import scan as scan_module
from vladva.data.scenes.composed import write_composed
from vladva.data.scenes.corpus import write_scenes
from vladva.recipes import tiny, tiny_composed
from vladva.train.data_loader import run_preprocessor

RECIPES = {"captions": tiny, "composed": tiny_composed}
BENCHMARK = "scenes_composed"
SCORES = ("composed_r1", "composed_r5", "composed_r10", "image_only_r1", "text_only_r1", "halfway_r1")


def make_data(out: Path, train: int, test: int) -> None:
    """Both data sets, where they are not there yet, scanned."""
    if not (out / "composed/test/composed.json").exists():
        write_composed(str(out / "composed"), train=train, test=test, samples_per_shard=500)
    if not (out / "scenes/test/retrieval.json").exists():
        write_scenes(str(out / "scenes"), train=train, test=1, negatives=1, samples_per_shard=500)
    for name in ("composed", "scenes"):
        scan_module.scan(str(out / name / "train"), run_preprocessor(tiny()).count_tokens)


def config_of(variant: str, seed: int, out: Path, steps: int, dtype: str) -> RunConfig:
    """The run of a variant."""
    base = RECIPES[variant]()
    folder = "composed" if variant == "composed" else "scenes"
    return replace(
        base,
        name=f"{variant}-{seed}",
        storage=str(out / "runs"),
        seed=seed,
        model=replace(base.model, dtype=dtype),
        data=replace(base.data, uri=str(out / folder / "train"), validation_uri=str(out)),
        train=replace(base.train, steps=steps, checkpoint_every=steps),
        cluster=replace(base.cluster, workers=1),
    )


def run(variant: str, seed: int, out: Path, steps: int, dtype: str) -> dict[str, float]:
    """The scores of a run, trained where that has not been done."""
    file = out / "scores" / f"{variant}-{seed}-{steps}-{dtype}.json"
    if not file.exists():
        began = time.monotonic()
        scores = train_here(config_of(variant, seed, out, steps, dtype), [BENCHMARK])
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(scores | {"seconds": time.monotonic() - began}))
    found: dict[str, float] = json.loads(file.read_text())
    print(f"{variant}, seed {seed}: {', '.join(f'{n} {found[n]:.1f}' for n in (*SCORES, 'seconds'))}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(".vladva/composed-bench"), help="folder; what is done is there"
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--train", type=int, default=8_000, help="pairs to train on")
    parser.add_argument("--test", type=int, default=1_000, help="held-out queries")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen model")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no run after so many seconds")
    options = parser.parse_args()
    out = options.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    without_ray()
    make_data(out, options.train, options.test)
    runs: dict[str, list[dict[str, float]]] = {variant: [] for variant in RECIPES}
    for seed in range(options.seeds):
        for variant in RECIPES:
            done = (out / "scores" / f"{variant}-{seed}-{options.steps}-{options.dtype}.json").exists()
            if done or time.monotonic() - began < options.limit_s:
                runs[variant].append(run(variant, seed, out, options.steps, options.dtype))
    result = {}
    for variant, found in runs.items():
        values = {name: np.array([each[name] for each in found]) for name in (*SCORES, "seconds")}
        result[variant] = {
            name: [round(float(v.mean()), 2), round(float(v.std(ddof=1)), 2) if len(v) > 1 else None]
            for name, v in values.items()
            if len(v)
        }
    seeds = {variant: len(found) for variant, found in runs.items()}
    settings = {name: getattr(options, name) for name in ("steps", "train", "test", "dtype")}
    print(json.dumps({**settings, "seeds": seeds, **result}))


if __name__ == "__main__":
    main()
