"""The table of an ablation: what each part brings alone and among all, as measured and as predicted."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from piper_hpc.report.units import seconds
from piper_hpc.studies.ablation.resident import MEASURED, PREDICTED
from piper_hpc.studies.ablation.variants import BASES, PARTS, Variant, alone, localised, taken_away, variants

LOSS = 1e-3
"""Most that losses of variants with one routing may differ by, of each other: sums are added in other orders."""
GAIN_COLUMNS = ("part", "layout", "alone", "among all")
STEP_COLUMNS = ("variant", "step", "repeats differ by", "predicted", "busiest rank over mean")
NOT_USED, NOT_MEASURED = "not used", "-"


class Measured:
    """The rows of one run by variant."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self._predicted = {row["variant"]: row["step_time_s"] for row in rows if row["operator"] == PREDICTED}
        self._rows: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["operator"] == MEASURED:
                self._rows.setdefault(row["variant"], []).append(row)

    @property
    def variants(self) -> list[Variant]:
        """Those that were measured."""
        return [variant for variant in variants() if variant.name in self._rows]

    def steps_s(self, variant: Variant) -> list[float]:
        """By repeat."""
        return [row["step_time_s"] for row in self._rows.get(variant.name, [])]

    def rank_load(self, variant: Variant) -> float:
        """Of the worst layer, the last repeat's."""
        return float(self._rows[variant.name][-1]["rank_load"])

    def predicted_s(self, variant: Variant) -> float | None:
        """None where the resource model has no price."""
        return self._predicted.get(variant.name)

    def gain(self, pair: tuple[Variant, Variant] | None) -> str:
        """Step without over step with, the median over repeats, and in brackets as predicted."""
        if pair is None:
            return NOT_USED
        without, with_part = map(self.steps_s, pair)
        if not without or not with_part:
            return NOT_MEASURED
        measured = median(old / new for old, new in zip(without, with_part, strict=False))
        old_s, new_s = map(self.predicted_s, pair)
        predicted = "-" if old_s is None or new_s is None else f"{old_s / new_s:.2f}"
        return f"{measured:.2f} ({predicted})"

    def losses_differ(self) -> float:
        """Largest relative difference between losses of one step of variants with one routing."""
        worst = 0.0
        for routing in {variant.routing for variant in self.variants}:
            rows = [self._rows[variant.name][0]["losses"] for variant in self.variants if variant.routing == routing]
            worst = max(worst, *(max(losses) / min(losses) - 1 for losses in zip(*rows, strict=True)))
        return worst


def gain_cells(measured: Measured) -> list[tuple[str, ...]]:
    """A line for each part and layout, in the order of GAIN_COLUMNS."""
    first, last = localised()
    cells: list[tuple[str, ...]] = [
        ("localised by the pipeline", " to ".join(BASES), measured.gain(first), measured.gain(last))
    ]
    for part in PARTS:
        for base in BASES:
            cells.append((part, base, measured.gain(alone(base, part)), measured.gain(taken_away(base, part))))
    return cells


def step_cells(measured: Measured) -> list[tuple[str, ...]]:
    """A line for each variant, in the order of STEP_COLUMNS."""
    cells: list[tuple[str, ...]] = []
    for variant in measured.variants:
        steps_s, predicted_s = measured.steps_s(variant), measured.predicted_s(variant)
        step_s = median(steps_s)
        cells.append(
            (
                variant.name,
                seconds(step_s),
                f"±{100 * (max(steps_s) - min(steps_s)) / 2 / step_s:.1f} %",
                "-" if predicted_s is None else f"{seconds(predicted_s)} {100 * (predicted_s / step_s - 1):+.0f} %",
                f"{measured.rank_load(variant):.2f}",
            )
        )
    return cells
