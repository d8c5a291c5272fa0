"""A predicted time that remembers which measured curves it rests on, and how far each may be off."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from piper_hpc.resource_model.prediction import ratio_interval


@dataclass(frozen=True)
class Cost:
    """Seconds, with the half width of their 90 % interval kept apart by curve.

    All uses of one curve are wrong in the same direction, so their half widths add; different curves were measured
    independently, so they combine as the root of the sum of squares.
    """

    seconds: float = 0.0
    half_widths: Mapping[str, float] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        half_widths = dict(self.half_widths)
        for curve, half_width in other.half_widths.items():
            half_widths[curve] = half_widths.get(curve, 0.0) + half_width
        return Cost(self.seconds + other.seconds, half_widths)

    def __mul__(self, factor: float) -> Cost:
        return Cost(self.seconds * factor, {curve: width * factor for curve, width in self.half_widths.items()})

    @property
    def half_width(self) -> float:
        """Half of the 90 % interval, in seconds."""
        return math.sqrt(sum(width * width for width in self.half_widths.values()))

    @property
    def interval(self) -> tuple[float, float]:
        """The 90 % interval in seconds, see `ratio_interval`."""
        return ratio_interval(self.seconds, self.half_width)

    @property
    def curves(self) -> list[str]:
        """Names of the curves that these seconds rest on."""
        return sorted(self.half_widths)


def total(costs: Iterable[Cost]) -> Cost:
    """The sum of costs."""
    return sum(costs, Cost())
