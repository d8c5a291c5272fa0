"""Where experts were and what moving them did, from a run's rows: a sentence, a table, and what figures draw."""

from __future__ import annotations

from collections.abc import Sequence

from piper_hpc.report.load import Row, steady, typical
from piper_hpc.report.units import percent, seconds, size

COLUMNS = ("after step", "busiest rank", "planned", "least possible", "experts moved", "sent", "took", "gain a step")


def looks(rows: Sequence[Row]) -> list[Row]:
    """The rows after which experts were looked at and something was decided."""
    return [row for row in rows if "migration" in row]


def moves(rows: Sequence[Row]) -> list[Row]:
    """Of them, those after which experts moved."""
    return [row for row in looks(rows) if row["migration"]["migrated"]]


def cells(row: Row) -> tuple[str, ...]:
    """One migration, in the order of COLUMNS; loads are the busiest rank's over the mean, of the worst layer."""
    told = row["migration"]
    return (
        str(row["step"]),
        *(f"{told[name]:.2f}" for name in ("imbalance", "after", "bound")),
        f"{told['moved']:,}",
        size(told["bytes"]),
        seconds(told["seconds"] + told["planning_s"]),
        seconds(told["gain_s"]),
    )


def line(rows: Sequence[Row]) -> str:
    """How often experts were looked at and moved, what it cost, and what it brought: predicted, and measured as the
    median step before the first move less that after it."""
    moved = moves(rows)
    if not moved:
        return f"Loads were planned for {len(looks(rows))} times, and no plan paid: no expert moved."
    spent_s = sum(row["migration"]["seconds"] + row["migration"]["planning_s"] for row in looks(rows))
    share = spent_s / sum(row["step_time_s"] for row in rows)
    first = moved[0]["step"]
    before, after = ([row for row in steady(rows) if (row["step"] > first) == late] for late in (False, True))
    said = [
        f"Loads were planned for {len(looks(rows))} times, and experts moved {len(moved)} times: "
        f"{size(sum(row['migration']['bytes'] for row in moved))} over all ranks, {seconds(spent_s)} with planning, "
        f"{100 * share:.2g} % of the steps' time."
    ]
    if before and after:
        gained = 1 - typical(after, "step_time_s") / typical(before, "step_time_s")
        promised = moved[0]["migration"]["gain_s"] / typical(before, "step_time_s")
        said.append(
            f"The first move was predicted to save {percent(100 * promised)} of a step; steps after it take "
            f"{percent(-100 * gained)} of those before."
        )
    return " ".join(said)
