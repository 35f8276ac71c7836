"""Progress: one line that says how far a job is, how fast it goes and how long it will take."""

from __future__ import annotations

import time
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

LINE_EVERY_S = 15.0  # between plain lines


class Progress:
    """Counts items; shows a live line on a terminal, and a plain line every few seconds elsewhere.

    total: items there are in all, where that is known; without it there is no time left to tell.
    """

    def __init__(self, label: str, total: int | None = None, *, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.label, self.total, self.done, self.figures = label, total, 0, ""
        self.console = console or Console(stderr=True)
        self.began = self.printed = time.monotonic()
        self.first: tuple[int, float] | None = None  # items done and time of the first advance: speed counts from there
        self.live = Live(get_renderable=self.line, console=self.console, refresh_per_second=2)

    def __enter__(self) -> Progress:
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if self.console.is_terminal:
            self.live.stop()
        elif error is None:
            self._print()

    def advance(self, items: int, figures: str = "") -> None:
        """`items` more are done; `figures` is what else there is to show."""
        self.done += items
        self.figures = figures
        now = time.monotonic()
        self.first = self.first or (self.done, now)
        if not self.console.is_terminal and now - self.printed >= LINE_EVERY_S:
            self.printed = now
            self._print()

    def line(self) -> str:
        """embedding  1,280/20,000  61.3 items/s  0:00:21 elapsed  0:05:06 left"""
        now = time.monotonic()
        count = f"{self.done:,}" if self.total is None else f"{self.done:,}/{self.total:,}"
        parts = [self.label, count]
        if self.first and self.done > self.first[0]:
            speed = (self.done - self.first[0]) / (now - self.first[1])
            parts.append(f"{speed:,.1f} items/s")
            if self.total is not None:
                parts.append(f"{timedelta(seconds=round(max(0, self.total - self.done) / speed))} left")
        return "  ".join([*parts, f"{timedelta(seconds=round(now - self.began))} elapsed", self.figures]).rstrip()

    def _print(self) -> None:
        self.console.print(self.line(), highlight=False, soft_wrap=True)
