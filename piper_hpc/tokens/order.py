"""Orders that any rank computes for any place in them, without a table as long as the data and without its own past."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from hashlib import blake2b
from math import lcm

import numpy as np

ROUNDS = 6
LEAST_HALF_BITS = 3
MOST_PARTS = 10_000
"""Most samples after which a mix repeats; weights that ask for more are rounded to so many parts."""


class Permutation:
    """A permutation of range(size) that depends on `key` alone: a Feistel network over BLAKE2b, walked round its cycle
    until it is back in the range.

    Four rounds with random functions are a pseudorandom permutation (Luby and Rackoff, 1988); walking a cycle is Black
    and Rogaway's (2002). Unlike numpy's generators (NEP 19) it stays the same from version to version.
    """

    def __init__(self, size: int, key: tuple[int, ...]) -> None:
        self._size = size
        self._half_bits = max(LEAST_HALF_BITS, -(-(size - 1).bit_length() // 2))
        text = ",".join(map(str, key)).encode()
        self._keys = [blake2b(text, digest_size=32, salt=bytes([each])).digest() for each in range(ROUNDS)]

    def __getitem__(self, position: int) -> int:
        """What stands at `position`, in [0, size)."""
        if not 0 <= position < self._size:
            raise IndexError(position)
        found = self._once(position)
        while found >= self._size:
            found = self._once(found)
        return found

    def _once(self, value: int) -> int:
        bits = self._half_bits
        mask = (1 << bits) - 1
        left, right = value >> bits, value & mask
        for key in self._keys:
            drawn = blake2b(right.to_bytes(8, "little"), digest_size=8, key=key).digest()
            left, right = right, left ^ (int.from_bytes(drawn, "little") & mask)
        return left << bits | right


class Mix:
    """Which source gives each sample, and which of its own samples that is, so that shares are met at every moment.

    Of the first n samples a source has given fewer than one more or less than its weight's share of n, and after every
    `period` samples exactly its share. Tijdeman's solution of the chairman assignment problem (Discrete Mathematics
    32, 1980), which has this bound for any number of sources.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        """weights: above 0, of any sum; as decimals they are met exactly, up to `MOST_PARTS` parts in all."""
        self.parts = _parts(weights)
        self.period = sum(self.parts)
        self._source = np.array(_assigned(self.parts), np.int64)
        given = np.cumsum(self._source[:, None] == np.arange(len(weights)), axis=0)
        self._earlier = given[np.arange(self.period), self._source] - 1

    def __getitem__(self, sample: int) -> tuple[int, int]:
        """(source, number among the source's samples) of global sample `sample`."""
        turn, place = divmod(sample, self.period)
        source = int(self._source[place])
        return source, turn * self.parts[source] + int(self._earlier[place])


def _parts(weights: Sequence[float]) -> list[int]:
    """Whole numbers in the ratio of the weights, of a sum up to MOST_PARTS; rounded by largest remainder, 1 or more."""
    exact = [Fraction(str(weight)) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    period = lcm(*(share.denominator for share in shares))
    if period <= MOST_PARTS:
        return [int(share * period) for share in shares]
    parts = [max(1, int(share * MOST_PARTS)) for share in shares]
    largest_first = sorted(range(len(parts)), key=lambda each: parts[each] - shares[each] * MOST_PARTS)
    for each in largest_first[: max(0, MOST_PARTS - sum(parts))]:
        parts[each] += 1
    return parts


def _assigned(parts: Sequence[int]) -> list[int]:
    """The source of each of sum(parts) samples: of those that are due the one whose deadline is first."""
    sources, period = len(parts), sum(parts)
    if sources == 1:
        return [0] * period
    scale, given, order = 2 * sources - 2, [0] * sources, []
    for sample in range(1, period + 1):
        owed = [scale * (part * sample - period * had) for part, had in zip(parts, given, strict=True)]
        due = [each for each in range(sources) if owed[each] >= period]
        chosen = min(due, key=lambda each: ((scale - 1) * period - owed[each]) / parts[each])
        given[chosen] += 1
        order.append(chosen)
    return order
