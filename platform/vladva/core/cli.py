"""Command line: a user's mistake is one line and exit status 2, never a traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable


def user_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Decorate a job's `main`: a ValueError or a missing file is the user's, told in one line with exit status 2.

    VLADVA_TRACEBACK=1 shows where it was raised.
    """

    @functools.wraps(main)
    def run() -> None:
        os.environ.setdefault("LANCE_LOG", "error")  # read when Lance is imported, here and in the processes started
        try:
            main()
        except (ValueError, FileNotFoundError) as error:
            if os.environ.get("VLADVA_TRACEBACK"):
                raise
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; run the same command again to go on", file=sys.stderr)
            sys.exit(130)

    return run
