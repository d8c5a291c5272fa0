"""The offset between two clocks that drift apart steadily: a straight line through the last two comparisons."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ClockOffset:
    """Seconds to add to one clock to read another: `offset_s` at `at_s` of the first clock, and `drift` seconds more
    with every second of it. The drift is 0 until there are two comparisons.

    Between two comparisons the line interpolates, after the last it extrapolates. A drift of oscillators is some 1e-5
    and steady for minutes. Where comparisons are off by e, so is the line between them, and by 3 e at most one
    interval later, when the next one is due.
    """

    at_s: float
    offset_s: float
    drift: float = 0.0

    def at(self, now_s: float) -> float:
        """The offset at `now_s` of the first clock."""
        return self.offset_s + self.drift * (now_s - self.at_s)

    def then(self, at_s: float, offset_s: float) -> ClockOffset:
        """The line through this comparison and a later one."""
        return ClockOffset(at_s, offset_s, (offset_s - self.offset_s) / (at_s - self.at_s))
