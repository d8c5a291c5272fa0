"""The table of faults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

COLUMNS = ("seed", "fault", "when", "attempts ended as", "trained twice", "seconds", "verdict")


def cells(row: dict[str, Any]) -> list[str]:
    """A row's words."""
    classes = ", ".join(row["classes"])
    verdict = row["problem"] or "as it must be"
    figures = (str(row["repeated_steps"]), f"{row['seconds']:.0f}")
    return [str(row["seed"]), row["fault"], row["moment"], classes, *figures, verdict]


def summary(rows: Sequence[dict[str, Any]], asked: int) -> str:
    """How many went as they must."""
    good = sum(row["problem"] is None for row in rows)
    return f"{good} of {len(rows)} went as they must; {asked - len(rows)} were not tried"
