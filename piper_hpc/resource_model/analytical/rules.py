"""What makes degrees of parallelism a layout: one set of rules for a layout that is asked for and for a search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from piper_hpc.resource_model import schedule
from piper_hpc.spec import ALGORITHMS, ClusterSpec, Layout, ModelSpec, Recompute, Workload

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Case:
    """What the rules of a stage look at: degrees as equally long arrays, [combinations]."""

    model: ModelSpec
    workload: Workload
    stage_ranks: int
    micro_batch: Ints
    tp: Ints
    cp: Ints
    ep: Ints
    etp: Ints

    @property
    def sequences(self) -> Ints:
        """Sequences of one micro-batch on all ranks of a stage."""
        return self.micro_batch * (self.stage_ranks // (self.tp * self.cp))


RULES: dict[str, Callable[[Case], Mask]] = {
    "Eq 7: ep * etp and tp * cp must divide the ranks of a stage": lambda case: (
        (case.stage_ranks % (case.ep * case.etp) == 0) & (case.stage_ranks % (case.tp * case.cp) == 0)
    ),
    "Eq 8: ep must divide the experts": lambda case: case.model.experts % case.ep == 0,
    "tp must divide the heads, and the kv heads or be a multiple of them": lambda case: (
        (case.model.heads % case.tp == 0)
        & ((case.model.kv_heads % case.tp == 0) | (case.tp % case.model.kv_heads == 0))
    ),
    "tp must divide the dense feed-forwards, etp that of an expert": lambda case: (
        (case.model.dense_ffn % case.tp == 0)
        & (case.model.dense_width % case.tp == 0)
        & (case.model.expert_ffn % case.etp == 0)
    ),
    "tp * cp must divide the sequence": lambda case: case.workload.sequence % (case.tp * case.cp) == 0,
    "batch: micro_batch * data-parallel ranks must divide the global batch": lambda case: (
        case.workload.global_batch % case.sequences == 0
    ),
}
"""What makes degrees a layout, by the words that say so (equations of arXiv 2605.05049)."""


def problem(model: ModelSpec, cluster: ClusterSpec, layout: Layout, workload: Workload) -> str | None:
    """The first rule that a layout breaks, in words; None where it is one that a step can be predicted of."""
    if layout.zero not in range(4) or layout.micro_batch < 1:
        return f"zero={layout.zero} must be 0, 1, 2 or 3, and micro_batch={layout.micro_batch} at least 1"
    if layout.all_to_all not in (*ALGORITHMS, "auto"):
        return f"all_to_all={layout.all_to_all}: must be one of {', '.join((*ALGORITHMS, 'auto'))}"
    try:
        Recompute.parse(layout.recompute)
    except ValueError as error:
        return str(error)
    if layout.ranks > cluster.ranks:
        return f"layout: pp * dp * ep * etp = {layout.ranks} ranks, cluster '{cluster.name}' has {cluster.ranks}"
    if layout.pp * layout.vpp > model.layers:
        return f"Eq 9: pp * vpp = {layout.pp * layout.vpp} must not exceed model.layers={model.layers}"
    if not model.experts and (layout.ep, layout.etp) != (1, layout.tp) and (layout.ep, layout.etp) != (1, 1):
        return f"ep={layout.ep}, etp={layout.etp}: a dense model has no experts to spread; use ep=1 etp=1"
    degrees = {name: np.array([getattr(layout, name)]) for name in ("micro_batch", "tp", "cp", "ep", "etp")}
    case = Case(model, workload, layout.ranks // layout.pp, **degrees)
    for rule, holds in RULES.items():
        if not holds(case).all():
            named = " ".join(f"{name}={values[0]}" for name, values in degrees.items())
            return f"{rule}; got {named} on {case.stage_ranks} ranks a stage"
    return schedule.problem(layout.schedule, layout.pp, layout.vpp, layout.micro_batches(workload.global_batch))
