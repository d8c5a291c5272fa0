"""A sweep as its pools leave it: points of every state, with known numbers."""

from __future__ import annotations

import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from piper_hpc.runs import Failure, RunFolder, Status
from piper_hpc.runs.sweeps import Claim, SweepFolder, SweepPoint
from tests.finished_run import STEP_S, make_run, metrics_row, prediction

LIMIT_BYTES = 2500
OWNER = {"scheduler": "local", "id": "1", "started_s": 0.0, "host": "elsewhere", "environment": {}}
"""Of another machine: it is taken to be alive."""


def made_sweep(root: Path, kind: str = "grid", name: str = "20261129-201530-abcd") -> SweepFolder:
    """Twelve points over pp and all_to_all on two nodes: seven completed, one each of failed (oom), hanging, running,
    pending and refused. Point i's step takes 1 + i / 10 of STEP_S."""
    sweep = SweepFolder.create(root, name)
    axes = [
        {"parallelism.pp": pp, "parallelism.all_to_all": name}
        for pp, name in product((1, 2, 4, 8), ("flat", "halo_dedup", "<b>padded</b>"))
    ]
    points, now = [], time.time()
    for index, values in enumerate(axes):
        if index == 11:
            errors = [{"key": "parallelism.pp", "value": 8, "rule": "must divide the layers", "works": "pp=4"}]
            points.append(SweepPoint(index, values, "refused", errors=errors))
            continue
        ended = index < 9
        steps = 10 if ended else 5 if index == 9 else 0
        slow = 1 + index / 10
        run = make_run(root, [metrics_row(step, slow=slow) for step in range(steps)], prediction())
        run.write_manifest(run.manifest() | {"sweep": {"name": sweep.name, "index": index, "axes": values}})
        ran: dict[str, Any] = {
            "run_id": run.run_id,
            "group": 0,
            "nodes": 2,
            "ranks": 4,
            "steps": 10,
            "step_time_s": prediction()["step_time_s"],
            "total_s": 36.0,
            "peak_bytes": 1900,
            "limit_bytes": LIMIT_BYTES,
            "identity": f"{index:016x}",
        }
        points.append(SweepPoint(index, values, "new", **ran))
        status = _status(run, index)
        run.write_status(status)
        if index < 10:
            began = OWNER | {"time_s": now - 90}
            assert sweep.claim(index, 0, began)
            if ended:
                end = {key: asdict(status)[key] for key in ("state", "failure_class", "reason")}
                sweep.end_claim(Claim(index, 0, began, {}), end | {"time_s": now})
    sweep.write_points(points)
    sweep.write_document(
        {
            "name": sweep.name,
            "created": "2026-11-29T20:15:30Z",
            "kind": kind,
            "command": ["launch.py", "-m", "parallelism.pp=1,2,4,8", "parallelism.all_to_all=flat,halo_dedup,padded"],
            "axes": list(axes[0]),
            "code": "c0ffee",
            "start_s": 900.0,
            "stall_s": 60.0,
            "tasks": None,
            "groups": [{"scheduler": "local", "cluster": "local", "nodes": 2, "ranks_per_node": 2, "placement": {}}],
            "predicted_node_hours": 0.22,
        }
    )
    return sweep


def _status(run: RunFolder, index: int) -> Status:
    if index == 7:
        run.write_failure(Failure(2, "oom", "CUDA out of memory", "Traceback", time.time()), 0)
        log = "\n".join(f"line {number}" for number in range(40))
        run.log(0, 2).write_text(log + "\ntorch.OutOfMemoryError: tried to allocate 2.00 GiB </script>\n")
        return Status("failed", 0, "oom", "rank 2: CUDA out of memory")
    if index == 8:
        return Status("failed", 0, "hang", "no sign of life for 61 s after step 9, of 60 s that it had")
    return Status({9: "running", 10: "pending"}.get(index, "completed"))


__all__ = ["LIMIT_BYTES", "STEP_S", "made_sweep"]
