"""task=microbench: measure this cluster suite by suite, and keep what was found as its calibration."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from piper_hpc.cluster import calibration as calibrations
from piper_hpc.cluster import evidence
from piper_hpc.cluster.resume import finished
from piper_hpc.microbench import compute_suite, exchange_suite, links, suite
from piper_hpc.microbench.compute_suite import ComputeSuite
from piper_hpc.microbench.dispatch.suite import DispatchSuite
from piper_hpc.microbench.exchange_suite import Backend, ExchangeSuite
from piper_hpc.microbench.exchanges import TorchBackend
from piper_hpc.microbench.mpi_exchanges import MpiBackend
from piper_hpc.microbench.rows import Row, RowWriter
from piper_hpc.microbench.timing import Team
from piper_hpc.microbench.vendor_suite import VendorSuite
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.spec import Calibration, Layout, RankMap
from piper_hpc.tasks.context import Context


def run(context: Context) -> None:
    """Measure the suites of `task.suites`; rank 0 writes the rows and the calibration file."""
    suites = context.experiment.task.suites
    if suites == ["calibration"]:
        measure(context)
        return
    # One rank reads and tells: what an earlier attempt, or the run that is resumed, has measured.
    earlier: list[Row] = broadcast_from_rank0(context.run.measurements)
    rows = list(finished(earlier).values())

    def on_row(row: Row) -> None:
        rows.append(row)
        context.run.append_measurement(row, context.rank_env.attempt)

    if "calibration" in suites:
        _calibration_suite(context, on_row)
    facts = _wide_suites(context, suites, finished(earlier), on_row)
    broadcast_from_rank0(lambda: _update_calibration(context, rows, facts))


def _update_calibration(context: Context, rows: Sequence[Row], facts: Mapping[str, Any]) -> None:
    """Add the rows to the calibration, and say so in the manifest and the log."""
    added, words = _add(context, rows)
    mine = {(row.get("backend", "torch"), row["operator"]) for row in rows}
    fits = [asdict(fit) for fit in (added.fits if added else ()) if (fit.backend, fit.operator) in mine]
    manifest = context.run.manifest()
    context.run.write_manifest(manifest | {"job": manifest["job"] | facts | {"calibration": words, "fits": fits}})
    print(*words, sep="\n", flush=True)


def measure(context: Context) -> Calibration:
    """Run the calibration suite, record every row, fit, and cache. Every rank calls this and is given the fit."""
    rows: list[Row] = []

    def on_row(row: Row) -> None:
        rows.append(row)
        context.run.append_measurement(row, context.rank_env.attempt)

    _calibration_suite(context, on_row)
    return broadcast_from_rank0(lambda: _fit_and_save(context, rows, None))


def _calibration_suite(context: Context, on_row: Callable[[Row], None]) -> None:
    suite.run(
        ranks=_rank_map(context),
        device=context.device,
        dtype=_dtype(context),
        budget_s=context.experiment.task.budget_s,
        on_row=on_row,
        node_names=_nodes(context),
        rack_names=_racks(context),
        cores_per_rank=_cores_per_rank(context),
    )


def _cores_per_rank(context: Context) -> float | None:
    """Where ranks share cores without quotas, see timing.Team."""
    machine = context.machine
    return machine.cores / context.rank_env.ranks if machine.devices_share_cores else None


def _wide_suites(
    context: Context, suites: Sequence[str], done: Mapping[str, Row], on_row: Callable[[Row], None]
) -> dict[str, Any]:
    """Run the suites that are named beside the calibration's. Returns what the manifest says of them."""
    task, device, dtype = context.experiment.task, context.device, _dtype(context)
    row_writer = RowWriter(
        Team(device, _cores_per_rank(context)), _rank_map(context), dtype, on_row, _nodes(context), _racks(context)
    )
    compute = ComputeSuite(row_writer, device, task.cell_s, context.machine.memory_bytes, done)
    compute.run([name for name in suites if name in compute_suite.SUITES], context.experiment.model)
    left_out = compute.left_out
    facts: dict[str, Any] = {}
    exchanges = [name for name in suites if name in exchange_suite.SUITES]
    if exchanges:
        backend: Backend = TorchBackend(device, dtype)
        if task.backend == "mpi":
            backend = MpiBackend.start(device, dtype)
        counters: list[Any] = [None] * context.rank_env.ranks
        dist.all_gather_object(counters, links.link_counter(task.link_counters, device.type))
        counter = counters[context.rank_env.rank] if all(counters) else None
        facts = {"library": backend.library, "link_counter": counter.interface if counter else None}
        timed = ExchangeSuite(row_writer, backend, device, task.cell_s, done, counter)
        timed.run(exchanges)
        left_out = left_out | timed.left_out
        if task.vendor:
            sizes, patience_s = exchange_suite.sizes_of(device), context.experiment.cluster.comm_timeout_s / 2
            programs = VendorSuite(device, context.nodes, patience_s, on_row, done, counter)
            programs.run(exchanges, sizes[0], sizes[-1])
            left_out = left_out | programs.left_out
    if "dispatch" in suites:
        timeout = timedelta(seconds=context.experiment.cluster.comm_timeout_s)
        extra = {"nodes": list(_nodes(context))}
        family = DispatchSuite(_rank_map(context), device, task.cell_s, on_row, done, timeout, extra)
        family.run(context.experiment.model, context.experiment.train.dtype)
        left_out = left_out | family.left_out
    return facts | {"left_out": left_out}


def _add(context: Context, rows: Sequence[Row]) -> tuple[Calibration | None, list[str]]:
    """Add rows to the cluster's calibration. Returns it and what to say of it; None where there is none to add to."""
    machine, experiment = context.machine, context.experiment
    path = machine.calibration_file(experiment.cluster, experiment.train.dtype, context.run.path.parent)
    previous = calibrations.load(path) if path.is_file() else None
    if previous is None and not any(calibrations.is_calibration_gemm(row) for row in rows):
        return None, [f"no calibration to add to at {path}: run task.suites=[calibration,...] first"]
    right = [row for row in rows if row["correct"] or row.get("refused")]
    return _fit_and_save(context, right, previous), [f"calibration {'added to' if previous else 'written to'} {path}"]


def _fit_and_save(context: Context, rows: Sequence[Row], previous: Calibration | None) -> Calibration:
    """Fit and write the calibration file."""
    experiment, machine = context.experiment, context.machine
    dtype = experiment.train.dtype
    facts = evidence.facts(machine, experiment.cluster, dtype, _nodes(context))
    fit = calibrations.fit(
        rows,
        cluster=experiment.cluster.name,
        provenance=facts | {"run": context.run.run_id},
        previous=previous,
    )
    path = machine.calibration_file(experiment.cluster, dtype, context.run.path.parent)
    calibrations.save(fit, path)
    print(f"calibration of {len(rows)} rows written to {path}", flush=True)
    return fit


def _rank_map(context: Context) -> RankMap:
    """The suites ask only where ranks stand, so any layout of that many ranks will do."""
    return context.rank_map(Layout(dp=context.rank_env.ranks))


def _dtype(context: Context) -> torch.dtype:
    found: torch.dtype = getattr(torch, context.experiment.train.dtype)
    return found


def _nodes(context: Context) -> tuple[str, ...]:
    return tuple(dict.fromkeys(context.nodes))


def _racks(context: Context) -> tuple[str, ...]:
    """Names of leaf switches, by the index that rank maps give them."""
    return tuple("/".join(path) for path in dict.fromkeys(context.paths[0].values()))
