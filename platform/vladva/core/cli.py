"""Command line: a user's mistake is one line and exit status 2, never a traceback."""

from __future__ import annotations

import argparse
import functools
import os
import select
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from vladva.core.errors import refusal
from vladva.core.quiet import be_quiet, is_verbose


def user_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a job's `main`: what the user can mend is told in one line with exit status 2.

    That is a ValueError, a missing file, and a storage that refuses (a full disk, rights), raised here or in a task of
    Ray's. VLADVA_TRACEBACK=1 shows where it was raised, and all that the libraries say. Where nobody reads the output
    any more it ends without a word, as other commands do.
    """

    @functools.wraps(main)
    def run() -> None:
        be_quiet()
        try:
            main()
            sys.stdout.flush()
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:
            if not _nobody_reads():
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
            sys.exit(128 + signal.SIGPIPE)
        except Exception as error:
            line = _line_of(error)
            if line is None or is_verbose():
                raise
            print(f"error: {line}", file=sys.stderr)
            sys.exit(2)

    return run


def parse_actors(argument: str) -> int | tuple[int, int]:
    """`2`, or `1,8` for a pool that grows and shrinks."""
    least, comma, most = argument.partition(",")
    try:
        return (int(least), int(most)) if comma else int(least)
    except ValueError:
        raise ValueError(f"--actors is {argument!r}; give a number, or the least and the most: 1,8") from None


def location(argument: str) -> str:
    """`type` of an argument that is a path or s3://...: absolute from here on, as every worker is in another folder."""
    from vladva.core import storage

    try:
        return storage.absolute(argument) if argument else ""
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def local_folder(argument: str) -> Path:
    """`type` of an argument that is a folder of this machine."""
    return Path(argument).absolute()


def _nobody_reads() -> bool:
    """Whether the reader of the output, `head` say, has seen enough: the pipe that broke is this one."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in output.poll(0))


def _line_of(error: Exception) -> str | None:
    """What to tell the user of an error that is theirs; None for ours."""
    cause: BaseException = error
    if "ray" in sys.modules:
        from vladva.core.ray_tasks import cause_of

        cause = cause_of(error)
    return refusal(cause) or (str(cause) if isinstance(cause, (ValueError, FileNotFoundError)) else None)
