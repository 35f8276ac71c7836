"""Sampling: a few positions out of many."""

from __future__ import annotations

import numpy as np


def spread(total: int, count: int) -> list[int]:
    """`count` numbers below `total`, at even distances."""
    return sorted({int(place) for place in np.linspace(0, total - 1, min(count, total))})
