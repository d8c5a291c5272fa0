"""Predicted against measured, point by point and term by term, and the bars that the whole is held to. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean, median
from typing import Any

from piper_hpc.studies.own_runs.predicting import COMPUTED, PREDICTED
from piper_hpc.studies.own_runs.resident import CPU, MEASURED

LARGE_TERM = 0.10
"""Terms above this share of a step are judged."""
STEP_MEAN, STEP_MOST, TERM_MEAN, MEMORY_MOST = 0.07, 0.20, 0.20, 0.03
INSIDE, HALF_WIDTH = 0.80, 0.25
REGRET, TAU = 0.03, 0.85


@dataclass(frozen=True)
class Value:
    """One quantity of one point, in seconds or bytes. low, high: its 90 % interval, where there is one; spread: half
    the range of the repeats over their median."""

    name: str
    predicted: float
    measured: float
    spread: float
    low: float | None = None
    high: float | None = None

    @property
    def error(self) -> float:
        """Relative to what was measured."""
        return self.predicted / self.measured - 1

    @property
    def inside(self) -> bool | None:
        """Whether the interval holds what was measured; None without one."""
        return None if self.low is None or self.high is None else self.low <= self.measured <= self.high

    @property
    def half_width(self) -> float | None:
        """Of the interval, over what is predicted."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2 / self.predicted


@dataclass(frozen=True)
class Result:
    """One point: its step, the terms that are large, and the fullest rank's peak; repeats: how many were measured.

    layers: CPU seconds of a mean rank's layers without exchanges, where they were counted: they tell whether a step is
    off by what is computed or by what is waited.
    """

    point: str
    step: Value
    terms: tuple[Value, ...]
    peak: Value | None
    repeats: int
    layers: Value | None = None

    @property
    def family(self) -> tuple[str, bool]:
        """What its layouts are ranked among: the model, and whether routing is skewed."""
        return self.point.split()[0], self.point.endswith("skewed")


@dataclass(frozen=True)
class Bar:
    """What is asked of all points together, and what was found. met: None where too few points tell."""

    name: str
    found: str
    asked: str
    met: bool | None


def results(rows: Sequence[dict[str, Any]]) -> list[Result]:
    """Of each point that was predicted and measured, in the order of the predictions."""
    predicted = {row["point"]: row for row in rows if row["operator"] == PREDICTED}
    counted = {row["point"]: row["cpu_s"] for row in rows if row["operator"] == CPU}
    found = []
    for name, prediction in predicted.items():
        runs = [row for row in rows if row["operator"] == MEASURED and row["point"] == name]
        if runs:
            found.append(_result(name, prediction, runs, counted.get(name)))
    return found


def _result(
    name: str, prediction: dict[str, Any], runs: Sequence[dict[str, Any]], cpu_s: dict[str, float] | None
) -> Result:
    step = _value(
        "step time", prediction, "step_time_s", [run["step_time_s"] for run in runs], prediction["step_time_s"]
    )
    terms = [
        _value(term, prediction, term, [run["terms"][term] for run in runs], predicted)
        for term, predicted in prediction["terms"].items()
    ]
    layers_s = prediction.get("layers_cpu_s")
    peaks = [max(run["peak_memory_bytes"]) for run in runs if run["peak_memory_bytes"]]
    return Result(
        name,
        step,
        tuple(term for term in terms if term.measured > LARGE_TERM * step.measured),
        Value("peak memory", max(prediction["peak_memory_bytes"]), median(peaks), 0.0) if peaks else None,
        len(runs),
        Value("layers", layers_s, sum(cpu_s[term] for term in COMPUTED), 0.0) if cpu_s and layers_s else None,
    )


def _value(name: str, prediction: dict[str, Any], key: str, measured: Sequence[float], predicted: float) -> Value:
    middle = median(measured)
    spread = (max(measured) - min(measured)) / 2 / middle if middle else 0.0
    low, high = prediction["intervals"].get(key, (None, None))
    return Value(name, predicted, middle, spread, low, high)


def bars(found: Sequence[Result]) -> list[Bar]:
    """All of them, in the order of the constants above."""
    steps = [abs(each.step.error) for each in found]
    terms = [abs(term.error) for each in found for term in each.terms]
    peaks = [abs(each.peak.error) for each in found if each.peak is not None]
    judged = [value for each in found for value in (each.step, *each.terms) if value.inside is not None]
    widths = [value.half_width for value in judged if value.half_width is not None]
    made = [
        _at_most("step time, mean error", fmean(steps), STEP_MEAN),
        _at_most("step time, largest error", max(steps), STEP_MOST),
        _at_most(f"terms above {100 * LARGE_TERM:g} % of the step, mean error", fmean(terms), TERM_MEAN),
    ]
    if peaks:
        made.append(_at_most("peak memory, largest error", max(peaks), MEMORY_MOST))
    if judged:
        share = sum(bool(value.inside) for value in judged) / len(judged)
        made.append(Bar("inside the 90 % interval", _percent(share), f">= {_percent(INSIDE)}", share >= INSIDE))
        made.append(_at_most("half width of the interval, mean", fmean(widths), HALF_WIDTH))
    return [*made, *_ranking(found)]


def _at_most(name: str, value: float, most: float) -> Bar:
    return Bar(name, _percent(value), f"<= {_percent(most)}", value <= most)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _ranking(found: Sequence[Result]) -> list[Bar]:
    """Regret of the first choice and Kendall's tau, over pairs that differ by more than their spread."""
    made, concordant, pairs = [], 0, 0
    for family in dict.fromkeys(each.family for each in found):
        members = [each for each in found if each.family == family]
        if len(members) < 3:
            continue
        chosen = min(members, key=lambda each: each.step.predicted)
        best = min(members, key=lambda each: each.step.measured)
        regret, most = chosen.step.measured / best.step.measured - 1, max(REGRET, chosen.step.spread, best.step.spread)
        made.append(_at_most(f"regret of the first choice, {family[0]}", regret, most))
        for one, other in combinations(members, 2):
            slower, faster = sorted((one, other), key=lambda each: -each.step.measured)
            apart = slower.step.measured / faster.step.measured - 1
            if apart > one.step.spread + other.step.spread:
                pairs += 1
                concordant += 1 if slower.step.predicted > faster.step.predicted else -1
    tau = concordant / pairs if pairs else None
    told = "no pair differs by more than its spread" if tau is None else f"{tau:.2f} of {pairs} pairs"
    return [*made, Bar("Kendall's tau", told, f">= {TAU}", None if tau is None else tau >= TAU)]
