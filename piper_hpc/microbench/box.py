"""Time limit of a benchmark cell: a cell that would exceed it is skipped before it starts, with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field

CALLS = 8
"""A cell calls at least so often: the checked first call, pilots, a warm-up, and the fewest samples."""


@dataclass
class TimeBox:
    """Measured times of a series of growing cells, from which the next one's is extrapolated.

    Ranks that add the same times decide the same.

    cell_s: seconds that a cell may take; rate: work per second to expect before anything of the series was measured,
    0 where nobody knows: the first cell is then always measured.
    """

    cell_s: float
    rate: float = 0.0
    _points: list[tuple[float, float]] = field(default_factory=list, init=False)

    def add(self, work: float, seconds: float) -> None:
        """A cell was measured, now or in a run that is resumed; its fastest call tells best what more work costs."""
        self._points.append((work, seconds))

    def expected_s(self, work: float) -> float:
        """Seconds of one call: a straight line through the last two points, never below the last, never above its rate.

        The rate bounds what noise among short calls makes of the line.
        """
        if not self._points:
            return work / self.rate if self.rate else 0.0
        last_work, last_s = self._points[-1]
        if len(self._points) == 1:
            return last_s
        before_work, before_s = self._points[-2]
        slope = max(0.0, last_s - before_s) / (last_work - before_work) if last_work > before_work else 0.0
        return min(last_s + slope * (work - last_work), last_s * max(1.0, work / last_work))

    @property
    def last_rate(self) -> float:
        """Work per second of the last, largest cell that was measured; the expected rate where none was."""
        work, seconds = self._points[-1] if self._points else (self.rate, 1.0)
        return work / seconds

    def fits(self, work: float) -> bool:
        """Whether a cell of `work` can be measured within cell_s: CALLS times the expected seconds of one call."""
        return CALLS * self.expected_s(work) <= self.cell_s

    def reason(self, work: float) -> str:
        """Why a cell is left out."""
        return (
            f"one call would take {self.expected_s(work):.3g} s, {CALLS} are needed and task.cell_s={self.cell_s:g} "
            "is all the time it has"
        )
