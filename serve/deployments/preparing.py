"""Preparing: the threads of a replica that tokenise and decode images, beside the model's own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any, TypeVar

T = TypeVar("T")

LARGE_PIXELS, LARGE_CHARACTERS = 16_000_000, 100_000  # of a piece of work that keeps a thread busy for long


class PreparingThreads:
    """Runs functions in a few threads, so that nobody waits for long because of somebody else's images.

    Work is done in the order in which it comes. Large work leaves a thread to the small, where there are two. A request
    of many parts asks for `turns` of its own, or the next one would wait for all of them.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.pool = ThreadPoolExecutor(threads, "vladva-prepare")
        self.large = asyncio.Semaphore(max(threads - 1, 1))

    async def run(self, function: Callable[..., T], *args: Any, large: bool = False) -> T:
        """The result of a function."""
        async with self.large if large else nullcontext():
            return await asyncio.get_running_loop().run_in_executor(self.pool, function, *args)

    def turns(self) -> asyncio.Semaphore:
        """To be held by each part of one request while it runs: so few of them are in the queue at a time."""
        return asyncio.Semaphore(self.threads)
