#!/usr/bin/env python
"""Mining over a million synthetic rows: memory, and how the time of a sample grows with the rows it is sought among.

    python tests/bench/mine.py                                     # 62,500 and 1,000,000 rows of 64 numbers
    python tests/bench/mine.py --rows 200000 --samples 100         # a try

Half of the rows are images, half their captions; each caption is near its image, and topics make neighbours. The
indexes are built and searched as `jobs/mine.py` does. The last line is one JSON object. Goals: peak_gib <= 4 (of the
process that builds and mines), growth < 0.5 x rows_ratio (sublinear: all pairs would be 1 x), found_of_exact >= 0.9
(of the negatives that comparing every row finds).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("LANCE_LOG", "error")

import numpy as np
import pyarrow as pa

from vladva.core.hashing import digest
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.mine.negatives import (
    INDEXED,
    EqualImages,
    MinedNegative,
    MiningConfig,
    MiningQuery,
    NegativeFinder,
    index_once,
    opened_for_mining,
)

WIDTH = 64
SMALLER = 16  # times: the rows that the growth is measured against
MODEL: Any = {"fingerprint": "benchmarkbenchma", "dimension": WIDTH}
CONFIG = MiningConfig()
SAMPLES_PER_SHARD = 1000


def vectors(pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and captions, unit vectors [N, 64] each: topics of some fifty samples, captions beside their images."""
    random = np.random.default_rng(0)
    topics = random.normal(size=(max(1, pairs // 50), WIDTH)).astype(np.float32)
    images_ND = topics[random.integers(0, len(topics), pairs)] + 0.7 * random.normal(size=(pairs, WIDTH)).astype(
        np.float32
    )
    captions_ND = images_ND + 0.4 * random.normal(size=(pairs, WIDTH)).astype(np.float32)
    return tuple(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images_ND, captions_ND))


def sample_id(number: int) -> str:
    return f"{number // SAMPLES_PER_SHARD:06d}.tar#{number:08d}"


def write_rows_of(uri: str, images_ND: np.ndarray, captions_ND: np.ndarray) -> None:
    """A complete table, as mining embeds it."""
    writer = TableWriter(uri, MODEL, "")
    for first in range(0, len(images_ND), 20_000):
        numbers = range(first, min(first + 20_000, len(images_ND)))
        ids = [sample_id(n) for n in numbers]
        shards = [name.partition("#")[0] for name in ids]
        texts = [f"caption {n}" for n in numbers]
        none = pa.nulls(len(ids), pa.string())
        for kind, names, columns, part_ND in (
            ("image", ids, {"text": none, "caption": texts}, images_ND),
            ("text", [f"{name}#0" for name in ids], {"text": texts, "caption": none}, captions_ND),
        ):
            contents = pa.array([digest(kind, name) for name in names], pa.binary(16))
            rows = {"id": names, "kind": [kind] * len(names), "content": contents, "shard": shards, **columns}
            write_part(uri, pa.table(rows), part_ND[numbers.start : numbers.stop], MODEL)
    writer.commit()


def exact(number: int, images_ND: np.ndarray, captions_ND: np.ndarray) -> set[str]:
    """The negatives that comparing every row finds."""
    ceiling = CONFIG.ceiling(float(images_ND[number] @ captions_ND[number]))
    best: dict[int, float] = {}
    for scores_N in (captions_ND @ images_ND[number], images_ND @ captions_ND[number]):
        near = np.argpartition(-scores_N, CONFIG.neighbours)[: CONFIG.neighbours]
        for other in near[scores_N[near] <= ceiling].tolist():
            best[other] = max(best.get(other, -1.0), float(scores_N[other]))
    best.pop(number, None)
    return {f"caption {other}" for other in sorted(best, key=lambda n: -best[n])[: CONFIG.per_sample]}


def measure(pairs: int, samples: int, folder: Path) -> dict[str, float]:
    """Build both indexes of so many pairs, and mine some of the samples."""
    images_ND, captions_ND = vectors(pairs)
    table = str(folder / "table")
    write_rows_of(table, images_ND, captions_ND)
    began = time.monotonic()
    for kind in INDEXED:
        index_once(table, str(folder / f"{kind}s"), kind)
    built = time.monotonic() - began
    texts, images = (opened_for_mining(str(folder / name)) for name in ("texts", "images"))
    find = NegativeFinder(texts, images, EqualImages({}, {}), CONFIG)
    chosen = np.random.default_rng(1).choice(pairs, samples + 20, replace=False).tolist()

    def mined(number: int) -> list[MinedNegative]:
        return find(MiningQuery(sample_id(number), images_ND[number], [f"caption {number}"], captions_ND[number][None]))

    for number in chosen[:20]:  # not counted
        mined(number)
    times, shared, there = [], 0, 0
    for number in chosen[20:]:
        began = time.perf_counter()
        found = mined(number)
        times.append(time.perf_counter() - began)
        expected = exact(number, images_ND, captions_ND)
        shared += len(expected & {each.text for each in found})
        there += len(expected)
    return {
        "rows": 2 * pairs,
        "build_s": round(built, 1),
        "sample_ms": round(1000 * float(np.median(times)), 3),
        "negatives": there,
        "found_of_exact": round(shared / max(1, there), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="images and captions together")
    parser.add_argument("--samples", type=int, default=300, help="that are mined, at each size")
    options = parser.parse_args()
    results = []
    for rows in (options.rows // SMALLER, options.rows):
        with tempfile.TemporaryDirectory(prefix="vladva-mine-") as folder:
            results.append(measure(rows // 2, options.samples, Path(folder)))
        print(json.dumps(results[-1]), flush=True)
    few, many = results
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        json.dumps(
            {
                **many,
                "rows_ratio": SMALLER,
                "growth": round(many["sample_ms"] / few["sample_ms"], 2),
                "peak_gib": round(peak, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
