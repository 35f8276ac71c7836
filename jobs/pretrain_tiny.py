#!/usr/bin/env python
"""Train the tiny LVLM that ships with vladva, from nothing, as a generator of captions and answers.

    torchrun --nproc-per-node 2 jobs/pretrain_tiny.py --out .vladva/tiny     # one process a core; resumes when re-run
    python jobs/pretrain_tiny.py --out .vladva/tiny                          # one process
    python jobs/pretrain_tiny.py --check tiny                                # how much it gets right on held-out images

The result, `.vladva/tiny/weights`, is what the package ships as platform/vladva/models/tiny/weights.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from itertools import pairwise

from vladva.core.cli import local_folder
from vladva.core.quiet import be_quiet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=local_folder, default=".vladva/tiny", help="folder of the checkpoint and the weights"
    )
    parser.add_argument(
        "--tower-steps", type=int, default=4000, help="steps of the vision tower alone, 128 images each"
    )
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps of 60 dialogues")
    parser.add_argument(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of matrix products; float32 is the faster one on a CPU without bfloat16 instructions",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", metavar="MODEL", help="train nothing; score this model's captions and answers")
    parser.add_argument("--scenes", type=int, default=100, help="held-out scenes that --check shows it")
    args = parser.parse_args()
    be_quiet()
    if args.check:
        print(f"{caption_accuracy(args.check, args.scenes, seed=args.seed):.0%} of long captions name every object")
        share = answer_accuracy(args.check, args.scenes, seed=args.seed)
        print(f"{share:.0%} of questions where one object is, seen from another, answered rightly (guessing: 25%)")
        return

    import torch
    from torch import distributed

    from vladva.models.tiny.pretrain import pretrain

    if "RANK" in os.environ:  # started by torchrun
        distributed.init_process_group("gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.get_world_size()))
    pretrain(
        args.out,
        tower_steps=args.tower_steps,
        steps=args.steps,
        seed=args.seed,
        precision=args.precision,
        say=partial(print, flush=True),
    )
    if distributed.is_initialized():
        distributed.destroy_process_group()


def objects_named(caption: str) -> set[tuple[str, str]]:
    """The (colour, shape) combinations that a caption names."""
    from vladva.data.scenes.scene import COLOURS, SHAPES

    words = caption.replace(",", " ").replace(".", " ").split()
    return {(first, second) for first, second in pairwise(words) if first in COLOURS and second in SHAPES}


def caption_accuracy(model: str, count: int, *, seed: int = 0) -> float:
    """Share of held-out scenes whose generated long caption names every object, and no other, with colour and shape."""
    from vladva.data.scenes.corpus import held_out_scenes
    from vladva.data.scenes.scene import render
    from vladva.models.embedder import load_lvlm
    from vladva.models.tiny.dialogues import DETAILED

    embedder = load_lvlm(model)
    content = [{"type": "image"}, {"type": "text", "text": DETAILED[0]}]
    right = 0
    for scene, _, _ in held_out_scenes(count, seed):
        pieces = embedder.generate([{"role": "user", "content": content}], [render(scene)], max_tokens=96)
        right += objects_named("".join(pieces)) == {(o.colour, o.shape) for o in scene.objects}
    return right / count


def answer_accuracy(model: str, count: int, *, seed: int = 0) -> float:
    """Share of questions where one object is, seen from another, answered rightly: two for each held-out scene."""
    from vladva.data.scenes.captions import RELATION_WORDS
    from vladva.data.scenes.corpus import held_out_scenes
    from vladva.data.scenes.scene import relation, render
    from vladva.models.embedder import load_lvlm

    embedder = load_lvlm(model)
    right = 0
    for scene, _, random in held_out_scenes(count, seed):
        image = render(scene)
        first, second, *_ = random.sample(scene.objects, len(scene.objects))
        for a, b in ((first, second), (second, first)):
            asked = f"Where is the {a.colour} {a.shape}, seen from the {b.colour} {b.shape}?"
            content = [{"type": "image"}, {"type": "text", "text": asked}]
            answer = "".join(embedder.generate([{"role": "user", "content": content}], [image], max_tokens=8))
            right += answer.strip() == RELATION_WORDS[relation(a, b)][0]
    return right / (2 * count)


if __name__ == "__main__":
    main()
