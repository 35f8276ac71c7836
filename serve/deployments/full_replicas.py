"""Full replicas: whether anybody at all would be refused now, as far as refusals have told.

Under overload most of what a refused request costs is its way to the replica that refuses it. Where every replica has
said that it takes on nothing for a moment, Serve's proxy can refuse by itself until then (proxy_errors.py).
"""

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from serve.protocol.errors import ApiError, Failure

COUNTED_S = 5.0  # how long a number of replicas is believed: autoscaling brings others
LONGEST_S = 1.0  # for which anybody is refused unasked: what is expected of a queue may be wrong


class FullReplicas:
    """The replicas of a deployment that take on nothing of one kind of work, until when.

    running: how many replicas there are; it may take a while, and is called in a thread.
    """

    def __init__(self, running: Callable[[], int]) -> None:
        self.running = running
        self.until: dict[str, float] = {}
        self.count: int | None = None  # of replicas; None: not known
        self.counted = -COUNTED_S
        self.counting: asyncio.Task[None] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear what is refused while the block runs. Raises ApiError as the client is to be told."""
        try:
            yield
        except ApiError as error:
            raise ApiError.of(self.told(error.failure)) from None

    def told(self, refusal: Failure) -> Failure:
        """A refusal as it goes to the client: with `full_s` only where every replica is full for so long."""
        if refusal.full_s is None:
            return refusal
        now = time.monotonic()
        if self.counting is None and now > self.counted + COUNTED_S:
            self.counting = asyncio.create_task(self.recount())
        full = {name: until for name, until in self.until.items() if until > now}
        self.until = {**full, refusal.full_by: now + min(refusal.full_s, LONGEST_S)}
        if self.count is None or len(self.until) < self.count:
            return replace(refusal, full_s=None)
        return replace(refusal, full_s=min(self.until.values()) - now)

    async def recount(self) -> None:
        """Ask how many replicas there are; where nobody can say, none are refused for others."""
        try:
            self.count = await asyncio.to_thread(self.running)
        except Exception:  # Serve's controller is being replaced
            self.count = None
        finally:
            self.counted = time.monotonic()
            self.counting = None
