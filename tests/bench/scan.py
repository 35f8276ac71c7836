#!/usr/bin/env python
"""What the rules for real files cost: time per sample of the scan, beside that of the version before them.

    tests/bench/scan.py                      some two minutes on one core
    tests/bench/scan.py --before REV         another version of this repository to compare with

Before: images as Pillow opens them (lying as they lie, transparency black), tars as tarfile lists them, captions as
they are. Both versions scan the same shards, each in a process of its own and both taking turns: JPEG images of
640 x 480 as web data has them, and PNG images of 64 x 64 as the generated scenes are, where what is not decoding weighs
most. Counted is the processor's time of the scan alone, with every image decoded (`verify`), and captions counted by
the tiny model's tokenizer; the ratio is the median over the rounds. The old version is taken out of git.

The last line is JSON.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from statistics import median

import numpy as np
from PIL import Image

BEFORE = "07f241a582429ee5cdd98f1186c6ff6b4378207d"
REPOSITORY = Path(__file__).parents[2]
WORDS = [
    "a",
    "small",
    "red",
    "circle",
    "stands",
    "left",
    "of",
    "two",
    "large",
    "blue",
    "squares",
    "near",
    "the",
    "edge",
]
WORKER = """
import sys, time
from vladva.data.sidecar import scan_shard
from vladva.models.preprocessor import Preprocessor
count_tokens = Preprocessor("tiny").count_tokens
for line in sys.stdin:
    began = time.process_time()
    found = scan_shard(sys.argv[1], line.strip(), count_tokens)
    print("took", time.process_time() - began, len(found[0]), flush=True)
"""


def write_shard(path: Path, samples: int, size: tuple[int, int], suffix: str) -> None:
    """A tar of noisy images, each with a short caption in a text and a long one in a JSON."""
    random.seed(0)
    rng = np.random.default_rng(0)
    width, height = size
    with tarfile.open(path, "w") as tar:
        for number in range(samples):
            coarse = rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8)
            body = io.BytesIO()
            Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(
                body, "JPEG" if suffix == "jpg" else "PNG"
            )
            captions = {"captions": [" ".join(random.choices(WORDS, k=60))]}
            text = " ".join(random.choices(WORDS, k=10))
            for name, data in (
                (suffix, body.getvalue()),
                ("txt", text.encode()),
                ("json", json.dumps(captions).encode()),
            ):
                member = tarfile.TarInfo(f"{number:06d}.{name}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def version_of(revision: str, folder: Path) -> Path:
    """The package as it was."""
    archive = subprocess.run(["git", "archive", revision, "platform"], cwd=REPOSITORY, capture_output=True, check=True)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")
    return folder / "platform"


def scanner_of(platform: Path, data: Path) -> subprocess.Popen[str]:
    """A process that scans the shards whose names it is given."""
    environment = os.environ | {"PYTHONPATH": str(platform), "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    environment["TOKENIZERS_PARALLELISM"] = "false"
    command = [sys.executable, "-c", WORKER, str(data)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, cwd=data, stdin=pipe, stdout=pipe, text=True)


def seconds_of(process: subprocess.Popen[str], shard: str, samples: int) -> float:
    """Processor time of one scan."""
    assert process.stdin
    assert process.stdout
    process.stdin.write(f"{shard}\n")
    process.stdin.flush()
    while not (line := process.stdout.readline()).startswith("took "):
        assert line, "a scanner ended"
    _, seconds, found = line.split()
    assert int(found) == samples, line
    return float(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", default=BEFORE, metavar="REV", help="version to compare with")
    parser.add_argument("--samples", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    figures: dict[str, object] = {"before": options.before[:12], "samples": options.samples, "rounds": options.rounds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = {"jpeg_640x480": ((640, 480), "jpg"), "png_64x64": ((64, 64), "png")}
        for shard, (size, suffix) in shards.items():
            write_shard(folder / f"{shard}.tar", options.samples, size, suffix)
        scanners = {
            "before": scanner_of(version_of(options.before, folder / "then"), folder),
            "now": scanner_of(REPOSITORY / "platform", folder),
        }
        for shard in shards:
            taken: dict[str, list[float]] = {which: [] for which in scanners}
            for round_ in range(options.rounds + 1):  # the first warms up
                for which in sorted(scanners, reverse=bool(round_ % 2)):
                    seconds = seconds_of(scanners[which], f"{shard}.tar", options.samples)
                    if round_:
                        taken[which].append(seconds)
            ratio = median(now / then for now, then in zip(taken["now"], taken["before"], strict=True))
            each = {which: 1000 * median(of) / options.samples for which, of in taken.items()}
            print(f"{shard}: {each['before']:.3f} ms a sample before, {each['now']:.3f} now, {ratio:.3f} times")
            figures[shard] = {**{f"{which}_ms": round(ms, 4) for which, ms in each.items()}, "ratio": round(ratio, 4)}
        for process in scanners.values():
            assert process.stdin
            process.stdin.close()
            process.wait()
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
