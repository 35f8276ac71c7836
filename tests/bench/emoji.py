#!/usr/bin/env python
"""What does the tiny model learn of emoji? The commands of `.docs/pages/examples/emoji.md`, with several seeds.

    python tests/bench/emoji.py --packages FOLDER     # of the four files that `npm pack` wrote; three seeds
    python tests/bench/emoji.py --packages FOLDER --out /tmp/try --seeds 1 --steps 4

Trained on the pictures of two vendors, searched in those of three, all of which the runs have never seen; zero-shot
beside them. What is done is not done again. The last line is one JSON object: for each table the R@1 and R@10 of text
to image and image to text, in percent, zero-shot and trained (mean, half its 95% interval by Student's t over the
seeds), the number of images, and the seconds of each training.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

ROOT = Path(__file__).parents[2]
SETTINGS = {"optim.lr": "1e-3", "model.lora-alpha": "32"}  # those of the page
VENDORS = {
    "google": "emoji-datasource-google-16.0.0.tgz",
    "twitter": "emoji-datasource-twitter-16.0.0.tgz",
    "fluent": "lobehub-fluent-emoji-3d-1.1.0.tgz",
}
NAMES = "emojibase-data-17.0.0.tgz"
TABLES = ("seen-fluent", "unseen-google", "unseen-twitter", "unseen-fluent")
SCORES = ("t2i_r1", "t2i_r10", "i2t_r1", "i2t_r10")


def vladva(out: Path, *arguments: str) -> None:
    """Run a command as the page does, in the folder `out`."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'platform'}:{ROOT}"}
    subprocess.run([sys.executable, "-m", "jobs", *arguments], cwd=out, env=environment, check=True)


def train(out: Path, seed: int, steps: int, dtype: str) -> float:
    """A run of a seed, where it has not been trained; the seconds that it took."""
    file = out / "seconds" / f"{seed}.json"
    if not file.exists():
        began = time.monotonic()
        options = {"data.uri": "emoji/shards", "train.steps": str(steps), "seed": str(seed), "model.dtype": dtype}
        given = [word for name, value in (options | SETTINGS).items() for word in (f"--{name}", value)]
        vladva(out, "train", "tiny", "--name", f"seed-{seed}", "--storage", "runs", *given)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(time.monotonic() - began))
    return float(file.read_text())


def summary(models: dict[str, dict[str, float]]) -> dict[str, list[float | None]]:
    """Score -> [zero-shot, mean of the trained, half its interval]; of one seed there is no interval: None."""
    found: dict[str, list[float | None]] = {}
    trained = [scores for label, scores in models.items() if label != "zero-shot"]
    for name in SCORES:
        values = 100 * np.array([scores[name] for scores in trained])
        n, half = len(values), None
        if n > 1:
            half = round(float(student_t.ppf(0.975, n - 1) * values.std(ddof=1) / n**0.5), 2)
        found[name] = [round(100 * models["zero-shot"][name], 2), round(float(values.mean()), 2), half]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", type=Path, required=True, help="folder with what `npm pack` wrote")
    parser.add_argument("--out", type=Path, default=Path(".vladva/emoji-bench"), help="folder; what is done is there")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the frozen model; bfloat16 takes about half the time on a CPU with such instructions",
    )
    options = parser.parse_args()
    out, packages = options.out.absolute(), options.packages.absolute()
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "emoji/train.parquet").exists():
        sets = [f"{vendor}={packages / file}" for vendor, file in VENDORS.items()]
        vladva(out, "emoji", *sets, "--test-vendors", "fluent", "--names", str(packages / NAMES), "--out", "emoji")
    vladva(out, "prepare", "emoji/train.parquet", "--out", "emoji/shards", "--id-column", "id")
    seconds = [round(train(out, seed, options.steps, options.dtype)) for seed in range(options.seeds)]
    result: dict[str, object] = {}
    models = ["zero-shot=tiny", *(f"seed-{seed}=runs/seed-{seed}" for seed in range(options.seeds))]
    for table in TABLES:
        given = ["--benchmarks", "retrieval", "--data", f"emoji/{table}.parquet", "--out", f"scores/{table}"]
        vladva(out, "evaluate", *models, *given, "--actors", "1")
        scores = json.loads((out / "scores" / table / "scores.json").read_text())["models"]
        result[table] = summary({label: of["scores"]["retrieval"] for label, of in scores.items()})
    settings = {name: getattr(options, name) for name in ("steps", "seeds", "dtype")}
    print(json.dumps({**settings, "seconds": seconds, **result}))


if __name__ == "__main__":
    main()
