"""Rows for tests: a fully stated one, with changes, and a predictor of known numbers."""

from __future__ import annotations

import csv
from pathlib import Path

from analysis.validation.published.request import Outcome, Request
from analysis.validation.published.rows import COLUMNS, PublishedRow, PublishedRun

STATED = dict.fromkeys(COLUMNS, "") | {
    "row_id": "row-1",
    "source": "A. Author arXiv:2501.00001 Table 1",
    "model": "Mixtral-8x22B",
    "layers": "56",
    "hidden": "6144",
    "experts": "8",
    "topk": "2",
    "moe_ffn": "16384",
    "seq": "4096",
    "global_batch": "256",
    "micro_batch": "1",
    "gpu": "H100 SXM",
    "num_gpus": "128",
    "tp": "2",
    "pp": "8",
    "vpp": "1",
    "ep": "8",
    "cp": "1",
    "etp": "1",
    "zero_stage": "1",
    "precision": "BF16",
    "recompute": "none",
    "routing": "balanced",
    "metric": "step_time",
    "value": "10",
    "unit": "s",
}
"""A run that leaves nothing open."""


def run_of(**changes: str) -> PublishedRun:
    """A run of one row: `STATED` with changes."""
    return PublishedRun((PublishedRow.of(STATED | changes),))


def write(path: Path, *rows: dict[str, str], columns: tuple[str, ...] = COLUMNS) -> Path:
    """A CSV file of rows, each `STATED` with changes."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(STATED | row for row in rows)
    return path


def steady(request: Request) -> Outcome:
    """A device that does one sequence a second, holds 10 GiB, and has parts of a layer; fitted on `row-1`."""
    return Outcome(
        step_time_s=request.global_batch / request.gpus,
        peak_memory_bytes=10 * 2**30,
        capacity_bytes=80 * 2**30,
        components={"layer_forward_s": 0.01, "layer_backward_s": 0.02, "bubble_s": 1.0},
        fitted_on=("row-1",),
    )
