#!/usr/bin/env python
"""Train the tiny LVLM that ships with vladva, from nothing, as a generator of captions and answers.

    torchrun --nproc-per-node 2 jobs/pretrain_tiny.py --out .vladva/tiny     # one process a core; resumes when re-run
    python jobs/pretrain_tiny.py --out .vladva/tiny                          # one process

The result, `.vladva/tiny/weights`, is what the package ships as platform/vladva/weights.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path(".vladva/tiny"), help="folder of the checkpoint and the weights"
    )
    parser.add_argument(
        "--tower-steps", type=int, default=1500, help="steps of the vision tower alone, 128 pictures each"
    )
    parser.add_argument("--steps", type=int, default=1600, help="optimizer steps of 48 dialogues")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    import torch
    from torch import distributed

    from vladva.tiny import pretrain

    if "RANK" in os.environ:  # started by torchrun
        distributed.init_process_group("gloo")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // distributed.get_world_size()))
    pretrain(args.out, tower_steps=args.tower_steps, steps=args.steps, seed=args.seed, say=partial(print, flush=True))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
