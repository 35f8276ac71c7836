#!/usr/bin/env python
"""Fine-tune an LVLM by the VladVA method: `jobs/train.py RECIPE [--train.steps 50 ...] [--dry-run]`.

The same command goes on with a run that was interrupted, and does nothing for one that is complete. With --dry-run it
says how much memory each worker needs, and by which part, and stops; what does not fit is refused with exit status 2.
"""

from __future__ import annotations

import contextlib
import io
import sys

from vladva.config import RunConfig
from vladva.core.cli import user_errors
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


def dry_run(config: RunConfig) -> None:
    """Print the memory plan. Raises ValueError for a run that does not fit."""
    from rich import print as show

    from vladva.train.memory_plan import check_memory, memory_table, plan_memory

    show(memory_table(config, plan_memory(config)))
    check_memory(config)


@user_errors
def main() -> None:
    arguments = [argument for argument in sys.argv[1:] if argument != "--dry-run"]
    config = parse(arguments)
    if len(arguments) < len(sys.argv) - 1:
        dry_run(config)
        return

    from vladva.train.loop import train

    last = train(config)
    print(
        f"{config.uri}: {config.train.steps} steps, loss {last['loss']:.3f}, in-batch accuracy "
        f"{last['in_batch_accuracy']:.3f}. Next: jobs/evaluate.py {config.uri}"
    )


if __name__ == "__main__":
    main()
