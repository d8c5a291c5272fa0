"""Runs that a document prints twice: the same columns, system and rate in another table."""

from __future__ import annotations

from collections.abc import Iterable

from analysis.validation.published.flops import bf16_peak, noted_peak
from analysis.validation.published.metrics import FLOPS_GPU, MFU
from analysis.validation.published.names import device
from analysis.validation.published.request import Refused
from analysis.validation.published.rows import PublishedRun

SAME = (
    *("model", "layers", "seq", "global_batch", "micro_batch", "gpu", "num_gpus", "tp", "pp", "vpp", "ep", "dp", "cp"),
    *("precision", "recompute"),
)
SAME_NOTES = ("method", "system", "schedule", "network")
EQUAL = 0.002
"""Printed rates of one run differ by their last digit only."""


def repeats(runs: Iterable[PublishedRun]) -> dict[str, str]:
    """Row id -> id of the earlier row that prints the same: MFU times its peak and TFLOP/s of a GPU within 0.2 %."""
    seen: dict[tuple[str, ...], list[tuple[str, float]]] = {}
    found: dict[str, str] = {}
    for run in runs:
        alike = tuple(run.cells[name] for name in SAME) + tuple(run.note(name) for name in SAME_NOTES)
        earlier = seen.setdefault((run.document, *alike), [])
        own = [(row.row_id, rate) for row in run.rows if (rate := _flops(run, row.quantity.name, row.value))]
        for row_id, rate in own:
            twin = next((other for other, printed in earlier if abs(rate / printed - 1) < EQUAL), None)
            if twin:
                found[row_id] = twin
        earlier += own
    return found


def _flops(run: PublishedRun, name: str, value: float | None) -> float | None:
    if value is None or name not in (MFU, FLOPS_GPU):
        return None
    if name == FLOPS_GPU:
        return value
    try:
        peak = noted_peak(run) or bf16_peak(device(run.cells["gpu"])[0])
    except Refused:
        return None
    return value * peak if peak else None
