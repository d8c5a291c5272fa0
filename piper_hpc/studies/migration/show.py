"""Tables of the migration study, and what its bars say."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from rich.table import Table

from piper_hpc.report.units import percent, seconds, size
from piper_hpc.studies.migration.paired import MOVING, STAYING
from piper_hpc.studies.migration.replay import Replayed

NO_HARM = 0.97
"""Least speed with migration over that without, whatever the load does."""
SHARE_OF_TIME = 0.01
"""Most of the time that planning and moving may take."""
EVEN = 1.10
"""Most of the busiest rank's load after a migration, over the least that is possible."""


@dataclass(frozen=True)
class Measured:
    """Training with and without migration under one load.

    speed: seconds of all steps without, over those with it, planning and moves included, first steps left out; halves:
    the same over the first and the second half of the steps. Loads are the busiest rank's over the mean, of the worst
    layer, mean over steps: without, with after the first move, and the least possible by the balancer's bound. share:
    of the steps' time that planning and moving took; predicted_s, gained_s: what the first migration saves a step, as
    predicted, and the median as measured after it.
    """

    load: str
    speed: float
    halves: tuple[float, float]
    before: float
    after: float
    bound: float | None
    migrations: int
    bytes: int
    exposed_s: float
    share: float
    predicted_s: float | None
    gained_s: float | None
    losses_equal: bool

    @property
    def missed(self) -> list[str]:
        """The bars that are missed."""
        found = []
        if self.speed < NO_HARM:
            found.append(f"speed {self.speed:.3f} < {NO_HARM}")
        if self.migrations and self.share > SHARE_OF_TIME:
            found.append(f"took {100 * self.share:.2f} % > {100 * SHARE_OF_TIME:g} %")
        if self.bound is not None and self.after > EVEN * self.bound:
            found.append(f"busiest rank {self.after:.2f} > {EVEN} x {self.bound:.2f}")
        if not self.losses_equal:
            found.append("losses differ")
        return found


def measured(load: str, rows: Sequence[dict[str, Any]]) -> Measured:
    """From the rows of one paired run."""
    steady = [row for row in rows if row["operator"] == "migration" and not row["warmup"]]
    staying, moving = ([row for row in steady if row["variant"] == name] for name in (STAYING, MOVING))
    told = [row["migration"] for row in moving]
    moves = [row for row in moving if row["migration"].get("migrated")]
    first = moves[0] if moves else None
    exposed_s = sum(each["planning_s"] + each["seconds"] for each in told)
    half = len(moving) // 2
    later = [
        (old, new)
        for old, new in zip(staying, moving, strict=True)
        if first is not None and new["step"] > first["step"]
    ]
    return Measured(
        load,
        speed=_speed(staying, moving),
        halves=(_speed(staying[:half], moving[:half]), _speed(staying[half:], moving[half:])),
        before=_load(staying),
        after=_load([new for _, new in later] or moving),
        bound=first["migration"]["bound"] if first is not None else None,
        migrations=len(moves),
        bytes=sum(each["bytes"] for each in told),
        exposed_s=exposed_s,
        share=exposed_s / sum(row["step_time_s"] for row in moving),
        predicted_s=first["migration"]["gain_s"] if first is not None else None,
        gained_s=median(old["step_time_s"] - new["step_time_s"] for old, new in later) if later else None,
        losses_equal=[row["loss"] for row in staying] == [row["loss"] for row in moving],
    )


def _speed(staying: Sequence[dict[str, Any]], moving: Sequence[dict[str, Any]]) -> float:
    """Seconds without migration over those with it and all that it takes."""
    spent_s = sum(row["step_time_s"] + row["migration"]["planning_s"] + row["migration"]["seconds"] for row in moving)
    return float(sum(row["step_time_s"] for row in staying) / spent_s)


def _load(rows: Sequence[dict[str, Any]]) -> float:
    """The busiest rank's load over the mean, of the worst layer, the mean over steps."""
    return sum(max(row["rank_load"]) for row in rows) / len(rows)


def replay_table(found: Iterable[Replayed], title: str) -> Table:
    """A line for each load and planner."""
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    columns = ("planner", "before", "after", "least", "hottest expert", "gained", "migrations", "experts", "sent")
    table.add_column("load")
    for column in columns:
        table.add_column(column, justify="left" if column == "planner" else "right")
    for each in found:
        share = each.share
        table.add_row(
            each.load,
            each.planner,
            *(f"{value:.2f}" for value in (each.before, each.after, each.bound, each.hottest)),
            "-" if share is None else f"{100 * share:.0f} %",
            str(each.migrations),
            str(each.experts),
            size(each.bytes),
        )
    return table


def measured_table(found: Iterable[Measured]) -> Table:
    """A line for each load."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    columns = ("speed", "halves", "before", "after", "least", "moves", "sent", "took", "of time", "said", "saved")
    table.add_column("load")
    for column in columns:
        table.add_column(column, justify="right")
    table.add_column("missed")
    for each in found:
        table.add_row(
            each.load,
            f"{each.speed:.3f}",
            " ".join(f"{half:.3f}" for half in each.halves),
            f"{each.before:.2f}",
            f"{each.after:.2f}",
            "-" if each.bound is None else f"{each.bound:.2f}",
            str(each.migrations),
            size(each.bytes),
            seconds(each.exposed_s),
            percent(100 * each.share),
            "-" if each.predicted_s is None else seconds(each.predicted_s),
            "-" if each.gained_s is None else seconds(each.gained_s),
            "; ".join(each.missed) or "none",
        )
    return table
