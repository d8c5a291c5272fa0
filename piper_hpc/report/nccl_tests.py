"""`python -m piper_hpc.report.nccl_tests RUN`: measured exchanges in the JSON of nccl-tests, measurements_nccl.json.

One document holds the results of one operation there; here `results` has those of all, each with its `operation` beside
the keys of nccl-tests 2.19 (`-J`). Times are in us, bandwidths in GB/s, sizes in bytes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from piper_hpc.runs import RunFolder

FILE = "measurements_nccl.json"
TYPES = {"float32": "float", "bfloat16": "bfloat16", "float16": "half", "float64": "double"}


def document(run: RunFolder) -> dict[str, Any]:
    """The run's exchanges as nccl-tests would have written them; in-place results are not measured."""
    manifest = run.manifest()
    job = manifest.get("job", {})
    rows = [row for row in run.measurements() if "busbw_bytes_per_s" in row]
    busbw = [row["busbw_bytes_per_s"] / 1e9 for row in rows if row["correct"]]
    wrong = sum(int(row.get("wrong", not row["correct"])) for row in rows)
    return {
        "version": manifest.get("versions", {}).get("piper-hpc", ""),
        "start_time": manifest.get("created", ""),
        "end_time": run.status().updated,
        "args": manifest.get("command", []),
        "env": job.get("environment", {}),
        "nccl_version": job.get("library", ""),
        "config": {
            "nthreads": 1,
            "ngpus": 1,
            "minimum_bytes": int(min((row["work"] for row in rows), default=0)),
            "maximum_bytes": int(max((row["work"] for row in rows), default=0)),
            "step_factor": 4,
            "warmup_iters": max((row["warmup"] * row["iterations_per_sample"] for row in rows), default=0),
            "iterations": max((row["n"] * row["iterations_per_sample"] for row in rows), default=0),
            "aggregated_iterations": 1,
            "validation": 1,
            "graph": 0,
            "blocking_collectives": 1,
            "per_iter_timing": 1,
            "per_iter_skip": 0,
            "parallel_init": 0,
        },
        "devices": [
            {"rank": rank, "group": 0, "hostname": node, "device": rank, "device_info": job.get("device", "")}
            for rank, node in enumerate(job.get("node_of_rank", []))
        ],
        "results": [_result(row) for row in rows],
        "out_of_bounds": {"count": wrong, "okay": wrong == 0},
        "average_bus_bandwidth": {"bandwidth": statistics.fmean(busbw) if busbw else 0.0, "okay": "unchecked"},
        "errors": [row["refused"] for row in rows if row.get("refused")],
    }


def _result(row: dict[str, Any]) -> dict[str, Any]:
    summed = row["operator"].split("/")[0] in ("all_reduce", "reduce_scatter")
    samples = row.get("samples_s", [])
    per_iteration = {
        "min_us": 1e6 * row["min_s"],
        "max_us": 1e6 * row["max_s"],
        "avg_us": 1e6 * row["mean_s"],
        "stdev_us": 1e6 * statistics.pstdev(samples) if samples else None,
        "cv_pct": 100 * row["cv"] if "cv" in row else None,
        "times_us": [1e6 * seconds for seconds in samples],
        "skipped_iterations": 0,
    }
    return {
        "operation": row["operator"],
        "backend": row.get("backend", "torch"),
        "nodes": row["nodes"],
        "size": int(row["work"]),
        "count": row["shape"].get("elements"),
        "type": TYPES.get(row["dtype"], row["dtype"]),
        "redop": "sum" if summed else "none",
        "root": -1,
        "out_of_place": {
            "time": 1e6 * row["median_s"],
            "alg_bw": row["work"] / row["median_s"] / 1e9,
            "bus_bw": row["busbw_bytes_per_s"] / 1e9,
            "nwrong": int(row.get("wrong", not row["correct"])),
        },
        "out_of_place_per_iter": per_iteration,
        "in_place": None,
    }


def write(run: RunFolder) -> Path:
    """Write the document into the run's folder."""
    path = run.path / FILE
    path.write_text(json.dumps(document(run), indent=1) + "\n")
    return path


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m piper_hpc.report.nccl_tests", description=__doc__)
    parser.add_argument("run", type=Path, help="the folder of a run of task=microbench")
    run = RunFolder(parser.parse_args().run)
    if not run.measurements():
        print(f"{run.path}: no measurements.jsonl; give the folder of a run of task=microbench", file=sys.stderr)
        return 2
    print(write(run))
    return 0


if __name__ == "__main__":
    sys.exit(main())
