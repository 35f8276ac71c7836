"""Service rate: how fast a replica gets through its work, as it was measured, and how long what waits will take."""

import math

MEMORY_S = 10.0  # the past counts for about so long


class ServiceRate:
    """Units of work per second over the last seconds in which there was work."""

    def __init__(self) -> None:
        self.units = 0.0
        self.seconds = 0.0

    def record(self, units: float, seconds: float) -> None:
        """`units` were done in `seconds`, in which there was work all the time."""
        kept = math.exp(-seconds / MEMORY_S)
        self.units = self.units * kept + units
        self.seconds = self.seconds * kept + seconds

    def seconds_for(self, units: float) -> float:
        """How long `units` take; 0 while nothing is known."""
        return units * self.seconds / self.units if self.units else 0.0
