#!/usr/bin/env python
"""Fine-tune an LVLM by the VladVA method: `jobs/train.py RECIPE [--train.steps 50 ...]`.

The same command goes on with a run that was interrupted, and does nothing for one that is complete.
"""

from __future__ import annotations

import contextlib
import io
import sys

from vladva.config import RunConfig, user_errors
from vladva.recipes import RECIPES


def parse(arguments: list[str]) -> RunConfig:
    """The recipe that the first argument names, with the overrides that follow."""
    import tyro

    if arguments and not arguments[0].startswith("-") and arguments[0] not in RECIPES:
        raise ValueError(f"unknown recipe {arguments[0]!r}; there are {', '.join(RECIPES)}")
    recipes = {name: (recipe.__doc__.splitlines()[0], recipe()) for name, recipe in RECIPES.items()}
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            return tyro.extras.overridable_config_cli(recipes, prog="jobs/train.py", args=arguments)
    except SystemExit as refusal:
        if not refusal.code:  # --help
            raise
        # tyro draws its message in a box; ours are one line.
        lines = [line.strip("│╭╮╰╯─ \n") for line in told.getvalue().splitlines()]
        raise ValueError(" ".join(line for line in lines if line)) from None


@user_errors
def main() -> None:
    config = parse(sys.argv[1:])

    from vladva.train import train

    last = train(config)
    print(
        f"{config.uri}: {config.train.steps} steps, loss {last['loss']:.3f}, in-batch accuracy "
        f"{last['in_batch_accuracy']:.3f}. Next: jobs/evaluate.py {config.uri}"
    )


if __name__ == "__main__":
    main()
