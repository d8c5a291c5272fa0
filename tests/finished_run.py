"""A finished run of known numbers: ten steps, two of them warm-up, with a prediction and its provenance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from piper_hpc.runs import RunFolder, Status
from piper_hpc.spec import TERMS

TERM_S = 0.01
"""Measured seconds of every term in a steady step; `other_s` takes half of it."""
STEP_S = TERM_S * (len(TERMS) - 1) + TERM_S / 2


def metrics_row(step: int, slow: float = 1.0, **changes: Any) -> dict[str, Any]:
    """One row of metrics; `slow` multiplies every time."""
    terms = {term: slow * (TERM_S / 2 if term == "other_s" else TERM_S) for term in TERMS}
    return {
        "step": step,
        "warmup": step < 2,
        "loss": 5.5 / (1 + step),
        "tokens": 4096,
        "step_time_s": slow * STEP_S,
        "tokens_per_s": 4096 / (slow * STEP_S),
        "flops_per_rank_per_s": 1e9,
        "mfu": 0.25,
        "peak_memory_bytes": [1000, 2000, 1500, 1200],
        "rss_bytes": [10_000] * 4,
        "expert_load": [1.1, 1.5],
        "exchange": {"payload_bytes": {"node": 3 << 20, "rack": 2 << 20, "system": 0}, "exposed_s": 2 * slow * TERM_S},
        "critical_stage": 0,
        **terms,
        "stages": [terms, terms],
        **changes,
    }


def untimed(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it is with train.timing=false."""
    exchange = {key: value for key, value in row["exchange"].items() if key != "exposed_s"}
    left_out = {*TERMS, "critical_stage", "stages"}
    return {key: value for key, value in row.items() if key not in left_out} | {"exchange": exchange}


def prediction() -> dict[str, Any]:
    """A prediction that is right for every term but `expert_s`, which it doubles."""
    terms = {term: TERM_S for term in TERMS} | {"expert_s": 2 * TERM_S, "other_s": 0.0}
    return {
        "layout": {"pp": 2, "ep": 2, "dp": 1},
        "step_time_s": sum(terms.values()),
        "tokens_per_s": 4096 / sum(terms.values()),
        "mfu": 0.2,
        "peak_memory_bytes": [1800, 1900, 1500, 1500],
        "bubble_fraction": 0.1,
        "terms": terms,
        "hidden": {},
        "intervals": {"attention_s": [0.9 * TERM_S, 1.1 * TERM_S], "expert_s": [1.5 * TERM_S, 2.5 * TERM_S]},
        "memory": {},
        "model": {"parameters": 1_840_000, "active_parameters": 661_000},
        "calibration": {"source": "measurements of <local>", "measured": True, "measured_at": "2026-01-01"},
        "notes": ["p2p: extrapolated"],
        "exchange": {"stages": [], "payload_bytes": {"node": 3 << 20, "rack": 1 << 20, "system": 0}},
    }


def make_run(root: Path, rows: list[dict[str, Any]], predicted: dict[str, Any] | None) -> RunFolder:
    """A completed run with these rows."""
    run = RunFolder.create(root)
    layout = {"pp": 2, "ep": 2, "etp": 1, "dp": None, "schedule": "1f1b", "auto": False}
    train = {"seed": 7, "global_batch": 32, "sequence": 128, "dtype": "float32"}
    run.write_config(
        yaml.safe_dump(
            {
                "model": {"name": "tiny", "vocab": 256},
                "parallelism": layout,
                "cluster": {"name": "local", "nodes": 1},
                "train": train,
            }
        )
    )
    run.write_manifest(
        {
            "command": ["launch", "data.path=a b"],
            "git": {"commit": "c0ffee", "dirty": True},
            "job": {"nodes": ["n1"], "peak_flops": 7.1e10, "peak_flops_source": "best GEMM rate"},
        }
    )
    for row in rows:
        run.append_metrics(row, row.pop("attempt", 0))
    if predicted is not None:
        run.write_prediction(predicted)
    run.write_status(Status("completed"))
    return run


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Two slow warm-up steps and eight steady ones."""
    rows = [metrics_row(step, slow=10.0 if step < 2 else 1.0) for step in range(10)]
    return make_run(tmp_path / "runs", rows, prediction())
