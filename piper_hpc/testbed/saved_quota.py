"""What a rank under a CPU quota saves while it waits, which no device does: `python -m piper_hpc.testbed.saved_quota`.

A quota is whole again at the start of every period, whatever was left of the last. A rank that waited for an exchange
therefore computes at the whole core's speed until it has used that up. Needs root; prints milliseconds.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from statistics import fmean

from rich.console import Console
from rich.table import Table

from piper_hpc.runtime import quota
from piper_hpc.testbed.options import Options

GROUP = "saved_quota"
WORK_S = (0.001, 0.002, 0.004, 0.016)
RESTS_S = (0.003, 0.02)
REPEATS = 12
BUSY_S, STEADY_S = 0.006, 0.1
"""CPU seconds that use the quota up before each rest, and those that the steady rate is taken from."""


@dataclass(frozen=True)
class Saved:
    """`work_s` CPU seconds after a rest of `rest_s` took `wall_s`, in place of `steady_s` without a rest."""

    period_us: int
    work_s: float
    rest_s: float
    steady_s: float
    wall_s: float

    @property
    def saved_s(self) -> float:
        """What the rest gave back."""
        return self.steady_s - self.wall_s


def measure(cpu_share: float, period_us: int) -> list[Saved]:
    """Every work after every rest, in a process of its own. Raises OSError where no quota can be set."""
    group = quota.create(f"{GROUP}-{os.getpid()}", cpu_share, period_us=period_us)
    try:
        with get_context("spawn").Pool(1) as pool:
            return pool.apply(_measure, (group, period_us))
    finally:
        group.remove()


def _measure(group: quota.Quota, period_us: int) -> list[Saved]:
    group.enter()
    quota.pin_to_core(0)
    _wall_s(BUSY_S)
    stretch = _wall_s(STEADY_S) / STEADY_S
    return [
        Saved(period_us, work_s, rest_s, work_s * stretch, fmean(_rested(work_s, rest_s) for _ in range(REPEATS)))
        for work_s in WORK_S
        for rest_s in RESTS_S
    ]


def _rested(work_s: float, rest_s: float) -> float:
    _wall_s(BUSY_S)
    time.sleep(rest_s)
    return _wall_s(work_s)


def _wall_s(work_s: float) -> float:
    """Seconds that `work_s` CPU seconds take."""
    begin, until_s = time.perf_counter(), time.process_time() + work_s
    while time.process_time() < until_s:
        pass
    return time.perf_counter() - begin


def main() -> int:
    """The command."""
    shares = Options()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("period, ms", "rest, ms", "work, CPU ms", "without rest, ms", "after it, ms", "saved, ms"):
        table.add_column(column, justify="right")
    for period_us in (shares.period_us, shares.period_us // 2):
        for each in measure(shares.cpu_share, period_us):
            seconds = (each.period_us * 1e-6, each.rest_s, each.work_s, each.steady_s, each.wall_s, each.saved_s)
            table.add_row(*(f"{1e3 * value:.1f}" for value in seconds))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
