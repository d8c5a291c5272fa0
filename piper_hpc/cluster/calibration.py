"""Measurement rows to curves and fits, kept in one versioned JSON file that serves every model and layout."""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from piper_hpc.cluster.fits import fit_rows
from piper_hpc.spec import DISPATCH_COMBINE, IDLE, Calibration, Curve, Estimate, Fit, MeasuredAllToAll

SCHEMA_VERSION = 2
"""1: curves alone. Files of another version are not read: the cluster is measured again."""

VENDORS = ("nccl-tests", "osu")
"""Back ends of rows that the vendors' own benchmarks printed, in a type of their own choice."""

DIFFERENCES = ("skew/", "overhead/")
"""Curves of differences of times, which noise may take below zero."""

SAME_WORK = 1.1
"""Points whose work differs by less than this factor become one point of the curve."""

MAX_AGE_DAYS = 180

Row = Mapping[str, Any]


class CalibrationError(ValueError):
    """A calibration cannot be made or read; the message names the file or row and what to do."""


def fit(
    rows: Iterable[Row],
    *,
    cluster: str,
    provenance: Mapping[str, str],
    source: str = "",
    measured_at: str = "",
    previous: Calibration | None = None,
) -> Calibration:
    """Turn rows of `measurements.jsonl` into a calibration: curves, all-to-alls, and fits with confidence intervals.

    A row's time is the statistic that it names (`"statistic": "mean"` is its `mean_s`), and its median where it names
    none. Repeats and shapes of nearly equal work become one point, their median; a curve never falls (more work never
    takes less time: noise that says so is levelled). Skew and overhead are differences of times: a row that found none
    is no point. Curves come from torch.distributed and from shapes of the calibration suite; a model's own matrices
    (rows with a `part`) and other back ends become fits. A row that its link's counters refused, and all of its curve,
    is left out.
    `peak_flops` is the best rate of any `gemm` row. source: where the rows are kept; measured_at: ISO time, now if
    empty; previous: what these rows add to, point by point; its age stays. Raises CalibrationError for rows that
    delivered wrong values, that mix types or versions of the benchmark, or that have no `gemm` and nothing before.
    """
    rows = list(rows)
    _check(rows, cluster, needs_gemm=previous is None)
    rows = usable(rows)
    all_to_all_rows = [row for row in rows if row["operator"] == DISPATCH_COMBINE and row["algorithm"] != "mpi"]
    rows = [row for row in rows if row["operator"] != DISPATCH_COMBINE and _seconds(row) > 0]
    rows += [_idle(row) for row in rows if row.get("idle_s")]
    by_operator: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row.get("backend", "torch") == "torch" and "part" not in row:
            by_operator[_curve_name(row)].append(row)
    peaks = [row["work"] / _seconds(row) for row in rows if row["operator"] == "gemm"]
    types = sorted({str(row["dtype"]) for row in rows if row.get("backend") not in VENDORS}) or [
        str(provenance.get("dtype", ""))
    ]
    versions = sorted({str(row["benchmark_version"]) for row in rows})
    new = Calibration(
        source=source or f"measurements of {cluster}",
        measured_at=measured_at or datetime.now(timezone.utc).isoformat(timespec="seconds"),
        peak_flops=max(peaks, default=0.0),
        curves={operator: _curve(operator, by_operator[operator]) for operator in sorted(by_operator)},
        provenance={
            "cluster": cluster,
            "dtype": types[0],
            **({"benchmark_version": versions[0]} if versions else {}),
            **provenance,
        },
        exchanges=tuple(map(measured_all_to_all, all_to_all_rows)),
        fits=fit_rows(rows),
    )
    return new if previous is None else _merged(previous, new)


def _curve_name(row: Row) -> str:
    """A row's operator; of grouped products, whose rate follows both, a curve of FLOPs for each number of rows an
    expert: `grouped_gemm/64`."""
    operator, shape = str(row["operator"]), row["shape"]
    return f"{operator}/{shape['tokens'] // shape['experts']}" if operator == "grouped_gemm" else operator


def _idle(row: Row) -> Row:
    """Of an exchange the seconds in which its ranks compute nothing, as a row of a curve of its own."""
    idle_s = row["idle_s"]
    return {**row, "operator": f"{IDLE}{row['operator']}", "statistic": "median"} | dict.fromkeys(
        ("median_s", "p5_s", "p95_s"), idle_s
    )


def is_calibration_gemm(row: Row) -> bool:
    """Whether a row is a GEMM of the calibration suite; at least one is needed for peak_flops."""
    return bool(row["operator"] == "gemm" and "part" not in row)


def usable(rows: Iterable[Row]) -> list[Row]:
    """The rows that may be used: those of a curve of which no row was refused by its link's counters.

    Small messages hide among the barriers around them, so that the large ones speak for the whole curve.
    """
    rows = list(rows)

    def curve(row: Row) -> tuple[str, str]:
        return str(row.get("backend", "torch")), str(row["operator"])

    refused = {curve(row) for row in rows if row.get("refused")}
    return [row for row in rows if row["correct"] and curve(row) not in refused]


def measured_all_to_all(row: Row) -> MeasuredAllToAll:
    """A row of an all-to-all algorithm as the calibration has it.

    It was timed after a rest. In training a rank's quota is spent when an exchange begins: what it computes is
    stretched to its share of a core, as in other exchanges (`piper_hpc.microbench.timing.time_exchange`).
    """
    group, idle_s = row["group"], float(row.get("idle_s", 0.0))
    return MeasuredAllToAll(
        algorithm=str(row["algorithm"]),
        ranks=group["ranks"],
        nodes=group["nodes"],
        racks=group["racks"],
        logical_bytes=float(row["logical_bytes_per_rank"]),
        row_bytes=float(row["row_bytes"]),
        top_k=row["top_k"],
        experts=row["experts"],
        imbalance=float(row["imbalance"]),
        seconds=idle_s + row["computed_s"] / row["core_share"] if "computed_s" in row else float(row["median_s"]),
        spread=float(row["spread"]),
        chunks=int(row.get("chunks", 0)),
        idle_s=idle_s,
    )


def _merged(previous: Calibration, new: Calibration) -> Calibration:
    """`previous` with new points, which replace old ones inside their range of work."""
    replaced = {(fit.backend, fit.operator) for fit in new.fits}
    measured = set(map(_without_times, new.exchanges))
    return Calibration(
        source=new.source,
        measured_at=previous.measured_at,  # as old as the oldest of it
        peak_flops=max(previous.peak_flops, new.peak_flops),
        curves=previous.curves
        | {
            name: _merged_curve(previous.curves[name], curve) if name in previous.curves else curve
            for name, curve in new.curves.items()
        },
        # Old curves hold for what they were measured on: staleness is judged by that.
        provenance=new.provenance | previous.provenance | {"added_to": previous.source},
        exchanges=(
            *(each for each in previous.exchanges if _without_times(each) not in measured),
            *new.exchanges,
        ),
        fits=(*(fit for fit in previous.fits if (fit.backend, fit.operator) not in replaced), *new.fits),
    )


def _without_times(measured: MeasuredAllToAll) -> MeasuredAllToAll:
    return replace(measured, seconds=1.0, spread=0.0, idle_s=0.0)


def _merged_curve(old: Curve, new: Curve) -> Curve:
    points = list(zip(new.work, new.seconds, new.spread, strict=True))
    low, high = new.work[0] / SAME_WORK, new.work[-1] * SAME_WORK
    points += [point for point in zip(old.work, old.seconds, old.spread, strict=True) if not low < point[0] < high]
    work, seconds, spread = zip(*sorted(points), strict=True)
    return Curve(new.operator, new.unit, work, _monotone(np.array(seconds)), spread)


def _seconds(row: Row) -> float:
    """The statistic of the row's repeats that its curve follows."""
    return float(row[f"{row.get('statistic', 'median')}_s"])


def _check(rows: list[Row], cluster: str, *, needs_gemm: bool) -> None:
    again = f"measure again with `python -m piper_hpc.launch task=microbench cluster={cluster}`"
    if needs_gemm and not any(is_calibration_gemm(row) for row in rows):
        raise CalibrationError(
            f"cluster '{cluster}': no gemm of the calibration suite among {len(rows)} measurement rows; {again}"
        )
    for row in rows:
        if not row["correct"] and not row.get("refused"):
            shape = row.get("shape", {})
            raise CalibrationError(f"cluster '{cluster}': {row['operator']} {shape} gave wrong values; {again}")
        if row["operator"] != DISPATCH_COMBINE and not (
            row["work"] > 0 and (_seconds(row) > 0 or row["operator"].startswith(DIFFERENCES))
        ):
            raise CalibrationError(
                f"cluster '{cluster}': {row['operator']} has work={row['work']} and "
                f"{row.get('statistic', 'median')}_s={_seconds(row)}, both must be above 0; {again}"
            )
    for key in ("dtype", "benchmark_version"):
        values = sorted({str(row[key]) for row in rows if row.get("backend") not in VENDORS})
        if len(values) > 1:
            raise CalibrationError(f"cluster '{cluster}': rows mix {key} {' and '.join(values)}; fit one of them alone")


def _curve(operator: str, rows: list[Row]) -> Curve:
    points: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: float(row["work"])):
        if points and row["work"] < points[-1][0]["work"] * SAME_WORK:
            points[-1].append(row)
        else:
            points.append([row])
    seconds = np.array([np.median([_seconds(row) for row in point]) for point in points])
    return Curve(
        operator=operator,
        unit=str(rows[0]["unit"]),
        work=tuple(float(np.median([row["work"] for row in point])) for point in points),
        seconds=_monotone(seconds),
        spread=tuple(_spread(point, float(value)) for point, value in zip(points, seconds, strict=True)),
    )


def _monotone(seconds: np.ndarray) -> tuple[float, ...]:
    """Seconds made monotone, [points]: the mean of the running maximum from the left and the running minimum from the
    right, which bound every monotone curve through the noise."""
    rising = np.maximum.accumulate(seconds)
    falling = np.minimum.accumulate(seconds[::-1])[::-1]
    return tuple(((rising + falling) / 2).tolist())


def _spread(point: list[Row], seconds: float) -> float:
    """Half the range of the point's rows, each with the 90 % interval of its mean, over the point's time.

    A step adds many calls up, in which the scatter of single ones goes out: n of them scatter 1/sqrt(n) as much. What
    stays is how far apart rows are that were measured at other times.
    """

    def end_s(row: Row, percentile: str) -> float:
        return float(_seconds(row) + (row[percentile] - _seconds(row)) / math.sqrt(row["n"]))

    low, high = min(end_s(row, "p5_s") for row in point), max(end_s(row, "p95_s") for row in point)
    return (high - low) / 2 / seconds


def save(calibration: Calibration, path: Path) -> None:
    """Write the calibration's file; a reader never sees half of it."""
    document = {
        "schema_version": SCHEMA_VERSION,
        "cluster": calibration.provenance.get("cluster", ""),
        "measured_at": calibration.measured_at,
        "source": calibration.source,
        "peak_flops": calibration.peak_flops,
        "provenance": calibration.provenance,
        "curves": {name: asdict(curve) for name, curve in sorted(calibration.curves.items())},
        "exchanges": [asdict(each) for each in calibration.exchanges],
        "fits": [asdict(fit) for fit in calibration.fits],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def load(path: Path) -> Calibration:
    """Read what `save` wrote; CalibrationError where the file is missing, broken, or of another version."""
    again = "measure the cluster with `python -m piper_hpc.launch task=microbench cluster=...`"
    if not path.is_file():
        raise CalibrationError(f"no calibration at {path}: {again}")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document["schema_version"]
        if version != SCHEMA_VERSION:
            raise CalibrationError(
                f"{path}: schema_version={version}, this version of piper_hpc reads {SCHEMA_VERSION}: {again}"
            )
        return Calibration(
            source=document["source"],
            measured_at=document["measured_at"],
            peak_flops=float(document["peak_flops"]),
            curves={
                name: Curve(
                    operator=curve["operator"],
                    unit=curve["unit"],
                    work=tuple(curve["work"]),
                    seconds=tuple(curve["seconds"]),
                    spread=tuple(curve["spread"]),
                )
                for name, curve in document["curves"].items()
            },
            provenance=dict(document["provenance"]),
            exchanges=tuple(MeasuredAllToAll(**each) for each in document["exchanges"]),
            fits=tuple(
                Fit(**fit | {"terms": {name: Estimate(**term) for name, term in fit["terms"].items()}})
                for fit in document["fits"]
            ),
        )
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CalibrationError(f"{path} is no calibration file ({type(error).__name__}: {error}): {again}") from error


def staleness(
    calibration: Calibration,
    provenance: Mapping[str, str],
    *,
    now: datetime | None = None,
    max_age_days: float = MAX_AGE_DAYS,
) -> list[str]:
    """Why the calibration no longer describes the cluster as `provenance` does; empty while it does.

    provenance: what is true now, for example torch version and device; keys the calibration does not know are skipped.
    """
    reasons = [
        f"{key} was {calibration.provenance[key]!r} when it was measured and is {value!r} now"
        for key, value in provenance.items()
        if key in calibration.provenance and calibration.provenance[key] != value
    ]
    if calibration.measured_at:
        age = (now or datetime.now(timezone.utc)) - datetime.fromisoformat(calibration.measured_at)
        if age.days > max_age_days:
            reasons.append(f"it was measured {age.days} days ago, more than {max_age_days:g}")
    return reasons
