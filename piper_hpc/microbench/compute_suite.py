"""The compute suites: a model's own matrices and attention over token counts, each cell within its time box."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from piper_hpc.microbench.attention_block import attention_block_backward, attention_block_forward
from piper_hpc.microbench.box import TimeBox
from piper_hpc.microbench.model_shapes import ComputeCell, attention_cells, gemm_cells, grouped_gemm_cells
from piper_hpc.microbench.operator import Operator, ring
from piper_hpc.microbench.operators import build
from piper_hpc.microbench.rows import Row, RowWriter, percentiles
from piper_hpc.microbench.timing import time_compute
from piper_hpc.spec import ModelSpec

SUITES = ("gemm", "grouped_gemm", "attention")
MEMORY_SHARE = 0.25
"""Of a rank's memory, for the tensors of one cell: checks keep copies of them in float64."""

_BLOCKS: dict[str, Callable[..., Operator]] = {
    "attention_block_forward": attention_block_forward,
    "attention_block_backward": attention_block_backward,
}
_PILOT = {"m": 256, "n": 256, "k": 256}


def cells_of(suites: Sequence[str], model: ModelSpec, ranks: int) -> list[ComputeCell]:
    """The cells of these suites, each once."""
    found: list[ComputeCell] = []
    if "gemm" in suites:
        found += gemm_cells(model)
    if "grouped_gemm" in suites:
        found += grouped_gemm_cells(model, ranks)
    if "attention" in suites:
        found += attention_cells(model)
    return list({cell.key: cell for cell in found}.values())


@dataclass
class ComputeSuite:
    """One pass over compute cells on all ranks at once; rank 0's caller is given the rows.

    cell_s: seconds a cell may take; memory_bytes: of one rank; done: cell -> row of what need not be measured again.
    `left_out`: cell -> why, afterwards.
    """

    row_writer: RowWriter
    device: torch.device
    cell_s: float
    memory_bytes: float
    done: Mapping[str, Row] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def run(self, suites: Sequence[str], model: ModelSpec) -> None:
        """Measure the matrices and attention of `model`, each part in ascending order of work."""
        cells = cells_of(suites, model, self.row_writer.team.world)
        series: dict[tuple[str, str], list[ComputeCell]] = defaultdict(list)
        for cell in cells:
            series[cell.operator, cell.part].append(cell)
        missing = any(cell.key not in self.done for cell in cells)
        rate = self._pilot_rate() if missing else 0.0
        for of_part in series.values() if missing else ():
            box = TimeBox(self.cell_s, rate)
            for cell in sorted(of_part, key=lambda cell: cell.flops):
                if cell.key in self.done:
                    box.add(cell.flops, float(self.done[cell.key]["max_s"]))
                else:
                    self._measure(cell, box)

    def _pilot_rate(self) -> float:
        """FLOP/s of a small product on all ranks at once, from which a first cell's time is estimated."""
        operator = build("gemm", _PILOT, self.device, self.row_writer.dtype)
        timing = time_compute(operator.call, self.row_writer.team, self.cell_s / 4)
        return operator.work / float(timing.samples.max())

    def _measure(self, cell: ComputeCell, box: TimeBox) -> None:
        held = cell.values * torch.empty((), dtype=self.row_writer.dtype).element_size()
        if held > MEMORY_SHARE * self.memory_bytes:
            self.left_out[cell.key] = (
                f"its tensors are {held / 2**20:,.0f} MiB, more than a quarter of a rank's "
                f"{self.memory_bytes / 2**20:,.0f} MiB"
            )
            return
        if not box.fits(cell.flops):
            self.left_out[cell.key] = box.reason(cell.flops)
            return
        operator = self._build(cell)
        # What building, checking and the pilots take is not known; a third of the box is left to them.
        timing = time_compute(operator.call, self.row_writer.team, self.cell_s * 2 / 3)
        box.add(cell.flops, float(timing.samples.max()))
        self.row_writer.write(
            cell.operator,
            operator.work,
            operator.unit,
            cell.shape,
            timing,
            not operator.correct,
            range(self.row_writer.team.world),
            **percentiles(timing),
            cell=cell.key,
            part=cell.part,
            flops_per_s={
                "mean": operator.work / float(timing.samples.mean()),
                "median": operator.work / float(timing.statistics()["median_s"]),
                "max": operator.work / float(timing.samples.min()),
            },
        )

    def _build(self, cell: ComputeCell) -> Operator:
        if cell.operator in _BLOCKS:
            return ring(partial(_BLOCKS[cell.operator], self.device, self.row_writer.dtype, **cell.shape), self.device)
        return build(cell.operator, cell.shape, self.device, self.row_writer.dtype)
