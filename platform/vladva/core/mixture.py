"""Mixture: several data sets as URI=WEIGHT -> their folders, and the proportions of their samples in whole numbers."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import gcd, lcm

MAX_PERIOD = 10_000  # runs of samples after which the pattern of a mix repeats


def check_mix(mix: Sequence[str]) -> None:
    """Raise ValueError for what is not URI=WEIGHT, a folder given twice, or weights without a small common measure."""
    uris, shares = mix_uris(mix), mix_shares(mix)
    if len(set(uris)) < len(uris):
        raise ValueError(f"data.mix names a folder twice ({', '.join(uris)}); give it once, with all of its weight")
    if sum(shares) > MAX_PERIOD:
        raise ValueError(
            f"data.mix: the weights are {', '.join(map(str, shares))} in whole numbers, {sum(shares):,} together; "
            f"round them, so that it is {MAX_PERIOD:,} at most"
        )


def mix_uris(mix: Sequence[str]) -> tuple[str, ...]:
    """The folders."""
    return tuple(part.rpartition("=")[0] for part in mix)


def mix_shares(mix: Sequence[str]) -> tuple[int, ...]:
    """The weights in the smallest whole numbers, exactly: 0.7 and 0.3 are 7 and 3. Raises ValueError."""
    weights = [_weight(part) for part in mix]
    whole = [int(weight * lcm(*(other.denominator for other in weights))) for weight in weights]
    return tuple(number // gcd(*whole) for number in whole)


def _weight(part: str) -> Fraction:
    uri, _, weight = part.rpartition("=")
    try:
        value = Fraction(weight)
    except (ValueError, ZeroDivisionError):
        value = Fraction(0)
    if not uri or value <= 0:
        raise ValueError(f"data.mix: {part!r} is not URI=WEIGHT with a positive weight, as s3://bucket/coco=0.7 is")
    return value
