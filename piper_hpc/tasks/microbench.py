"""task=microbench: measure the operators of this cluster and keep them as its calibration."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from piper_hpc.cluster import calibration as calibrations
from piper_hpc.microbench import suite
from piper_hpc.spec import Calibration, Layout
from piper_hpc.tasks.context import Context


def run(context: Context) -> None:
    """Measure within `task.budget_s`; rank 0 writes the rows and the calibration file."""
    measure(context)


def measure(context: Context) -> Calibration:
    """Measure, record every row, fit, and cache the calibration. Every rank calls this and is given the fit."""
    rows: list[dict[str, Any]] = []

    def on_row(row: dict[str, Any]) -> None:
        rows.append(row)
        context.run.append_measurement(row, context.place.attempt)

    # The suite asks only where ranks stand, so any layout of that many ranks will do.
    ranks = context.rank_map(Layout(dp=context.place.ranks))
    suite.run(
        ranks=ranks,
        device=context.device,
        dtype=getattr(torch, context.experiment.train.dtype),
        budget_s=context.experiment.task.budget_s,
        on_row=on_row,
        node_names=tuple(dict.fromkeys(context.nodes)),
    )
    fitted: list[Calibration | None] = [None]
    if context.is_first:
        cluster, machine = context.experiment.cluster, context.machine
        provenance = machine.fingerprint | {"run": context.run.run_id, "dtype": context.experiment.train.dtype}
        fit = calibrations.fit(rows, cluster=cluster.name, provenance=provenance)
        path = machine.calibration_file(cluster, context.experiment.train.dtype, context.run.path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrations.save(fit, path)
        print(f"calibration of {len(rows)} rows written to {path}", flush=True)
        fitted = [fit]
    dist.broadcast_object_list(fitted, src=0)
    assert fitted[0] is not None
    return fitted[0]
