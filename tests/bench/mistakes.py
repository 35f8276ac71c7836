#!/usr/bin/env python
"""Does training from mistakes help? The tiny model on scenes, one process, each variant with several seeds.

    python tests/bench/mistakes.py                   # three seeds, 150 steps
    python tests/bench/mistakes.py --limit-s 500     # some of the runs; the same again goes on
    python tests/bench/mistakes.py --dtype bfloat16  # in about half the time on a CPU with bfloat16 instructions
    python tests/bench/mistakes.py --out /tmp/try --steps 4 --train 400 --test 100 --seeds 1

    baseline           the recipe `tiny`: InfoNCE, runs of eight neighbours of the corpus
    hardness           loss.contrastive hardness_weighted, hardness 5
    false_negatives    pairs whose captions the base model, zero-shot, finds nearly the same are no negatives
    mined              hard negatives mined with the baseline of seed 0, two of each pair
    clusters           global batches of 16 neighbours by the baseline of seed 0

All variants have the same steps, batches and learning rate; the last four of them need what the first has left. The
steps are those of the training loop (data_loader.py, setup.py, engine.py), without Ray. The threshold of the mask is
the 99.5th percentile of the cosines of random pairs of captions. Held-out scenes; percent. The last line is one JSON
object: for each variant and score the mean, the standard deviation over seeds and the difference from the baseline
with the same seed, with a 95% interval (Student's t).
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("LANCE_LOG", "error")

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import pyarrow as pa
import torch

from tests.support.without_ray import scan_here
from vladva.config import RunConfig
from vladva.core import ray_tasks, storage
from vladva.core.hashing import digest
from vladva.core.images import decode_image
from vladva.data import scan as scan_module
from vladva.data.sample_vectors import find_vectors, teacher_uri
from vladva.data.scenes.corpus import write_scenes
from vladva.data.shard_index import ShardIndex
from vladva.embed.corpus import ITEM, read_item_images
from vladva.embed.table import embedding_matrix, find_manifest, read_embeddings
from vladva.embed.table_parts import write_part
from vladva.embed.table_writer import TableWriter
from vladva.mine.negatives import MINED, MiningConfig, copy_with_negatives, mining_rows
from vladva.mine.neighbours import order_samples
from vladva.mine.teacher import align
from vladva.models import checkpoint
from vladva.models.adapter import save_adapter
from vladva.models.embedder import load_embedder
from vladva.models.resolve import describe
from vladva.recipes import tiny
from vladva.train.data_loader import ChunkReader, run_preprocessor
from vladva.train.engine import Engine
from vladva.train.setup import build_engine, make_backward
from vladva.train.validation import Validation

VARIANTS = ("baseline", "hardness", "false_negatives", "mined", "clusters")
BENCHMARKS = ("scenes_retrieval", "scenes_compositionality")
SHOWN = ("t2i_r1", "i2t_r1", "replace_object", "replace_attribute", "replace_relation", "swap_object", "swap_attribute")
STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776}  # 97.5%, by degrees of freedom


def here(function: Callable[[int], Any], numbers: Iterable[int]) -> Iterator[Any]:
    """What Ray would do in tasks, one after the other."""
    return (function(number) for number in numbers)


def without_ray() -> None:
    """Scans and mining run in this process; one rank of training, at a port of its own."""
    ray_tasks.each = here
    scan_module._run = scan_here
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(listener.getsockname()[1])}


class Experiment:
    """A folder with the data, what was made for the variants, and the scores of every run that is done."""

    def __init__(self, out: Path, options: argparse.Namespace) -> None:
        self.out, self.options = out, options
        if not (out / "scenes/test/retrieval.json").exists():
            write_scenes(
                str(out / "scenes"),
                train=options.train,
                test=options.test,
                negatives=min(200, options.test),
                samples_per_shard=500,
            )
        self.data = str(out / "scenes/train")
        self.scan(self.data)

    def scan(self, uri: str) -> None:
        scan_module.scan(uri, run_preprocessor(tiny()).count_tokens)

    def config(self, variant: str, seed: int) -> RunConfig:
        """The run of a variant; what it needs of others is made where it is not there."""
        base, steps = tiny(), self.options.steps
        config = replace(
            base,
            name=f"{variant}-{seed}",
            storage=str(self.out / "runs"),
            seed=seed,
            data=replace(base.data, uri=self.data, validation_uri=str(self.out / "scenes")),
            model=replace(base.model, dtype=self.options.dtype),
            train=replace(base.train, steps=steps, checkpoint_every=steps),
            cluster=replace(base.cluster, workers=1),
        )
        if variant == "hardness":
            return replace(
                config, loss=replace(config.loss, contrastive=f"{variant}_weighted", options=("hardness=5",))
            )
        if variant == "false_negatives":
            return self.taught(config)
        if variant == "mined":
            return replace(config, data=replace(config.data, uri=self.mined(), hard_negatives=2))
        if variant == "clusters":
            return replace(config, data=replace(config.data, order=self.order(), neighbourhood=16))
        return config

    def embedded(self, model: str, adapter: bool, uri: str) -> str:
        """The table of the training set's images and short captions by a model, in this process."""
        manifest = find_manifest(uri)
        if manifest is not None and manifest.complete:
            return uri
        index, embedder = ShardIndex.open(self.data), load_embedder(model, adapter=adapter)
        description = describe(model, adapter=adapter, dtype="float32")[1]
        writer = TableWriter(uri, description, index.data_uri)
        for first in range(0, index.num_samples, 250):
            items = mining_rows(index, 30, first, min(250, index.num_samples - first))
            images, texts = ([item for item in items if item["kind"] == kind] for kind in ("image", "text"))
            bodies = read_item_images(index.data_uri, images)
            for part, contents, vectors in (
                (images, bodies, embedder.embed_images([decode_image(body) for body in bodies])),
                (texts, [item["text"] for item in texts], embedder.embed_texts([item["text"] for item in texts])),
            ):
                rows = pa.Table.from_pylist(part, ITEM).drop_columns(["image"])
                digests = pa.array([digest(content) for content in contents], pa.binary(16))
                write_part(uri, rows.append_column("content", digests), np.asarray(vectors), description)
        writer.commit()
        return uri

    def baseline(self) -> str:
        """The run whose mistakes are mined; its own scores are those of the baseline with seed 0."""
        self.run("baseline", 0)
        return str(self.out / "runs/baseline-0")

    def mined(self) -> str:
        """Shards with negatives."""
        out = str(self.out / "mined")
        self.embedded(self.baseline(), True, storage.join(out, MINED, "table"))
        print(copy_with_negatives(ShardIndex.open(self.data), out, MiningConfig()), flush=True)
        self.scan(out)
        return out

    def order(self) -> str:
        """An order of the samples."""
        uri = str(self.out / "order.parquet")
        if not storage.exists(uri):
            self.mined()
            order_samples(str(self.out / "mined" / MINED / "table"), ShardIndex.open(self.data), uri)
        return uri

    def taught(self, config: RunConfig) -> RunConfig:
        """The run with a teacher's vectors, and the threshold that few random pairs of captions pass."""
        table = self.embedded("tiny", False, str(self.out / "zero-shot"))
        rows = read_embeddings(table)
        vectors = embedding_matrix(rows.filter(pa.compute.equal(rows["kind"], "text")))
        random = np.random.default_rng(0)
        one, other = (random.integers(0, len(vectors), 100_000) for _ in range(2))
        cosines = (vectors[one] * vectors[other]).sum(1)[one != other]
        above = round(min(1.0, float(np.quantile(cosines, 0.995))), 4)
        config = replace(config, loss=replace(config.loss, false_negatives_above=above))
        if find_vectors(teacher_uri(config, 0)) is None:
            align(table, ShardIndex.open(self.data), teacher_uri(config, 0))
        return config

    def train(self, variant: str, seed: int) -> dict[str, float]:
        """The scores of a variant, trained now."""
        return train_here(self.config(variant, seed))

    def run(self, variant: str, seed: int) -> dict[str, float]:
        """The scores of a run, trained where that has not been done."""
        file = self.out / "scores" / f"{variant}-{seed}.json"
        if not file.exists():
            began = time.monotonic()
            scores = self.train(variant, seed)
            scores["seconds"] = time.monotonic() - began
            file.parent.mkdir(exist_ok=True)
            file.write_text(json.dumps(scores))
            print(
                f"{variant}, seed {seed}: {', '.join(f'{n} {scores[n]:.1f}' for n in (*SHOWN, 'seconds'))}", flush=True
            )
        return json.loads(file.read_text())


def train_here(config: RunConfig, benchmarks: Sequence[str] = BENCHMARKS) -> dict[str, float]:
    """The loop of a run in this process, with its last checkpoint; the scores of what it has learned, in percent."""
    engine, backward = build_engine(config, 0), make_backward(config)
    batches = ChunkReader(config).batches(range(config.train.steps * config.chunks_per_batch))
    masked = negatives = 0.0
    for step in range(config.train.steps):
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_000_003)
        losses = backward(engine, [next(batches) for _ in range(config.chunks_per_batch)])
        engine.step(learning_rate_of(config, step))
        masked += float(losses.contrastive.false_negatives) / config.train.steps
        negatives += float(losses.contrastive.effective_negatives) / config.train.steps
    scores = {"masked": masked, "effective_negatives": negatives}
    scores |= scores_of(engine, config, benchmarks)
    folder = Path(config.uri) / "files"
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(engine.model, config.model, folder)
    state = {"config": config.to_json(), "metrics": {}, "log_scale": float(engine.scalars[0])}
    checkpoint.save(config.uri, config.train.steps, adapter_files=folder, optimizer={}, state=state)
    storage.write_json(storage.join(config.uri, "config.json"), config.to_json())
    return scores


def scores_of(engine: Engine, config: RunConfig, benchmarks: Sequence[str] = BENCHMARKS) -> dict[str, float]:
    """What the engine's model reaches on held-out scenes, in percent."""
    scores: dict[str, float] = {}
    for name in benchmarks:
        found = Validation(replace(config, train=replace(config.train, validate_on=name)))(engine)
        scores |= {key.rpartition("/")[2]: 100 * value for key, value in found.items() if "/" in key}
    return scores


def learning_rate_of(config: RunConfig, step: int) -> float:
    from vladva.train.engine import learning_rate

    return learning_rate(step, config.train.steps, config.optim)


def all_scores(experiment: Experiment, variants: Sequence[str]) -> dict[str, list[dict[str, float]]]:
    """Variant -> scores of each seed: those that are there, and those that the time limit still lets begin."""
    options, began = experiment.options, time.monotonic()
    scores: dict[str, list[dict[str, float]]] = {variant: [] for variant in variants}
    for seed in range(options.seeds):
        for variant, runs in scores.items():
            done = (experiment.out / "scores" / f"{variant}-{seed}.json").exists()
            if done or time.monotonic() - began < options.limit_s:
                runs.append(experiment.run(variant, seed))
    return {variant: runs for variant, runs in scores.items() if runs}


def summary(scores: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, list[float | None]]]:
    """Variant -> score -> [mean, standard deviation, difference from the baseline, half its 95% interval].

    Of one seed there is neither deviation nor interval: None.
    """
    found: dict[str, dict[str, list[float | None]]] = {}
    for variant, runs in scores.items():
        found[variant] = {}
        for name in (*SHOWN, "masked", "effective_negatives"):
            values = np.array([run[name] for run in runs])
            base = np.array([run[name] for run in scores["baseline"][: len(runs)]])
            spread = half = None
            difference = round(float((values - base).mean()), 2)
            if len(values) > 1:
                spread = round(float(values.std(ddof=1)), 2)
                error = float((values - base).std(ddof=1)) / len(values) ** 0.5
                half = round(STUDENT_T[len(values) - 1] * error, 2)
            found[variant][name] = [round(float(values.mean()), 2), spread, difference, half]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".vladva/mistakes"), help="folder; what is done is there")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--train", type=int, default=4_000, help="training scenes")
    parser.add_argument("--test", type=int, default=500, help="held-out scenes")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen model")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no run after so many seconds")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    without_ray()
    experiment = Experiment(options.out.absolute(), options)
    scores = all_scores(experiment, VARIANTS)
    table = summary(scores)
    for variant, found in table.items():
        cells = []
        for name in SHOWN:
            mean, _, difference, half = found[name]
            cells.append(f"{name} {mean:5.1f} ({difference:+.1f} +- {'?' if half is None else half})")
        shown = "  ".join(cells)
        print(f"{variant:16} n={len(scores[variant])}  {shown}")
    settings = {"steps": options.steps, "dtype": options.dtype}
    print(json.dumps({**settings, "seeds": {v: len(runs) for v, runs in scores.items()}, **table}))


if __name__ == "__main__":
    main()
