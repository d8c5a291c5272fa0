"""The document of `published --json`, and its tables for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from analysis.validation.published.judge import Judged
from analysis.validation.published.metrics import COMPONENT, MEMORY
from analysis.validation.published.score import one_per_run, out_of_memory, ranking, statistics

SCHEMA_VERSION = 1


def document(judged: Sequence[Judged], source: str) -> dict[str, Any]:
    """The whole answer: every row, and the summary."""
    return {
        "schema_version": SCHEMA_VERSION,
        "source": source,
        "rows": [row.document() for row in judged],
        "summary": summary(judged),
    }


def summary(judged: Sequence[Judged]) -> dict[str, Any]:
    """Statistics by model family and by metric. `time` has one row of a run, so that no run counts twice."""
    times = one_per_run(judged)
    families = sorted({row.family for row in judged})
    return {
        "runs": len({id(row.answer.run) for row in judged}),
        "rows": len(judged),
        "predicted": sum(row.error_pct is not None for row in judged),
        "refused": sum(row.error_pct is None for row in judged),
        "fitted_rows": [row.row.row_id for row in judged if row.fitted],
        "time": statistics(times),
        "time_stated": statistics([row for row in times if row.answer.run.fully_stated]),
        "memory": statistics(_of(judged, MEMORY)),
        "component": statistics(_of(judged, COMPONENT)),
        "sources": _grouped(times, _source),
        "machines": _grouped(times, _source_and_machine),
        "models": {name: _family(judged, times, name) for name in families},
        "metrics": {
            metric: statistics([row for row in judged if row.row.cells["metric"] == metric])
            for metric in sorted({row.row.cells["metric"] for row in judged})
        },
        "ranking": ranking(judged),
        "oom": out_of_memory(judged),
        "reasons": dict(Counter(row.refused for row in judged if row.error_pct is None).most_common()),
    }


def _source(row: Judged) -> str:
    """The publication, and the system or method where it compares several."""
    run, request = row.answer.run, row.answer.request
    method = f", {request.method}" if request and request.method else ""
    return f"{run.document}{method}"


def _source_and_machine(row: Judged) -> str:
    """The source, and the GPU and machine as the row names them: one system may have been run on several."""
    return f"{_source(row)}, {row.row.cells['gpu'] or 'gpu not stated'}"


def _grouped(rows: Sequence[Judged], name: Callable[[Judged], str]) -> dict[str, Any]:
    names = dict.fromkeys(map(name, rows))
    return {each: statistics([row for row in rows if name(row) == each]) for each in names}


def _of(judged: Sequence[Judged], kind: str) -> list[Judged]:
    return [row for row in judged if row.row.quantity.kind == kind]


def _family(judged: Sequence[Judged], times: Sequence[Judged], name: str) -> dict[str, Any]:
    own = [row for row in judged if row.family == name]
    return {
        "time": statistics([row for row in times if row.family == name]),
        "memory": statistics(_of(own, MEMORY)),
        "component": statistics(_of(own, COMPONENT)),
        "metrics": {
            metric: statistics([row for row in own if row.row.cells["metric"] == metric])
            for metric in sorted({row.row.cells["metric"] for row in own})
        },
        "oom": out_of_memory(own),
    }


COLUMNS = ("unseen", "refused", "mean", "median", "max", "bias", "base-\nline", "in\n90 %", "fitted", "their\nmean")


def show(answer: dict[str, Any], console: Console) -> None:
    """Tables by family and by metric, ranking, OOM, the fitted rows, and why rows were refused."""
    found = answer["summary"]
    models = found["models"]
    console.print(_table("one time error a run, by model family", {name: models[name]["time"] for name in models}))
    console.print(_table("the same, by publication, method and machine", found["machines"]))
    console.print(_table("peak memory, by model family", {name: models[name]["memory"] for name in models}))
    console.print(_table("parts of a step and of memory, by family", {n: models[n]["component"] for n in models}))
    everything = found["metrics"] | {
        "all runs, time": found["time"],
        "runs that state their layout, time": found["time_stated"],
        "all rows, memory": found["memory"],
    }
    console.print(_table("every row, by metric", everything))
    console.print(
        "absolute errors in percent over unseen rows, which no constant saw; a refused row that states tp, pp, ep, "
        "batch, sequence and GPUs counts as 100 %; bias: signed mean of predicted rows; baseline: mean error of one "
        "constant efficiency, the median of the same rows (memory: states alone at 16 B a parameter); in 90 %: share "
        "of times that lie in their intervals; fitted: rows that a constant saw, and their mean error, apart\n",
        style="dim",
    )
    order, oom = found["ranking"], found["oom"]
    if order["sets"]:
        console.print(
            f"ranking: Kendall tau {order['kendall_tau']:.2f}, top-1 regret {order['top1_regret_pct']:.1f} % "
            f"over {order['sets']} sets of one model on as many GPUs ({order['runs']} runs)",
            highlight=False,
        )
    console.print(
        f"out of memory: {oom['measured']} of {oom['runs']} runs, {oom['predicted']} predicted, {oom['both']} both; "
        f"precision {_ratio(oom['precision'])}, recall {_ratio(oom['recall'])}",
        highlight=False,
    )
    names = found["fitted_rows"]
    console.print(f"fitted rows ({len(names)}): {', '.join(names) or 'none'}", highlight=False)
    if found["reasons"]:
        reasons = Table(title="refused", title_justify="left", title_style="bold", box=None, show_header=False)
        for reason, count in found["reasons"].items():
            reasons.add_row(str(count), reason)
        console.print(reasons)


def _table(title: str, sets: dict[str, dict[str, Any]]) -> Table:
    shown = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim")
    shown.pad_edge, shown.collapse_padding = False, True
    shown.add_column("", overflow="fold")
    for column in COLUMNS:
        shown.add_column(column, justify="right", no_wrap=True)
    for name, found in sets.items():
        if not found["rows"]:
            continue
        unseen, seen = found["unseen"], found["seen"]
        shown.add_row(
            name,
            str(unseen["rows"]),
            str(unseen["refused"] or ""),
            *(_percent(unseen[f"{kind}_abs_error_pct"]) for kind in ("mean", "median", "max")),
            "" if unseen["bias_pct"] is None else f"{unseen['bias_pct']:+.1f}",
            _percent(unseen["baseline"]["mean_abs_error_pct"]),
            "" if found["covered"] is None else f"{100 * found['covered']:.0f} %",
            str(seen["rows"] or ""),
            _percent(seen["mean_abs_error_pct"]),
        )
    return shown


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _ratio(value: float | None) -> str:
    return "not defined" if value is None else f"{value:.2f}"
