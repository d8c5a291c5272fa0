"""Lookup of measured curves: log-log interpolation, substitutes for missing curves, and a note of extrapolation."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.spec import Calibration, ClusterSpec, Curve

ADAMW_VALUES = 7
"""Values that AdamW moves per parameter: reads weight, gradient and two moments, writes weight and moments."""

NORM_PASSES, NORM_VALUES, NORM_FORWARD_SHARE = 15, 31 / 15, 7 / 31
"""RMSNorm and its backward, composed, as streaming passes; values that each moves per number; the forward's share."""

ROUTER_PASSES, ROUTER_VALUES = 4, 2.5
"""Softmax, top-k and the backward of both as streaming passes, and the values that each moves per logit."""

DISPATCH_VALUES, COMBINE_VALUES = 6, 12
"""Numbers moved by a dispatch, or a combine, and its backward for each number of the copies that it permutes, of two
choices: a gather each way and the sum of a token's copies; to weigh them twice as much again."""

ATTENTION_BACKWARD_FLOPS = 2.5
"""FLOPs of the attention backward over its forward: five products, one of them recomputed, against two (arXiv
2307.08691)."""


LEAST_SLOPE = 0.01
"""Of a curve's end over its mean: noise between two points must not make more work free."""


def seconds_at(curve: Curve, work: float) -> float:
    """Seconds for `work`: a straight line on log-log axes between the measured points.

    Beyond the last point every unit more takes what it took between the last two (Hockney's latency and rate), but no
    less than LEAST_SLOPE of the mean until there: small messages take latency, which larger ones do not pay again.
    Below the first, the first segment is continued (its slope held between 0, pure latency, and 1, constant rate).
    """
    points, seconds = curve.work, curve.seconds
    if work <= 0:
        return 0.0
    if work >= points[-1]:
        mean = seconds[-1] / points[-1]
        slope = (seconds[-1] - seconds[-2]) / (points[-1] - points[-2]) if len(points) > 1 else mean
        return seconds[-1] + (work - points[-1]) * max(slope, LEAST_SLOPE * mean)
    right = max(1, bisect_right(points, work)) if len(points) > 1 else 0
    if right == 0:
        return seconds[0] * work / points[0]
    slope = math.log(seconds[right] / seconds[right - 1]) / math.log(points[right] / points[right - 1])
    if work < points[0]:
        slope = min(1.0, max(0.0, slope))
    return seconds[right - 1] * math.exp(slope * math.log(work / points[right - 1]))


def spread_at(curve: Curve, work: float) -> float:
    """The larger spread of the two points around `work`, dimensionless; 0 where none is known."""
    if not curve.spread:
        return 0.0
    right = bisect_right(curve.work, work)
    return max(curve.spread[max(0, right - 1) : right + 1])


@dataclass(frozen=True)
class _StandIn:
    """A curve that substitutes for a missing one: seconds = seconds_factor * curve(work_factor * work)."""

    curve: str
    why: str
    work_factor: float = 1.0
    seconds_factor: float = 1.0


class Curves:
    """The measured operators of one cluster, as one prediction uses them.

    It remembers what the prediction must say of itself: `notes` (curves that were missing, and what stood in) and
    `extrapolated` (curve -> smallest and largest work asked for, where that left the measured range).
    """

    def __init__(self, cluster: ClusterSpec, bytes_per_value: int) -> None:
        self.cluster = cluster
        self.calibration: Calibration = cluster.calibration
        self.quota = None if cluster.devices_share_cores else cluster.calibration.quota
        self.notes: dict[str, None] = {}
        self.extrapolated: dict[str, tuple[float, float]] = {}
        self._sizes: dict[str, list[int]] = {}
        self._stand_ins = {
            "grouped_gemm": _StandIn("gemm", "one GEMM of the same FLOPs"),
            "attention_forward": _StandIn("gemm", "a GEMM of the same FLOPs"),
            "attention_backward": _StandIn(
                "attention_forward",
                f"{ATTENTION_BACKWARD_FLOPS:g} times the forward",
                seconds_factor=ATTENTION_BACKWARD_FLOPS,
            ),
            "elementwise": _StandIn(
                "adamw", f"{ADAMW_VALUES} values per parameter", work_factor=1 / (ADAMW_VALUES * bytes_per_value)
            ),
            "activation": _StandIn("elementwise", "a streaming operation of the same bytes"),
            "norm": _StandIn(
                "elementwise",
                f"{NORM_PASSES} streaming operations",
                work_factor=NORM_VALUES / 2,
                seconds_factor=NORM_PASSES,
            ),
            "router": _StandIn(
                "elementwise",
                f"{ROUTER_PASSES} streaming operations",
                work_factor=ROUTER_VALUES * bytes_per_value,
                seconds_factor=ROUTER_PASSES,
            ),
            "dispatch_rows": _StandIn("elementwise", "the bytes that it streams", work_factor=DISPATCH_VALUES),
            "combine_rows": _StandIn("elementwise", "the bytes that it streams", work_factor=COMBINE_VALUES),
            "gather": _StandIn("elementwise", "a streaming operation of the same bytes"),
            "sort": _StandIn("router", "the choice among as many values"),
            "adamw": _StandIn(
                "elementwise", f"{ADAMW_VALUES} values per parameter", work_factor=ADAMW_VALUES * bytes_per_value
            ),
        }

    def __contains__(self, name: str) -> bool:
        return name in self.calibration.curves

    def sizes(self, prefix: str) -> list[int]:
        """Sizes of the groups that `prefix`, for example `all_reduce/node/`, was measured in."""
        if prefix not in self._sizes:
            names = [name for name in self.calibration.curves if name.startswith(prefix)]
            self._sizes[prefix] = [int(name.removeprefix(prefix)) for name in names]
        return self._sizes[prefix]

    @property
    def peak_flops(self) -> float:
        """The denominator of MFU, FLOP/s of one rank; ResourceModelError where the cluster names none."""
        if self.calibration.peak_flops <= 0:
            raise ResourceModelError(
                f"cluster '{self.cluster.name}' has no peak_flops: nothing was measured and no data sheet is given. "
                f"Measure it with `python -m piper_hpc.launch task=microbench cluster={self.cluster.name}`, "
                "or give cluster.data_sheet.peak_flops"
            )
        return self.calibration.peak_flops

    def note(self, text: str) -> None:
        """Say something once that a reader of the prediction must know."""
        self.notes[text] = None

    def measured(self, name: str, work: float) -> Cost:
        """Seconds of one operation from the curve `name`, which must exist."""
        curve = self.calibration.curves[name]
        outside = not curve.work[0] <= work <= curve.work[-1]
        if work > 0 and outside and self.calibration.measured:  # a data sheet's line holds everywhere
            low, high = self.extrapolated.get(name, (work, work))
            self.extrapolated[name] = (min(low, work), max(high, work))
        seconds = seconds_at(curve, work)
        return Cost(seconds, {name: seconds * spread_at(curve, work)})

    def operation(self, name: str, work: float, count: float = 1) -> Cost:
        """Seconds of `count` equal operations of `work` each, from the curve or the nearest thing that was measured."""
        return self._operation(name, work, frozenset()) * count

    def _operation(self, name: str, work: float, visited: frozenset[str]) -> Cost:
        if name in self:
            return self.measured(name, work)
        if name == "gemm":
            self.note("gemm: not measured; its FLOPs run at peak_flops")
            return Cost(work / self.peak_flops, {"peak_flops": 0.0})
        stand_in = self._stand_ins.get(name)
        if stand_in is None or stand_in.curve in visited:
            self.note(f"{name}: not measured, and nothing near it was; counted as 0 s")
            return Cost()
        self.note(f"{name}: not measured; {stand_in.curve} stands in ({stand_in.why})")
        cost = self._operation(stand_in.curve, work * stand_in.work_factor, visited | {name})
        return cost * stand_in.seconds_factor

    def grouped_product(self, flops: float, rows_per_expert: float) -> Cost:
        """Seconds of one product of every expert's rows with its weights, `flops` in all.

        A straight line on log-log axes between the numbers of rows an expert that were measured on either side; beyond
        the last, as there.
        """
        measured = sorted(self.sizes("grouped_gemm/"))
        if not measured:
            return self.operation("grouped_gemm", flops)
        within = min(max(rows_per_expert, measured[0]), measured[-1])
        fewer = max(rows for rows in measured if rows <= within)
        more = min(rows for rows in measured if rows >= within)
        slow, fast = (self.measured(f"grouped_gemm/{rows}", flops) for rows in (fewer, more))
        if fewer == more or flops <= 0:
            return slow
        share = math.log(within / fewer) / math.log(more / fewer)
        seconds = slow.seconds ** (1 - share) * fast.seconds**share
        return slow * ((1 - share) * seconds / slow.seconds) + fast * (share * seconds / fast.seconds)

    def launches(self, operations: float) -> Cost:
        """Seconds to launch `operations` small operations: `host_op` at the rate of its longest measured chain."""
        if "host_op" not in self:
            return self.operation("host_op", operations)
        chain = self.calibration.curves["host_op"].work[-1]
        return self.measured("host_op", chain) * (operations / chain)
