"""Texts of a report: summary sentence, key figures, what the prediction rests on, and provenance."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from piper_hpc.report import network
from piper_hpc.report.load import Row as MetricsRow
from piper_hpc.report.load import steady, timed, typical
from piper_hpc.report.table import Row
from piper_hpc.report.units import count, percent, seconds, size
from piper_hpc.runs import RunFolder

NOT_TIMED = "terms were not timed (train.timing=false)"


def summary_sentence(run: RunFolder, rows: Sequence[MetricsRow]) -> str:
    """One sentence: what was trained, where, and how it was laid out."""
    config, prediction = run.config(), run.prediction()
    model, cluster, layout = config["model"], config["cluster"], layout_of(run, rows)
    parameters, name = "", model["name"] or Path(model["path"]).parent.name  # of a config.json, its folder
    if prediction:
        facts = prediction["model"]
        active = count(facts["active_parameters"])
        parameters = f" ({count(facts['parameters'])} parameters, {active} active per token)"
    degrees = " x ".join(f"{key.upper()}={layout[key]}" for key in ("pp", "ep", "dp"))
    nodes = run.manifest().get("job", {}).get("nodes", [])
    where = f"{cluster['name']}, {len(nodes) or cluster['nodes']} node{'s' if len(nodes) > 1 else ''}"
    return (
        f"{len(rows)} steps of {name}{parameters} on {where}: "
        f"{degrees} over {len(rows[0]['peak_memory_bytes'])} ranks, {layout['schedule']}."
    )


def key_figures(rows: Sequence[MetricsRow], table: Sequence[Row]) -> list[tuple[str, str]]:
    """The figures to see first: value and name."""
    steady_rows = steady(rows)
    by_key = {row.key: row for row in table}
    error = by_key["step_time_s"].error_pct
    return [
        (f"{rows[0]['loss']:.2f} → {rows[-1]['loss']:.2f}", "loss, nats per token"),
        (seconds(by_key["step_time_s"].measured), "step time, median"),
        ("none" if error is None else percent(error), "predicted step time off by"),
        (" / ".join(f"{rate:,.0f}" for rate, _ in _rates(steady_rows)), f"tokens per second, {_of(steady_rows)}"),
        (" / ".join(_percent(mfu) for _, mfu in _rates(steady_rows)), f"MFU of measured peak, {_of(steady_rows)}"),
        (size(by_key["peak_memory_bytes"].measured), "peak memory of a rank"),
    ]


def rates_line(rows: Sequence[MetricsRow]) -> str:
    """Tokens a second and MFU of a typical step, and by the wall clock where it was recorded."""
    (rate, mfu), *wall = _rates(steady(rows))
    said = [f"of the step: {rate:,.0f} tokens/s, MFU {_percent(mfu)}"]
    said += [
        f"wall clock, with records and checkpoints: {rate:,.0f} tokens/s, MFU {_percent(mfu)}" for rate, mfu in wall
    ]
    return "; ".join(said)


def _rates(steady_rows: Sequence[MetricsRow]) -> list[tuple[float, float]]:
    """(tokens a second, MFU) of the step, and then by the wall clock where rows have it."""
    kinds = ("", "wall_") if "wall_s" in steady_rows[0] else ("",)
    return [(typical(steady_rows, f"{kind}tokens_per_s"), typical(steady_rows, f"{kind}mfu")) for kind in kinds]


def _of(steady_rows: Sequence[MetricsRow]) -> str:
    return "step / wall clock" if "wall_s" in steady_rows[0] else "step"


def _percent(mfu: float) -> str:
    return f"{100 * mfu:.1f} %" if mfu else "unknown"


def selected_algorithms(run: RunFolder) -> list[str]:
    """What all_to_all=auto took in a run and why: a line for all expert groups that took the same."""
    lines: dict[str, int] = {}
    for each in run.manifest().get("job", {}).get("all_to_all", ()):
        chunks = f" in {each['chunks']} chunks" if each["chunks"] else ""
        lines["; ".join([f"{each['algorithm']}{chunks}, {each['why']}", *each["notes"]])] = len(each["ranks"])
    return [f"all_to_all=auto took, for groups of {ranks} ranks, {line}" for line, ranks in lines.items()]


def measurement_note(rows: Sequence[MetricsRow]) -> str:
    """How measured values were taken."""
    where = "on the critical stage" if timed(rows) else NOT_TIMED
    return f"Measured: median over {len(steady(rows))} steady of {len(rows)} steps, {where}."


def calibration_note(prediction: dict[str, Any] | None) -> str:
    """What the prediction rests on."""
    if prediction is None:
        return "There is no prediction: the cluster had neither measurements nor a data sheet."
    calibration = prediction["calibration"]
    if not calibration.get("measured", True):
        return "The prediction rests on data sheets, not on measurements."
    return f"The prediction rests on operators measured {calibration.get('measured_at', '')} ({calibration['source']})."


def layout_of(run: RunFolder, rows: Sequence[MetricsRow]) -> dict[str, Any]:
    """The layout as it ran: a `dp` that the configuration left open follows from the number of ranks."""
    layout = {key: value for key, value in run.config()["parallelism"].items() if key != "auto"}
    if layout["dp"] is None:
        layout["dp"] = len(rows[0]["peak_memory_bytes"]) // (layout["pp"] * layout["ep"] * layout["etp"])
    return layout


def provenance(run: RunFolder, rows: Sequence[MetricsRow]) -> dict[str, dict[str, str]]:
    """Headed lists of facts: the run, and what it ran on."""
    manifest, config = run.manifest(), run.config()
    job, train = manifest.get("job", {}), config["train"]
    commit = (manifest.get("git") or {}).get("commit", "unknown")
    versions = manifest.get("versions", {}) | job.get("versions", {})
    peak = job.get("peak_flops")
    what = {
        "command": shlex.join(manifest.get("command", [])),
        "created": manifest.get("created"),
        "user": f"{manifest.get('user')} on {manifest.get('host')}",
        "commit": commit + (", with local changes" if (manifest.get("git") or {}).get("dirty") else ""),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "seed": train["seed"],
        "batch": f"{train['global_batch']} sequences of {train['sequence']} tokens, {train['dtype']}",
    }
    where = {
        "cluster": config["cluster"]["name"],
        "nodes": ", ".join(job.get("nodes", [])),
        "job": job.get("id"),
        "device": job.get("device"),
        "network": "; ".join([network.line(run).removeprefix("network: "), *network.warnings(run)]),
        "layout": ", ".join(f"{key} {value}" for key, value in layout_of(run, rows).items()),
        "peak rate": f"{count(peak, 'FLOP/s')}, {job.get('peak_flops_source', '')}" if peak else None,
        "FLOP convention": job.get("flop_convention"),
    }
    return {
        title: {name: str(value) for name, value in facts.items() if value not in (None, "")}
        for title, facts in (("The run", what), ("What it ran on", where))
    }
