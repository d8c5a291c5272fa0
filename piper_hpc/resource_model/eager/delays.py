"""Passes of a stage that do not take equally long: a pipeline ends later for it than one of equal passes.

Whoever waits for a late stage does not get the time back from an early one. How unequal passes are follows from how
long ranks wait for the latest of them, which calibrations measure (communication.arrival_skew): where what each
computes until they meet takes a normally distributed time, the latest of n is so many deviations behind their mean, and
scatters by so many itself (order statistics). Nothing is fitted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from random import Random
from statistics import NormalDist, fmean, pstdev

from piper_hpc.resource_model.eager import communication
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.groups import TIERS, Group
from piper_hpc.spec import Tier

DRAWS = 4
"""Steps that a prediction takes the mean of."""

PAIR = Group(tuple(int(tier == Tier.NODE.value) for tier in TIERS))


@lru_cache(maxsize=256)
def latest_of(ranks: int) -> tuple[float, float]:
    """Mean and standard deviation of the largest of `ranks` standard normal numbers."""
    normal, points = NormalDist(), 1000
    largest = [normal.inv_cdf(((index + 0.5) / points) ** (1 / ranks)) for index in range(points)]
    return fmean(largest), pstdev(largest)


def variance_of_meetings(waits: Iterable[Cost], group: Group) -> float:
    """Of when ranks of `group`, at least two, have met, in s^2, where they waited so long for the latest on average."""
    behind, scatter = latest_of(group.size)
    return sum((wait.seconds * scatter / behind) ** 2 for wait in waits)


def variance_alone(curves: Curves, compute: Cost) -> float:
    """Of `compute` on a rank that meets nobody, in s^2: by what two ranks would wait for each other after it."""
    return (communication.arrival_skew(curves, PAIR, compute).seconds / latest_of(2)[0]) ** 2


def unequal(mean_s: float, variance_s2: float, count: int, generator: Random) -> list[float]:
    """`count` times with that mean and about that variance, [count], in an order of the generator's.

    Quantiles of a log-normal distribution, as delays are to one side: drawing them at random would move the mean.
    """
    if mean_s <= 0 or variance_s2 <= 0:
        return [mean_s] * count
    normal = NormalDist(0.0, math.sqrt(math.log1p(variance_s2 / mean_s**2)))
    drawn = [math.exp(normal.inv_cdf((index + 0.5) / count)) for index in range(count)]
    generator.shuffle(drawn)
    scale = mean_s * count / sum(drawn)
    return [seconds * scale for seconds in drawn]
