#!/usr/bin/env python
"""Fine-tune an LVLM by the VladVA method: `jobs/train.py RECIPE [--train.steps 50 ...] [--dry-run]`.

The same command goes on with a run that was interrupted, and does nothing for one that is complete. With --extend and a
larger --train.steps it goes on with a complete one, on the longer schedule. With --init-from RUN a new run (another
--name) begins with the weights of an old one and may have another recipe. With --dry-run it says how much memory each
worker needs, and by which part, and stops; what does not fit is refused with exit status 2.
"""

from __future__ import annotations

import argparse
import sys

from vladva.config import RunConfig
from vladva.core.cli import location, user_errors
from vladva.recipes import parse_recipe


def parse(arguments: list[str]) -> tuple[argparse.Namespace, RunConfig]:
    """Options of the job, and the recipe with its overrides."""
    parser = argparse.ArgumentParser(prog="jobs/train.py", add_help=False, usage="%(prog)s RECIPE [options]")
    parser.add_argument("--extend", action="store_true", help="go on with a run to more --train.steps than it had")
    parser.add_argument("--dry-run", action="store_true", help="say how much memory each worker needs, and stop")
    parser.add_argument(
        "--price",
        type=location,
        metavar="FILE",
        default="",
        help="with --dry-run: also GPU-hours and cost, by a list of prices (cluster/prices.yaml)",
    )
    parser.add_argument("--price-items", metavar="N", type=int, default=1_000_000, help="to embed, for --price")
    options, rest = parser.parse_known_args(arguments)
    if options.price and not options.dry_run:
        raise ValueError("--price goes with --dry-run")
    return options, parse_recipe(rest, prog="jobs/train.py", options=parser)


def dry_run(config: RunConfig, prices: str, items: int) -> None:
    """Print the memory plan, and what the run costs. Raises ValueError for a run that does not fit."""
    from rich import print as show

    from vladva.train.memory_plan import check_memory, memory_table, plan_memory

    show(memory_table(config, plan_memory(config)))
    if prices:
        import yaml

        from vladva.core import storage
        from vladva.train.cost import price_table, read_prices

        show(price_table(config, read_prices(yaml.safe_load(storage.read_bytes(prices))), items))
    check_memory(config)


@user_errors
def main() -> None:
    options, config = parse(sys.argv[1:])
    if options.dry_run:
        dry_run(config, options.price, options.price_items)
        return

    from vladva.mine.teacher import teach
    from vladva.train.launch import train

    last = train(config, extend=options.extend, tell=print, teach=teach)
    accuracy = last["in_batch_accuracy"]
    told = f"in-batch accuracy {accuracy:.3f}" if accuracy is not None else "no pair with negatives in the last batch"
    if last.get("quarantined"):
        print(f"{last['quarantined']:,.0f} samples could not be used, others stood in: {config.uri}/quarantine.jsonl")
    print(
        f"{config.uri}: {config.train.steps} steps, loss {last['loss']:.3f}, {told}. "
        f"Next: jobs/evaluate.py {config.uri}"
    )


if __name__ == "__main__":
    main()
