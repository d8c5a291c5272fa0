"""Two runs side by side: what changed between them, and which of their times differ by more than they repeat."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median, stdev
from typing import Any

from piper_hpc.report.load import metrics, steady, timed, typical
from piper_hpc.report.points import flat
from piper_hpc.report.table import NAMES
from piper_hpc.runs import RecordError, RunFolder
from piper_hpc.spec import TERMS

BEYOND = 2.0
"""Standard errors of a difference from which on it is told as one: chance alone goes beyond in one of twenty."""
MEDIAN_COST = 1.2533
"""Standard error of a median over that of a mean, of normally distributed values."""
NO_CHANGES = ("runs", "data.cache", "SLURM_JOB_ID", "SLURM_JOB_NODELIST")
"""Nodes are told by the machine."""


@dataclass(frozen=True)
class Change:
    """One fact that the runs do not share; None where one has it not. kind: `config`, `environment`, `versions`,
    `machine` or `code`."""

    kind: str
    key: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Difference:
    """One quantity, medians over steady steps (memory: the most of any). difference_pct: 100 (b - a) / a; noise_pct:
    what that may be without any cause, at BEYOND standard errors; differs: whether it is more."""

    key: str
    name: str
    a: float
    b: float
    difference_pct: float | None
    noise_pct: float
    differs: bool


@dataclass(frozen=True)
class Comparison:
    """Of two runs. repeats: how many runs of the same configurations there are beside them, by which it is known how
    well a run repeats; repeat_pct: by how much it does, one standard deviation of the step time, None without any."""

    a: str
    b: str
    changes: list[Change]
    differences: list[Difference]
    repeats: int
    repeat_pct: float | None


def compare(a: RunFolder, b: RunFolder, others: Sequence[RunFolder]) -> Comparison:
    """Hold two runs that trained against each other; others: where runs of the same configurations may be.

    The noise of a difference has two parts: how steps scatter within each run, and how runs of one configuration differ
    from one another, which the steps of one run do not show. Raises UsageError for a run without a step.
    """
    rows_a, rows_b = steady(metrics(a)), steady(metrics(b))
    families = [_family(run, others) for run in (a, b)]
    keys = ["step_time_s", "tokens_per_s"]
    if timed(rows_a) and timed(rows_b):
        keys = [*TERMS, *keys]
    if "wall_s" in rows_a[0] and "wall_s" in rows_b[0]:
        keys.append("wall_s")
    differences = [_difference(key, rows_a, rows_b, families) for key in keys]
    differences.append(_memory(rows_a, rows_b))
    repeat = _repeatability("step_time_s", families)
    return Comparison(
        a.run_id,
        b.run_id,
        changes(a, b),
        differences,
        len({run.run_id for family in families for run in family} - {a.run_id, b.run_id}),
        None if repeat is None else 100 * repeat,
    )


def changes(a: RunFolder, b: RunFolder) -> list[Change]:
    """What configuration, environment, versions, machine and code do not share."""
    found = _differing("config", flat(a.config()), flat(b.config()))
    manifests = a.manifest(), b.manifest()
    jobs = [manifest.get("job") or {} for manifest in manifests]
    for kind in ("environment", "versions"):
        # As the job had it, where that is known: the login node's may be another.
        pairs = zip(manifests, jobs, strict=True)
        of_jobs = [{**(manifest.get(kind) or {}), **(job.get(kind) or {})} for manifest, job in pairs]
        found += _differing(kind, *of_jobs)
    machines = [
        {
            "nodes": ", ".join(job.get("nodes") or ()),
            "device": job.get("device"),
            "peak_flops": job.get("peak_flops"),
            "resumed": (job.get("resumed") or {}).get("checkpoint"),
            **flat((manifest.get("machine") or {}).get("fingerprint") or {}, "fingerprint."),
        }
        for manifest, job in zip(manifests, jobs, strict=True)
    ]
    found += _differing("machine", *machines)
    return found + _differing("code", *(flat(manifest.get("git") or {}) for manifest in manifests))


def _differing(kind: str, a: Mapping[str, Any], b: Mapping[str, Any]) -> list[Change]:
    keys = [key for key in dict.fromkeys([*a, *b]) if key not in NO_CHANGES]
    return [Change(kind, key, a.get(key), b.get(key)) for key in keys if a.get(key) != b.get(key)]


def _family(run: RunFolder, others: Sequence[RunFolder]) -> list[RunFolder]:
    """The completed runs of the same configuration, itself among them."""
    own = run.manifest().get("identity")
    family = [run]
    for other in others if own else ():
        with suppress(RecordError, OSError):
            same = other.manifest().get("identity") == own and other.run_id != run.run_id
            if same and other.status().state == "completed" and other.metrics():
                family.append(other)
    return family


def _repeatability(key: str, families: Sequence[Sequence[RunFolder]]) -> float | None:
    """Relative standard deviation of a quantity between runs of one configuration, pooled over both; None where no
    configuration ran twice."""
    squares, freedom = 0.0, 0
    seen: set[str] = set()
    for family in families:
        if family[0].run_id in seen:  # both runs are of one configuration
            continue
        seen |= {run.run_id for run in family}
        medians = [typical(steady(metrics(run)), key) for run in family]
        if len(medians) > 1 and median(medians):
            squares += (len(medians) - 1) * (stdev(medians) / median(medians)) ** 2
            freedom += len(medians) - 1
    return math.sqrt(squares / freedom) if freedom else None


def _difference(
    key: str, rows_a: Sequence[Any], rows_b: Sequence[Any], families: Sequence[Sequence[RunFolder]]
) -> Difference:
    a, b = typical(rows_a, key), typical(rows_b, key)
    within = math.hypot(_standard_error(rows_a, key), _standard_error(rows_b, key))
    between = math.sqrt(2) * (_term_repeatability(key, families) or 0.0)
    noise = BEYOND * math.hypot(within, between * abs(a))
    pct = 100 * (b - a) / a if a else None
    name = {"tokens_per_s": "tokens/s"}.get(key) or NAMES[key]
    return Difference(key, name, a, b, pct, 100 * noise / a if a else 0.0, abs(b - a) > noise)


def _term_repeatability(key: str, families: Sequence[Sequence[RunFolder]]) -> float | None:
    """Of one quantity; where a record is too old for it, nothing is known."""
    with suppress(KeyError, TypeError):
        return _repeatability(key, families)
    return None


def _standard_error(rows: Sequence[Any], key: str) -> float:
    """Of the median over steps, from their interquartile range, which single slow steps do not widen."""
    values = sorted(row[key] for row in rows)
    if len(values) < 2:
        return 0.0
    low, high = (values[round(share * (len(values) - 1))] for share in (0.25, 0.75))
    return MEDIAN_COST * (high - low) / 1.349 / math.sqrt(len(values))


def _memory(rows_a: Sequence[Any], rows_b: Sequence[Any]) -> Difference:
    a, b = (float(max(size for row in rows for size in row["peak_memory_bytes"])) for rows in (rows_a, rows_b))
    pct = 100 * (b - a) / a if a else None
    return Difference("peak_memory_bytes", NAMES["peak_memory_bytes"], a, b, pct, 0.0, a != b)
