"""Batch times: how long a batch of items takes by its cost, as it was measured, and how long what waits will take.

A batch of many costs less than as many batches of one, so a rate would not do: measured where requests come one by one,
it says that forty at the same time take forty times as long. Kept are times of batches of each size, in powers of two.
"""

BATCHES_COUNT_S = 30.0  # what was measured longer ago does not count, in seconds of work
NEW_SHARE = 0.3  # of a new batch in the running mean of its size


class BatchTimes:
    """Seconds of a batch by its cost, over the last seconds in which there was work."""

    def __init__(self) -> None:
        self.worked_s = 0.0
        self.measured: dict[int, tuple[float, float]] = {}  # size -> seconds of a batch, and `worked_s` at the last one

    def record(self, cost: int, seconds: float) -> None:
        """A batch that cost so much took `seconds`, in which there was work all the time."""
        self.worked_s += seconds
        size = power_of_two(cost)
        before, at = self.measured.get(size, (seconds, self.worked_s))
        if self.worked_s - at > BATCHES_COUNT_S:
            before = seconds
        self.measured = {**self.measured, size: (before + (seconds - before) * NEW_SHARE, self.worked_s)}

    def seconds_for(self, cost: int, budget: int) -> float:
        """How long work of this cost takes in batches of up to `budget`; 0 while nothing is known."""
        full, rest = divmod(cost, budget)
        return full * self.of_batch(budget) + (self.of_batch(rest) if rest else 0.0)

    def of_batch(self, cost: int) -> float:
        """How long a batch of this cost takes: no longer than a larger one, nor than as much in smaller ones."""
        recent = {
            size: seconds for size, (seconds, at) in self.measured.items() if self.worked_s - at <= BATCHES_COUNT_S
        }
        return min((seconds * max(1.0, cost / size) for size, seconds in recent.items()), default=0.0)


def power_of_two(cost: int) -> int:
    """The power of two that a cost reaches."""
    return 1 << max(cost - 1, 0).bit_length()
