"""Statistics over judged rows: errors, a trivial baseline's errors, ranking (Kendall's tau), out-of-memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import combinations
from statistics import fmean, median
from typing import Any

from analysis.validation.published import flops, metrics
from analysis.validation.published.judge import REFUSED_PCT, Judged, rate
from analysis.validation.published.metrics import MEMORY, STATUS, TIME
from analysis.validation.published.request import Refused, Request

STATE_BYTES = 16
"""Bytes per parameter of the memory baseline: states alone."""


def one_per_run(judged: Iterable[Judged]) -> list[Judged]:
    """The row that gives a run's one time error: the first of step time, tokens/s, TFLOP/s, MFU that it states.

    What a document prints a second time is no second run.
    """
    chosen: dict[int, Judged] = {}
    for each in judged:
        if each.row.quantity.kind != TIME or each.measured is None or each.repeat_of:
            continue
        run = id(each.answer.run)
        if run not in chosen or _order(each) < _order(chosen[run]):
            chosen[run] = each
    return list(chosen.values())


def _order(judged: Judged) -> int:
    return metrics.TIME_ORDER.index(judged.row.quantity.name)


def absolute(errors_pct: Sequence[float]) -> dict[str, float | int | None]:
    """n, mean, median and maximum of absolute errors in percent."""
    return {
        "n": len(errors_pct),
        "mean_abs_error_pct": fmean(errors_pct) if errors_pct else None,
        "median_abs_error_pct": median(errors_pct) if errors_pct else None,
        "max_abs_error_pct": max(errors_pct) if errors_pct else None,
    }


def statistics(rows: Sequence[Judged]) -> dict[str, Any]:
    """Errors of a set, the baseline beside them; the same of its unseen and of its fitted rows apart.

    fitted: rows that a constant saw. covered: share of unseen values in their 90 % interval; held_out: errors of unseen
    rows alone, as in `unseen`.
    """
    held_out, seen = [row for row in rows if not row.fitted], [row for row in rows if row.fitted]
    covered = [row.covered for row in held_out if row.covered is not None]
    unseen = errors(held_out)
    return errors(rows) | {
        "fitted": len(seen),
        "covered": fmean(covered) if covered else None,
        "held_out": {key: unseen[key] for key in absolute(())},
        "unseen": unseen,
        "seen": errors(seen),
    }


def errors(rows: Sequence[Judged]) -> dict[str, Any]:
    """Absolute errors of a set, refused rows that state all at 100 %, and the baseline's on the same set.

    coverage: predicted rows over all rows. bias_pct: mean of signed errors of predicted rows.
    """
    counted = [pct for row in rows if (pct := row.counted_pct) is not None]
    signed = [row.error_pct for row in rows if row.error_pct is not None]
    return absolute(counted) | {
        "rows": len(rows),
        "coverage": len(signed) / len(rows) if rows else None,
        "refused": len(rows) - len(signed),
        "refused_counted": sum(row.error_pct is None and row.counted_pct == REFUSED_PCT for row in rows),
        "bias_pct": fmean(signed) if signed else None,
        "baseline": absolute([abs(error) for error in baseline(rows) if error is not None]),
    }


# The trivial baseline.


def baseline(rows: Sequence[Judged]) -> list[float | None]:
    """Signed errors of the trivial baseline in percent: one constant efficiency, or states alone for memory.

    Efficiency: hardware FLOP/s of a GPU (recompute included where the row states it) over its peak; the constant is its
    median over this same set. Rates of FLOPs and MFU are taken as printed.
    """
    reached = [_efficiency(row) for row in rows]
    known = [efficiency for efficiency in reached if efficiency]
    constant = median(known) if known else 0.0
    errors: list[float | None] = []
    for row, efficiency in zip(rows, reached, strict=True):
        if efficiency:
            slower = row.row.quantity.name == metrics.STEP_TIME
            ratio = efficiency / constant if slower else constant / efficiency
            errors.append(100 * (ratio - 1))
        elif row.row.quantity.kind == MEMORY and row.answer.request and row.row.value:
            errors.append(100 * (states_bytes(row.answer.request) / row.row.value - 1))
        else:
            errors.append(None)
    return errors


def _efficiency(judged: Judged) -> float | None:
    row, request = judged.row, judged.answer.request
    if row.quantity.kind != TIME or row.value is None:
        return None
    name = row.quantity.name
    if name == metrics.MFU:
        return row.value
    if request is None or (name in (metrics.STEP_TIME, metrics.STEPS) and "global_batch" in request.filled):
        return None
    run = judged.answer.run
    counted = flops.NONCAUSAL if "recompute" in request.filled else flops.HARDWARE
    try:
        if name == metrics.FLOPS_GPU:
            return row.value / flops.peak_flops(run, request)
        in_one_s = rate(metrics.MFU, run, request, 1.0, counted)
    except Refused:
        return None
    steps_per_s = 1 / row.value if name == metrics.STEP_TIME else row.value / rate(name, run, request, 1.0, counted)
    return in_one_s * steps_per_s


def states_bytes(request: Request) -> float:
    """Bytes of model states of one rank, split evenly over the layout and sharded by ZeRO (arXiv 1910.02054 section 5).

    A parameter has 2 B of weights, 2 B of gradients and 12 B of Adam's states: 16 B in all, of which stage 1 shards
    12, stage 2 14 and stage 3 all.
    """
    model, layout = request.model, request.layout
    routed = model.moe_layers * model.experts * model.expert_parameters
    total = 0.0
    for parameters, replicas in (
        ((model.parameters - routed) / (layout.pp * layout.tp), layout.dense_dp * layout.cp),
        (routed / (layout.pp * layout.ep * layout.etp), layout.dp),
    ):
        kept = {0: 16, 1: 4, 2: 2, 3: 0}[layout.zero]
        total += parameters * (kept + (STATE_BYTES - kept) / replicas)
    return total


# Ranking and memory limits.


def ranking(judged: Sequence[Judged]) -> dict[str, Any]:
    """Whether the model orders runs as measured, in sets of at least three that share model, GPUs and metric.

    kendall_tau: concordant less discordant pairs over all pairs, averaged over sets; top1_regret_pct: how much slower,
    as measured, the run is that the model ranks first than the best of its set.
    """
    sets: dict[tuple[str, ...], list[tuple[float, float]]] = {}
    for each in one_per_run(judged):
        request = each.answer.request
        if each.refused or request is None or not isinstance(each.measured, float) or each.predicted is None:
            continue
        assert isinstance(each.predicted, float)
        name, cells = each.row.quantity.name, each.row.cells
        if name == metrics.STEP_TIME:
            tokens = request.global_batch * request.sequence
            pair = (tokens / each.measured, tokens / each.predicted)
        else:
            pair = (each.measured, each.predicted)
        sets.setdefault((cells["model"], cells["gpu"], str(request.gpus), name, each.convention), []).append(pair)
    large = [pairs for pairs in sets.values() if len(pairs) >= 3]
    regrets = [100 * (1 - max(pairs, key=lambda pair: pair[1])[0] / max(pairs)[0]) for pairs in large]
    return {
        "sets": len(large),
        "runs": sum(map(len, large)),
        "kendall_tau": fmean(kendall_tau(pairs) for pairs in large) if large else None,
        "top1_regret_pct": fmean(regrets) if regrets else None,
    }


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float:
    """Kendall's tau-a (1938) of (measured, predicted) pairs: (concordant - discordant) / all; ties count 0."""
    signs = [(a[0] - b[0]) * (a[1] - b[1]) for a, b in combinations(pairs, 2)]
    return sum((sign > 0) - (sign < 0) for sign in signs) / len(signs)


def out_of_memory(judged: Sequence[Judged]) -> dict[str, Any]:
    """OOM as a classification: status rows, and every run that printed a time or memory and so did fit."""
    verdicts: dict[int, tuple[bool, bool]] = {}
    for each in judged:
        outcome, kind = each.answer.outcome, each.row.quantity.kind
        if outcome is None or kind not in (STATUS, TIME, MEMORY) or each.answer.request is None:
            continue
        if not each.answer.request.single_layer:
            verdicts[id(each.answer.run)] = (kind == STATUS and each.measured == "OOM", not outcome.fits)
    hits = sum(measured and predicted for measured, predicted in verdicts.values())
    measured, predicted = (sum(pair[index] for pair in verdicts.values()) for index in (0, 1))
    return {
        "runs": len(verdicts),
        "measured": measured,
        "predicted": predicted,
        "both": hits,
        "precision": hits / predicted if predicted else None,
        "recall": hits / measured if measured else None,
    }
