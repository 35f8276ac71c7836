#!/usr/bin/env python
"""Average checkpoints into one model: `jobs/soup.py RUN_OR_CHECKPOINT ... --out URI`.

Of checkpoints of one run (train it with --train.keep-last N), or of runs that began with the same weights. With
--greedy each is taken only if the average scores no worse with it, on a benchmark. The result is a run as others are:
embed, evaluate, serve and export take it, and training begins with it by --init-from.
"""

from __future__ import annotations

import argparse
import sys

from vladva.core.cli import location, user_errors


def parse(arguments: list[str]) -> argparse.Namespace:
    """Command-line arguments."""
    parser = argparse.ArgumentParser(
        prog="jobs/soup.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", type=location, metavar="RUN_OR_CHECKPOINT", nargs="+", help="two, or more")
    parser.add_argument("--out", type=location, required=True, help="folder or s3://... of the run that is written")
    parser.add_argument("--greedy", action="store_true", help="only what makes the average better, or no worse")
    parser.add_argument("--benchmark", default="scenes_retrieval", help="with --greedy: what it is scored on")
    parser.add_argument("--data", type=location, default="", help="with --greedy: folder of the benchmark's files")
    parser.add_argument("--metric", default="t2i_r1", help="with --greedy: the score, higher for better")
    options = parser.parse_args(arguments)
    if len(options.models) < 2:
        raise ValueError("an average takes two checkpoints or more")
    if options.greedy and not options.data:
        raise ValueError("--greedy needs --data: the folder of the benchmark's files")
    return options


@user_errors
def main() -> None:
    options = parse(sys.argv[1:])

    from vladva.evaluate.soup import benchmark_score, greedy_soup, uniform_soup

    if options.greedy:
        score = benchmark_score(options.benchmark, options.data, options.metric)
        soup = greedy_soup(options.models, options.out, score)
        for uri, value in soup.scores.items():
            print(f"{value:8.4f}  {'taken' if uri in soup.members else 'left out':9} {uri}")
        print(f"{soup.score:8.4f}  {options.metric} of the average")
    else:
        soup = uniform_soup(options.models, options.out)
    print(f"{soup.uri}: the average of {len(soup.members)} checkpoints. Next: jobs/evaluate.py {soup.uri}")


if __name__ == "__main__":
    main()
