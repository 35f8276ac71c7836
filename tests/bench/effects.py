#!/usr/bin/env python
"""The paper's effects on the tiny model: what each part of the method adds, and E5-V's way beside it; several seeds.

    python tests/bench/effects.py                    # three seeds, 150 steps
    python tests/bench/effects.py --limit-s 500      # some of the runs; the same again goes on
    python tests/bench/effects.py --dtype bfloat16   # in about half the time on a CPU with bfloat16 instructions
    python tests/bench/effects.py --variants baseline,lora --seeds 1

    zero_shot       the model as it ships
    baseline        the recipe `tiny`: soft prompts, LoRA, contrastive and next-token loss
    soft_prompts    soft prompts alone (no LoRA), contrastive loss alone
    lora            LoRA alone (the hand-written prompts), contrastive loss alone
    contrastive     both, contrastive loss alone
    layer_4         the embedding is the hidden state after layer 4 of 6
    batch_16 (_256, _1024)    such batches in place of 64, of chunks of 32 at most, for as many pairs
    e5_v            the recipe `tiny_e5_v`: sentences only, then used on images

All see as many pairs with the same learning rates and, but for e5_v, the same data. Held-out scenes; percent;
text-only runs read triplets drawn from the same training scenes. The last line is one JSON object as that of
mistakes.py: for each variant and score the mean, the standard deviation over seeds and the difference from the
baseline with the same seed, with a 95% interval.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.mistakes import SHOWN, Experiment, all_scores, scores_of, summary, train_here, without_ray
from vladva.config import RunConfig
from vladva.data.scenes.corpus import write_triplets
from vladva.evaluate.ablation import variants
from vladva.recipes import tiny_e5_v
from vladva.train.setup import build_engine

VARIANTS = (
    "zero_shot",
    "baseline",
    "soft_prompts",
    "lora",
    "contrastive",
    "layer_4",
    "batch_16",
    "batch_256",
    "batch_1024",
    "e5_v",
)


class Effects(Experiment):
    """The same folder of data and scores, other variants."""

    def config(self, variant: str, seed: int) -> RunConfig:
        """The run of a variant."""
        config = replace(super().config("baseline", seed), name=f"{variant}-{seed}")
        model, parts, e5_v = config.model, variants(config), tiny_e5_v()
        changed: dict[str, Callable[[], RunConfig]] = {
            "soft_prompts": lambda: parts["soft prompts only"],
            "lora": lambda: parts["LoRA only"],
            "contrastive": lambda: parts["both"],
            "layer_4": lambda: replace(config, model=replace(model, layer=4)),
            "batch_16": lambda: self.in_batches(config, 16),
            "batch_256": lambda: self.in_batches(config, 256),
            "batch_1024": lambda: self.in_batches(config, 1024),
            "e5_v": lambda: replace(
                config,
                model=replace(e5_v.model, dtype=model.dtype),
                loss=e5_v.loss,
                optim=e5_v.optim,
                data=replace(e5_v.data, uri=self.triplets(), validation_uri=config.data.validation_uri),
            ),
        }
        return changed[variant]() if variant in changed else config

    def in_batches(self, config: RunConfig, size: int) -> RunConfig:
        """The run with global batches of so many pairs, and as many pairs in all."""
        train = config.train
        steps = max(1, train.steps * train.global_batch // size)
        chunk = min(size, train.chunk_size)
        train = replace(train, global_batch=size, chunk_size=chunk, steps=steps, checkpoint_every=steps)
        return replace(config, train=train)

    def triplets(self) -> str:
        """Shards of a sentence, one that follows from it and one that does not."""
        uri = self.out / "triplets"
        if not uri.exists():
            write_triplets(str(uri), count=self.options.train, samples_per_shard=500)
        self.scan(str(uri))
        return str(uri)

    def train(self, variant: str, seed: int) -> dict[str, float]:
        """The scores of a variant, trained now."""
        config = self.config(variant, seed)
        if variant != "zero_shot":
            return train_here(config)
        # Nothing is learned yet: the soft prompts are the hand-written ones, and LoRA adds zero.
        engine = build_engine(config, 0)
        return {"masked": 0.0, "effective_negatives": 0.0, **scores_of(engine, config)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".vladva/effects"), help="folder; what is done is there")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--train", type=int, default=4_000, help="training scenes")
    parser.add_argument("--test", type=int, default=500, help="held-out scenes")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 6))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the frozen model")
    parser.add_argument("--limit-s", type=float, default=float("inf"), help="begin no run after so many seconds")
    options = parser.parse_args()
    asked = options.variants.split(",")
    if unknown := set(asked) - set(VARIANTS):
        parser.error(f"--variants: no {sorted(unknown)[0]!r}; there are {', '.join(VARIANTS)}")
    options.out.mkdir(parents=True, exist_ok=True)
    without_ray()
    experiment = Effects(options.out.absolute(), options)
    scores = all_scores(experiment, list(dict.fromkeys(["baseline", *asked])))
    table = summary(scores)
    for variant, found in table.items():
        shown = "  ".join(f"{name} {found[name][0]:5.1f} +- {found[name][1]}" for name in SHOWN)
        print(f"{variant:16} n={len(scores[variant])}  {shown}")
    settings = {"steps": options.steps, "dtype": options.dtype}
    print(json.dumps({**settings, "seeds": {v: len(runs) for v, runs in scores.items()}, **table}))


if __name__ == "__main__":
    main()
