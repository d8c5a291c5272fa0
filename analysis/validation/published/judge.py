"""Predicted against measured, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from analysis.validation.published import flops, metrics
from analysis.validation.published.fill import fill
from analysis.validation.published.metrics import COMPONENT, MEMORY, STATUS, TIME
from analysis.validation.published.names import family
from analysis.validation.published.repeats import repeats
from analysis.validation.published.request import Outcome, Predictor, Refused, Request
from analysis.validation.published.rows import PublishedRow, PublishedRun

REFUSED_PCT = 100.0
"""What a refused row counts as, where it states everything that a prediction needs."""


@dataclass(frozen=True)
class Answer:
    """What the model says of a run: the Request it chose with its Outcome, or why it refuses.

    baseline_request: where the predictor refuses, the first filling, so that the trivial baseline may still answer.
    candidates: how many fillings were asked.
    """

    run: PublishedRun
    request: Request | None = None
    outcome: Outcome | None = None
    refused: str = ""
    candidates: int = 0


@dataclass(frozen=True)
class Judged:
    """One row: values in the row's own unit; `predicted` is None where it is refused.

    A status row has no numbers: its error is 0 % where the prediction is right and 100 % where it is wrong.
    """

    row: PublishedRow
    answer: Answer
    measured: float | str | None
    predicted: float | str | None
    refused: str
    fitted: bool
    convention: str = ""
    repeat_of: str = ""

    @property
    def error_pct(self) -> float | None:
        """100 (predicted - measured) / measured."""
        if self.refused or self.predicted is None:
            return None
        if isinstance(self.measured, str) or isinstance(self.predicted, str):
            return 0.0 if self.measured == self.predicted else REFUSED_PCT
        return 100 * (self.predicted - self.measured) / self.measured if self.measured else None

    @cached_property
    def interval(self) -> tuple[float, float] | None:
        """90 % interval of a predicted time or rate, in the row's own unit; None where there is none."""
        outcome = self.answer.outcome
        if self.row.quantity.kind != TIME or not isinstance(self.predicted, float) or outcome is None:
            return None
        if outcome.half_width_s is None:
            return None
        ratio = 1 + outcome.half_width_s() / outcome.step_time_s
        return self.predicted / ratio, self.predicted * ratio

    @property
    def covered(self) -> bool | None:
        """Whether the measured value lies in the interval."""
        if self.interval is None or not isinstance(self.measured, float):
            return None
        return self.interval[0] <= self.measured <= self.interval[1]

    @property
    def counted_pct(self) -> float | None:
        """The absolute error that enters a mean: 100 % for a refused row that states all, None for any other."""
        if self.error_pct is not None:
            return abs(self.error_pct)
        return REFUSED_PCT if self.answer.run.fully_stated else None

    @property
    def family(self) -> str:
        """The model family that the row belongs to."""
        return family(self.row.cells["model"])

    def document(self) -> dict[str, Any]:
        """The row's own columns and the verdict, as plain JSON types."""
        request = self.answer.request
        return dict(self.row.cells) | {
            "family": self.family,
            "kind": self.row.quantity.kind,
            "measured": self.measured,
            "predicted": self.predicted,
            "interval": self.interval,
            "covered": self.covered,
            "error_pct": self.error_pct,
            "refused": self.refused or None,
            "counted_pct": self.counted_pct,
            "fully_stated": self.answer.run.fully_stated,
            "fitted": self.fitted,
            "repeat_of": self.repeat_of or None,
            "filled": request.filled if request else {},
            "candidates": self.answer.candidates,
            "layout": vars(request.layout) if request else None,
            "flop_convention": self.convention or None,
        }


def answer(run: PublishedRun, others: Sequence[PublishedRun], predict: Predictor) -> Answer:
    """Ask for every filling that the rule allows, and take the fastest that fits, else that of least memory."""
    try:
        requests = fill(run, others)
    except Refused as error:
        return Answer(run, refused=str(error))
    answered: list[tuple[Request, Outcome]] = []
    reason = ""
    for request in requests:
        try:
            answered.append((request, predict(request)))
        except Refused as error:
            reason = reason or str(error)
    if not answered:
        return Answer(run, requests[0], refused=reason, candidates=len(requests))
    fitting = [pair for pair in answered if pair[1].fits]
    if fitting:
        request, outcome = min(fitting, key=lambda pair: _seconds_per_token(*pair))
    else:
        request, outcome = min(answered, key=lambda pair: pair[1].peak_memory_bytes)
    return Answer(run, request, outcome, candidates=len(requests))


def _seconds_per_token(request: Request, outcome: Outcome) -> float:
    return outcome.step_time_s / (request.global_batch * request.sequence)


def judge(
    runs: Sequence[PublishedRun], predict: Predictor, others: Sequence[PublishedRun] | None = None
) -> list[Judged]:
    """Every row of every run, in the order of the runs; `others` are the file's runs where `runs` are a part of it."""
    answers = [answer(run, others or runs, predict) for run in runs]
    ids = {row_id for each in answers if each.outcome for row_id in each.outcome.fitted_on}
    repeat_of = repeats(others or runs)
    judged = []
    for each in answers:
        seen = {row.quantity.kind for row in each.run.rows if {row.row_id, repeat_of.get(row.row_id)} & ids}
        for row in each.run.rows:
            judged.append(_judged(row, each, row.quantity.kind in seen, repeat_of.get(row.row_id, "")))
    return judged


def _judged(row: PublishedRow, answer: Answer, fitted: bool, repeat_of: str) -> Judged:
    """`fitted`: a constant saw this row, its repeat, or one of the same kind of the same run: the same measurement."""
    kind, request, outcome = row.quantity.kind, answer.request, answer.outcome
    if kind == STATUS:
        measured: float | str | None = "OOM" if row.out_of_memory else "fits"
    else:
        measured = row.value / row.scale if row.value is not None else None
    reason, convention = row.problem or answer.refused, ""
    try:
        if kind == TIME and row.quantity.name in (metrics.FLOPS_GPU, metrics.FLOPS_TOTAL, metrics.MFU) and request:
            convention = flops.convention(answer.run, row, request)
        if reason or request is None or outcome is None:
            return Judged(row, answer, measured, None, reason, fitted, convention, repeat_of)
        if kind == STATUS:
            return Judged(row, answer, measured, "fits" if outcome.fits else "OOM", "", fitted, "", repeat_of)
        predicted = value(row, answer.run, request, outcome, convention) / row.scale
    except Refused as error:
        return Judged(row, answer, measured, None, reason or str(error), fitted, convention, repeat_of)
    return Judged(row, answer, measured, predicted, "", fitted, convention, repeat_of)


def value(row: PublishedRow, run: PublishedRun, request: Request, outcome: Outcome, convention: str) -> float:
    """What the outcome says of the row's quantity, in SI units. Raises Refused where it says nothing."""
    kind, name = row.quantity.kind, row.quantity.name
    if kind == TIME:
        if name in (metrics.STEP_TIME, metrics.STEPS) and "global_batch" in request.filled:
            raise Refused("global_batch=(empty): must be stated for a step time; rates are judged without")
        return rate(name, run, request, outcome.step_time_s, convention)
    if kind == MEMORY:
        reserved = outcome.reserved_bytes if name == "peak_memory_reserved" else 0.0
        return reserved or outcome.peak_memory_bytes
    assert kind == COMPONENT, "rows of unknown metrics have a problem"
    parts = outcome.components
    whole = name == "layer_flops_per_s"
    for key in ("layer_forward_s", "layer_backward_s") if whole else (name,):
        if key not in parts:
            raise Refused(f"metric={row.cells['metric']}: the model gives no {key} for this run")
    if not whole:
        return parts[name]
    tokens = request.layout.micro_batch * request.layout.dense_dp * request.sequence
    seconds = parts["layer_forward_s"] + parts["layer_backward_s"]
    return flops.layer_flops(request) * tokens / request.gpus / seconds


def rate(name: str, run: PublishedRun, request: Request, step_time_s: float, convention: str) -> float:
    """The metric of time that a step time implies, by its canonical name. Raises Refused for MFU of an unknown peak."""
    sequences = request.global_batch / step_time_s
    tokens = sequences * request.sequence
    rates = {metrics.SEQUENCES: sequences, metrics.TOKENS: tokens, metrics.STEPS: 1 / step_time_s}
    rates |= {metrics.SEQUENCES_GPU: sequences / request.gpus, metrics.TOKENS_GPU: tokens / request.gpus}
    if name in rates:
        return rates[name]
    if name == metrics.STEP_TIME:
        return step_time_s
    work = tokens * flops.flops_per_token(request, convention or flops.NONCAUSAL)
    if name == metrics.FLOPS_TOTAL:
        return work
    return work / request.gpus / (flops.peak_flops(run, request) if name == metrics.MFU else 1.0)
