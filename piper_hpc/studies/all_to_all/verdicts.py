"""Acceptance criteria of the all-to-all benchmark, each with the value that was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from piper_hpc.resource_model.eager.all_to_all import LEAST_ROWS, fit_all_to_all_model, judge, select_measured
from piper_hpc.studies.all_to_all.rows import MeasuredCell, TimedVariant, machines

WIRE_SHARE = 0.80
"""A cell counts only where flat reaches so much of what the links allow: else their shaping flatters the others."""
FASTER_THAN_FLAT = {2: 2.0, 4: 1.8}
"""By ranks of a node, at top_k 8."""
SHARE_OF_BYTES_SAVED = 0.85
FASTER_THAN_MPI = 1.5
PAYLOAD_ERROR = 0.02
LINK_MATCHES = (0.98, 1.15)
"""Bytes on the link over payload bytes of an MPI row that did go over the links: headers and barriers beside it."""
AUTO_OF_BEST, SMALL_SPREAD = 0.95, 0.05
MODEL_ERROR = 0.15
FOLDS = 4


SHOWN = "shown"
"""`Verdict.bar` of a figure that is reported without a criterion."""


@dataclass(frozen=True)
class Verdict:
    """One criterion (`bar`) and the measured value. met: None where the cell does not count, which `note` explains."""

    what: str
    where: str
    value: str
    bar: str
    met: bool | None
    note: str = ""


def verdicts(measured: Sequence[MeasuredCell]) -> list[Verdict]:
    """Every bar that the cells of a run can be held to."""
    large = [cell for cell in measured if cell.logical_bytes >= 2**20 and len(cell.variants) > 1]
    largest = {cell.machine: max(c.logical_bytes for c in measured if c.machine == cell.machine) for cell in measured}
    full = [cell for cell in large if cell.workload in ("W0", "W2")]
    found: list[Verdict] = []
    for cell in full:
        if cell.top_k == 8 and cell.logical_bytes == largest[cell.machine] and not _racks(cell):
            found += [*_against_flat(cell), *_against_mpi(cell)]
    for cell in full:
        if (cell.top_k != 8 or cell.logical_bytes == largest[cell.machine]) and not _racks(cell):
            found += _against_bytes(cell)
    for cell in full:
        found += _payload(cell)
    for cell in full:
        found += _third_level(cell) if _racks(cell) else _phases(cell)
    for machine in machines(measured):
        own = [cell for cell in measured if cell.machine == machine]
        found += [*_auto(machine, own), *_cost_model(machine, own)]
    wrong = [f"{cell.machine} {cell.label} {timed.name}" for cell in measured for timed in cell.variants
             if not timed.row["correct"]]  # fmt: skip
    total = sum(len(cell.variants) for cell in measured)
    found.append(Verdict("results equal flat's", "all cells", f"{total - len(wrong)} of {total}", "all", not wrong,
                         ", ".join(wrong)))  # fmt: skip
    return found


def flat_share(cell: MeasuredCell) -> float | None:
    """Least time of flat by its links over its measured time (0 to 1); None where flat was not measured."""
    flat = cell.of("flat")
    return None if flat is None else flat.wire_s / flat.median_s


def refused(timed: TimedVariant) -> str | None:
    """Why a row of MPI cannot be taken: its bytes did not go over the links."""
    overhead = timed.link_overhead
    low, high = LINK_MATCHES
    if overhead is None or low <= overhead <= high:
        return None if overhead is not None else "link counters were not read"
    return f"links carried {overhead:.2f} of its bytes"


def _racks(cell: MeasuredCell) -> bool:
    return bool(cell.variants[0].row["group"]["racks"] > 1)


def _where(cell: MeasuredCell) -> str:
    return f"{cell.machine} {cell.label}"


def _ratio(ratio: tuple[float, float, float]) -> str:
    median, p5, p95 = ratio
    return f"{median:.2f}x [{p5:.2f}, {p95:.2f}]"


def _reaches_wire_share(cell: MeasuredCell) -> tuple[bool, str]:
    share = flat_share(cell) or 0.0
    return share >= WIRE_SHARE, f"flat at {100 * share:.0f} % of the wire"


def _against_flat(cell: MeasuredCell) -> Iterable[Verdict]:
    """Against flat over gloo; and where that leaves links idle that MPI's own flat exchange fills, against MPI's by the
    same bar: then it is not the shaping that holds flat back, and MPI's is the harder one to beat."""
    flat, dedup, mpi = cell.of("flat"), cell.of("halo_dedup"), cell.of("mpi")
    group = cell.variants[0].row["group"]
    bar = FASTER_THAN_FLAT.get(group["ranks"] // group["nodes"])
    if flat is None or dedup is None or bar is None:
        return
    ratio = dedup.faster_than(flat)
    counts, note = _reaches_wire_share(cell)
    yield Verdict("deduplicated HALO over flat", _where(cell), _ratio(ratio), f">= {bar:.1f}x",
                  ratio[0] >= bar if counts else None, f"{dedup.name}; {note}")  # fmt: skip
    share = mpi.wire_s / mpi.median_s if mpi is not None and refused(mpi) is None else 0.0
    if mpi is not None and not counts and share >= WIRE_SHARE:
        ratio = dedup.faster_than(mpi)
        yield Verdict("the same over MPI's flat exchange", _where(cell), _ratio(ratio), f">= {bar:.1f}x",
                      ratio[0] >= bar, f"{dedup.name}; MPI at {100 * share:.0f} % of the wire")  # fmt: skip


def _against_mpi(cell: MeasuredCell) -> Iterable[Verdict]:
    mpi, dedup = cell.of("mpi"), cell.of("halo_dedup")
    if dedup is None:
        return
    if mpi is None:
        yield Verdict("deduplicated HALO over MPI_Alltoallv", _where(cell), "", f">= {FASTER_THAN_MPI}x", None,
                      "MPI took no part: pip install mpi4py mpich")  # fmt: skip
        return
    ratio, reason = dedup.faster_than(mpi), refused(mpi)
    note = reason or f"links carried {mpi.link_overhead or 0:.3f} of MPI's payload"
    yield Verdict("deduplicated HALO over MPI_Alltoallv", _where(cell), _ratio(ratio), f">= {FASTER_THAN_MPI}x",
                  None if reason else ratio[0] >= FASTER_THAN_MPI, note)  # fmt: skip


def _against_bytes(cell: MeasuredCell) -> Iterable[Verdict]:
    """The gain against the bytes between nodes that are left, 1/r; beside it what the busiest link would allow."""
    flat, dedup = cell.of("flat"), cell.of("halo_dedup")
    if flat is None or dedup is None or not dedup.payload_bytes:
        return
    most, busiest = flat.payload_bytes / dedup.payload_bytes, flat.wire_s / dedup.wire_s
    ratio = dedup.faster_than(flat)
    counts, note = _reaches_wire_share(cell)
    yield Verdict("share of 1/r reached", _where(cell), f"{ratio[0] / most:.2f} (1/r {most:.2f})",
                  f">= {SHARE_OF_BYTES_SAVED}", ratio[0] >= SHARE_OF_BYTES_SAVED * most if counts else None,
                  f"{dedup.name} {_ratio(ratio)}; busiest link {busiest:.2f}; {note}")  # fmt: skip


def _payload(cell: MeasuredCell) -> Iterable[Verdict]:
    dedup = cell.of("halo_dedup")
    if dedup is None or dedup.row["formula_bytes"] is None or cell.logical_bytes < 2**21:
        return
    error = dedup.payload_bytes / dedup.row["formula_bytes"] - 1
    link = dedup.link_overhead
    yield Verdict(
        "payload between nodes against r(N)", _where(cell), f"{100 * error:+.2f} %",
        f"within {100 * PAYLOAD_ERROR:.0f} %", abs(error) <= PAYLOAD_ERROR,
        f"{dedup.payload_bytes / 1e6:.3f} MB a rank, metadata {dedup.metadata_bytes / 1e6:.3f} MB"
        + (f", links carried {link:.3f} of the payload" if link else ""),
    )  # fmt: skip


def _third_level(cell: MeasuredCell) -> Iterable[Verdict]:
    share = flat_share(cell) or 0.0
    for three, two in (("halo3_dedup", "halo_dedup"), ("halo3", "halo")):
        third, second = cell.of(three), cell.of(two)
        if third is None or second is None:
            continue
        ratio = third.faster_than(second)
        rates = third.row["link_bytes_per_s"]
        note = (
            f"flat at {100 * share:.0f} % of the wire; uplink at {rates['rack'] / rates['nic']:.2g} of a node's link; "
            f"wire limit {third.wire_s:.2f} s against {second.wire_s:.2f} s"
        )
        if three == "halo3":
            note += "; without deduplication the uplink carries the same bytes, and rows are sent once more"
        judged = three == "halo3_dedup" and share >= WIRE_SHARE
        yield Verdict(f"{three} over {two}", _where(cell), _ratio(ratio), "> 1x" if three == "halo3_dedup" else SHOWN,
                      ratio[0] > 1 if judged else None, note)  # fmt: skip


def _phases(cell: MeasuredCell) -> Iterable[Verdict]:
    """What the order of the phases does, of the variant that was timed in each."""
    for other in (timed for timed in cell.variants if not timed.default_overlap):
        name, _, order = other.name.rpartition(" ")
        default_overlap = cell.named(name)
        if default_overlap is not None:
            ratio, note = default_overlap.faster_than(other), "orders of the phases of Algorithm 1"
            yield Verdict(f"{name}: V2 over {order}", _where(cell), _ratio(ratio), SHOWN, None, note)


@dataclass(frozen=True)
class AutoChoice:
    """What `auto` takes in one cell by its calibration half. of_best: the held-out seconds of the best over its own;
    spread: the larger of the two; met: whether it is good enough."""

    cell: MeasuredCell
    chosen: str
    best: str
    of_best: float
    spread: float

    @property
    def met(self) -> bool:
        """Nearly the best, or within the spread where that is larger."""
        return self.of_best >= (AUTO_OF_BEST if self.spread < SMALL_SPREAD else 1 - self.spread)


def auto_choices(cells: Sequence[MeasuredCell]) -> list[AutoChoice]:
    """The choice in every cell of one machine that has at least two algorithms of the family."""
    table = [timed.all_to_all(held_out=False) for cell in cells for timed in cell.family]
    found = []
    for cell in cells:
        if len({timed.algorithm for timed in cell.family}) < 2:
            continue
        selection = select_measured(table, cell.family[0].all_to_all(held_out=True))
        taken = [t for t in cell.family if selection and t.config == selection.config]
        if not taken:
            continue
        best = min(cell.family, key=lambda timed: timed.row["held_out_s"])
        of_best = best.row["held_out_s"] / taken[0].row["held_out_s"]
        found.append(AutoChoice(cell, taken[0].name, best.name, of_best, max(best.spread, taken[0].spread)))
    return found


def _auto(machine: str, cells: Sequence[MeasuredCell]) -> Iterable[Verdict]:
    choices = auto_choices(cells)
    if not choices:
        return
    good = sum(choice.met for choice in choices)
    worst = min(choices, key=lambda choice: choice.of_best)
    missed = ", ".join(
        f"{c.cell.label} {c.cell.logical_bytes} B: {c.chosen} {c.of_best:.2f} of {c.best} (spread {c.spread:.2f})"
        for c in choices if not c.met
    )  # fmt: skip
    yield Verdict("auto, on iterations held out", machine, f"good in {good} of {len(choices)} cells",
                  f">= {AUTO_OF_BEST} of the best, or within the spread", good == len(choices),
                  missed or f"worst {worst.of_best:.2f} of the best")  # fmt: skip


def _cost_model(machine: str, cells: Sequence[MeasuredCell]) -> Iterable[Verdict]:
    """4-fold cross-validation over (algorithm, size): each is predicted by a fit that saw no workload of it."""
    names = list(dict.fromkeys(timed.algorithm for cell in cells for timed in cell.family))
    sizes = sorted({cell.logical_bytes for cell in cells})
    rows = [(timed, (names.index(timed.algorithm) + sizes.index(cell.logical_bytes)) % FOLDS)
            for cell in cells for timed in cell.family]  # fmt: skip
    errors: list[float] = []
    for fold in range(FOLDS):
        seen = [timed.all_to_all(held_out=False) for timed, at in rows if at != fold]
        unseen = [timed.all_to_all(held_out=True) for timed, at in rows if at == fold]
        if len(seen) < LEAST_ROWS or not unseen:
            return
        errors += judge(fit_all_to_all_model(seen), unseen).errors
    mean = float(np.abs(errors).mean())
    yield Verdict("cost model on unseen (algorithm, size)", machine, f"mean error {100 * mean:.1f} %",
                  f"<= {100 * MODEL_ERROR:.0f} %", mean <= MODEL_ERROR,
                  f"{len(errors)} cells, median {100 * float(np.median(np.abs(errors))):.1f} %, "
                  f"worst {100 * float(np.abs(errors).max()):.0f} %")  # fmt: skip
