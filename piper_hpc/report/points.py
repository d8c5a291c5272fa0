"""A sweep's points, or some runs, as rows: what was predicted, what was measured, how they ended, what they cost."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from piper_hpc.report.load import steady
from piper_hpc.runs import RecordError, RunFolder
from piper_hpc.runs.sweeps import Claim, SweepFolder, SweepPoint

LOG_LINES = 12
"""Of the log of the rank that failed first."""


@dataclass(frozen=True)
class PointRow:
    """One point. state: as of a run, or `refused`. Measured: medians over steady steps, the largest peak of any rank;
    None where there is none. error_pct: 100 (predicted - measured) / measured, of the step time. spent_node_s: of all
    its claims; left_node_s: predicted, of one that is still to run. before: the sweep found it done."""

    index: int
    axes: dict[str, Any]
    state: str
    run_id: str | None = None
    before: bool = False
    other_code: str | None = None
    failure_class: str | None = None
    reason: str | None = None
    log: str = ""
    steps: int | None = None
    steps_done: int = 0
    predicted_step_s: float | None = None
    step_s: float | None = None
    error_pct: float | None = None
    tokens_per_s: float | None = None
    mfu: float | None = None
    loss: float | None = None
    predicted_peak_bytes: int | None = None
    peak_bytes: int | None = None
    limit_bytes: int | None = None
    spent_node_s: float = 0.0
    left_node_s: float = 0.0


@dataclass
class Reader:
    """Reads rows, and those of ended points once. lost: see `rows`."""

    sweep: SweepFolder
    _points: list[SweepPoint] = field(default_factory=list)
    _claims: dict[tuple[int, int], Claim] = field(default_factory=dict)
    _ended: dict[int, PointRow] = field(default_factory=dict)

    def rows(self, lost: Collection[int] = ()) -> list[PointRow]:
        """All points, in order. lost: indices of points whose jobs were taken away, which wait again."""
        self._points = self._points or self.sweep.points()
        claims = self.sweep.claims(self._claims)
        rows = []
        for point in self._points:
            row = self._ended.get(point.index)
            if row is None:
                row = self._row(point, claims.get(point.index, []), point.index in lost)
                if row.state in ("refused", "completed", "failed", "cancelled"):
                    self._ended[point.index] = row
            rows.append(row)
        return rows

    def _row(self, point: SweepPoint, claims: Sequence[Claim], is_lost: bool) -> PointRow:
        if point.state == "refused":
            return PointRow(point.index, point.axes, "refused", reason="; ".join(map(_told, point.errors)))
        run = self.sweep.run(point)
        assert run is not None
        before, held = point.state == "done", bool(claims) and not claims[-1].end and not is_lost
        ended = before or (bool(claims) and bool(claims[-1].end))
        found = facts_of(run)
        state = found["state"] if ended else "running" if held else "pending"
        if not ended:
            found |= {"failure_class": None, "reason": None, "log": ""}  # of an attempt before this one
        spent_s = sum(_seconds(claim, run, held=held and claim is claims[-1]) for claim in claims)
        done = found["steps_done"] / point.steps if point.steps else 0.0
        left_s = 0.0 if ended else (point.total_s or 0.0) * (1 - done)
        nodes = point.nodes or 0
        predicted_s = found["predicted_step_s"] or point.step_time_s
        return PointRow(
            index=point.index,
            axes=point.axes,
            run_id=point.run_id,
            before=before,
            other_code=point.other_code,
            steps=point.steps,
            limit_bytes=point.limit_bytes,
            spent_node_s=nodes * spent_s,
            left_node_s=nodes * left_s,
            **found | {"state": state, "predicted_step_s": predicted_s},
        )


def _seconds(claim: Claim, run: RunFolder, *, held: bool) -> float:
    """How long a job held its point. held: it still does. Of a job that was taken away nobody wrote the end down: it is
    when its ranks logged last."""
    if claim.seconds is not None:
        return claim.seconds
    logged = (log.stat().st_mtime for log in run.logs.glob(f"attempt-{claim.attempt}/rank-*.log"))
    ended_s = time.time() if held else max(logged, default=0.0)
    return max(0.0, ended_s - float(claim.owner["time_s"]))


def _told(error: Mapping[str, Any]) -> str:
    return f"{error['key']} = {error['value']}: {error['rule']}"


def rows_of_runs(runs: Sequence[RunFolder]) -> list[PointRow]:
    """Runs that no sweep joins, with what differs between their configurations for axes."""
    configs = [flat(_or_empty(run)) for run in runs]
    keys = sorted({key for config in configs for key in config} - set(_NOT_AXES))
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    rows = []
    for index, (run, config) in enumerate(zip(runs, configs, strict=True)):
        found = facts_of(run)
        spent_s = sum(found.pop("wall_s", []))
        nodes = config.get("cluster.nodes") or 1
        machine = _manifest(run).get("machine") or {}
        rows.append(
            PointRow(
                index=index,
                axes={key: config.get(key) for key in differing},
                run_id=run.run_id,
                steps=config.get("train.steps"),
                limit_bytes=machine.get("memory_bytes"),
                spent_node_s=nodes * spent_s,
                **found,
            )
        )
    return rows


_NOT_AXES = ("runs", "data.cache", "format", "wait")


def _or_empty(run: RunFolder) -> dict[str, Any]:
    with suppress(RecordError):
        return run.config()
    return {}


def _manifest(run: RunFolder) -> dict[str, Any]:
    with suppress(RecordError):
        return run.manifest()
    return {}


def flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{a: {b: 1}}` as `{a.b: 1}`."""
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= flat(inner, f"{prefix}{key}.") if isinstance(inner, Mapping) and inner else {f"{prefix}{key}": inner}
    return found


def facts_of(run: RunFolder) -> dict[str, Any]:
    """What a run's record says, by PointRow's fields; a record that cannot be read has failed with that reason."""
    try:
        return _facts(run)
    except (RecordError, OSError, KeyError, TypeError) as error:
        reason = error.reason if isinstance(error, RecordError) else f"{type(error).__name__}: {error}"
        return {"state": "failed", "reason": reason, "steps_done": 0, "predicted_step_s": None}


def _facts(run: RunFolder) -> dict[str, Any]:
    status, rows, predicted = run.status(), run.metrics(), run.prediction() or {}
    found: dict[str, Any] = {
        "state": status.state,
        "failure_class": status.failure_class,
        "reason": status.reason,
        "log": failed_log(run, status.attempt) if status.state == "failed" else "",
        "steps_done": rows[-1]["step"] + 1 if rows else 0,
        "predicted_step_s": predicted.get("step_time_s"),
        "predicted_peak_bytes": max(predicted["peak_memory_bytes"]) if predicted else None,
    }
    if not rows:
        return found
    typical = steady(rows)
    step_s = median(row["step_time_s"] for row in typical)
    if predicted:
        found["error_pct"] = 100 * (predicted["step_time_s"] - step_s) / step_s
    rates = [row["mfu"] for row in typical if row.get("mfu")]
    return found | {
        "step_s": step_s,
        "tokens_per_s": median(row["tokens_per_s"] for row in typical),
        "mfu": median(rates) if rates else None,
        "loss": rows[-1].get("loss"),
        "peak_bytes": max(size for row in rows for size in row["peak_memory_bytes"]),
    }


def failed_log(run: RunFolder, attempt: int) -> str:
    """The end of the log of the rank that failed first; of a run without a word, that of the first rank."""
    failures = run.failures(attempt)
    path: Path = run.logs / f"attempt-{attempt}" / f"rank-{failures[0].rank if failures else 0}.log"
    with suppress(OSError):
        with path.open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - 8192))
            text = file.read().decode(errors="replace")
        return "\n".join(text.splitlines()[-LOG_LINES:])
    return ""


@dataclass(frozen=True)
class Totals:
    """Of a sweep: points by state, and node-hours."""

    by_state: dict[str, int]
    spent_node_hours: float
    left_node_hours: float

    @property
    def is_over(self) -> bool:
        """Whether nothing is running or waits."""
        return not any(self.by_state.get(state) for state in ("pending", "running"))


STATES = ("completed", "running", "pending", "failed", "cancelled", "refused")


def totals(rows: Sequence[PointRow]) -> Totals:
    """Points by state and what they cost."""
    counted = {state: sum(row.state == state for row in rows) for state in STATES}
    spent, left = (sum(getattr(row, key) for row in rows) / 3600 for key in ("spent_node_s", "left_node_s"))
    return Totals({state: count for state, count in counted.items() if count}, spent, left)


@dataclass(frozen=True)
class Regret:
    """What it costs to have trusted the plan: the measured step of the layout that was predicted best against the best
    measured one of those that ran. pct: 0 where the plan's first is the fastest. agreeing: of all pairs of layouts, the
    share that the plan puts in the order in which they were measured, null for fewer than two."""

    first: int
    best: int
    first_step_s: float
    best_step_s: float
    pct: float
    agreeing: float | None
    ran: int


def regret(rows: Sequence[PointRow]) -> Regret | None:
    """Of the points of sweep=plan, which are in the plan's order; None before its first layout is measured."""
    ran = [row for row in rows if row.state == "completed" and row.step_s is not None]
    if not ran or ran[0].index != 0:
        return None
    times = [row.step_s or 0.0 for row in ran]
    best = min(range(len(ran)), key=times.__getitem__)
    pairs = [(times[low], times[high]) for high in range(len(ran)) for low in range(high)]
    agreeing = sum(first < second for first, second in pairs) / len(pairs) if pairs else None
    pct = 100 * (times[0] - times[best]) / times[best]
    return Regret(ran[0].index, ran[best].index, times[0], times[best], pct, agreeing, len(ran))


def regret_line(found: Regret) -> str:
    """In a sentence."""
    order = "" if found.agreeing is None else f"; {100 * found.agreeing:.0f} % of pairs are in the plan's order"
    if found.first == found.best:
        return f"regret 0 %: the plan's first layout is the fastest of {found.ran} that ran{order}"
    return (
        f"regret {found.pct:.1f} %: point {found.best} takes {1e3 * found.best_step_s:.4g} ms a step, the plan's first "
        f"{1e3 * found.first_step_s:.4g} ms{order}"
    )
