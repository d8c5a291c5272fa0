"""Seconds of one dispatch and combine by any all-to-all algorithm, from a few constants of the machine.

    T = (F^p + B^p)^(1/p)        F = call + collectives e + messages a + plans h
                                 B = 2 (max over hops t + s (all other hops)) + copied g
    t = max over links of (bytes b),    s = 1/c + (1 - 1/c) q

F is what the host and the latencies take, B what bytes take; e, a, h, b, c and copied are `CostTerms`. A hop sends to
all peers at once, so it lasts as long as its slowest link; rows are sent in c chunks, one behind the other, so that of
all hops but the longest only the share s shows: q = 0 where chunks overlap fully, 1 where they do not. F overlaps B in
part: p = 1 is one after the other. This project's own form, fitted to its measurements (`fit.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from piper_hpc.resource_model.eager.all_to_all.cost_terms import LINKS, CostTerms, cost_terms
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.numbers import Number
from piper_hpc.spec import TIERS, AllToAllCell

CALL_OPERATIONS, PLAN_OPERATIONS = 40, 60
"""Small operations of a dispatch and combine, and of planning one deduplicated level; where nothing was fitted."""

COPY_VALUES = 2.0
"""A copied byte is read once and written once."""


@dataclass(frozen=True)
class AllToAllModel:
    """The constants of the formula above; all seconds are of one rank while all ranks of the machine send.

    call_s: of every dispatch and combine; exchange_s: of a posted collective; message_s: of its message to one peer;
    plan_s: of a deduplicated level; node_, rack_, system_s_per_byte: of a rank's share of the links
    (see cost_terms.LINKS); copy_s_per_byte: packed and unpacked; serial: q, 0...1; beside: p, at least 1.
    spread: half the 90 % range of measured over predicted, as a ratio, of the cells it was fitted to; source: what
    it rests on; measured: whether on measured all-to-alls; intervals: 90 %, of each constant, empty where unknown.
    """

    call_s: float
    exchange_s: float
    message_s: float
    plan_s: float
    node_s_per_byte: float
    rack_s_per_byte: float
    system_s_per_byte: float
    copy_s_per_byte: float
    serial: float = 1.0
    beside: float = 1.0
    spread: float = 0.0
    source: str = ""
    measured: bool = False
    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def seconds(self, algorithm: str, cell: AllToAllCell, chunks: int = 0, *, with_plan: bool = True) -> float:
        """Seconds of a dispatch and its combine; chunks, with_plan: see `cost_terms`."""
        return float(self.seconds_of(cost_terms(algorithm, cell, chunks, with_plan=with_plan)))

    def seconds_of(self, terms: CostTerms) -> Number:
        """Seconds by the formula above, [...] as the terms."""
        rates = np.array([getattr(self, f"{link}_s_per_byte") for link in LINKS])
        hops = (terms.hops * rates).max(axis=-1)
        longest = hops.max(axis=-1)
        shown = 1 / terms.chunks + (1 - 1 / terms.chunks) * self.serial
        wire = longest + shown * (hops.sum(axis=-1) - longest + terms.local_bytes * self.node_s_per_byte)
        by_bytes = 2 * wire + terms.copied_bytes * self.copy_s_per_byte
        fixed = (
            self.call_s
            + terms.collectives * self.exchange_s
            + terms.messages * self.message_s
            + terms.plans * self.plan_s
        )
        return (fixed**self.beside + by_bytes**self.beside) ** (1 / self.beside)

    def document(self) -> dict[str, Any]:
        """As plain JSON types."""
        return {each.name: getattr(self, each.name) for each in fields(self) if each.name != "intervals"} | {
            "intervals": {name: list(ends) for name, ends in self.intervals.items()}
        }


def of_links(curves: Curves) -> AllToAllModel:
    """The model of a cluster on which no all-to-all algorithm was measured: one thing after the other, no overlap.

    Latency and rate of each link are those of the `p2p` curve of its tier (the next wider one stands in): seconds of
    its smallest message, and per byte of its largest. Raises ResourceModelError where no p2p curve is known.
    """
    rates, latency = [], 0.0
    for link in LINKS:
        place = TIERS.index(link)
        known = [tier for tier in (*TIERS[place:], *reversed(TIERS[:place])) if f"p2p/{tier}" in curves]
        if not known:
            raise ResourceModelError(
                f"cluster '{curves.cluster.name}': its calibration has no p2p curve, so no all-to-all can be "
                f"predicted. Measure it with `python -m piper_hpc.launch task=microbench cluster={curves.cluster.name}`"
            )
        curve = curves.calibration.curves[f"p2p/{known[0]}"]
        rates.append(curve.seconds[-1] / curve.work[-1])
        latency = max(latency, curve.seconds[0])
    copied = 2.0**20
    return AllToAllModel(
        call_s=curves.launches(CALL_OPERATIONS).seconds,
        exchange_s=0.0,
        message_s=latency,
        plan_s=curves.launches(PLAN_OPERATIONS).seconds,
        node_s_per_byte=rates[0],
        rack_s_per_byte=rates[1],
        system_s_per_byte=rates[2],
        copy_s_per_byte=curves.operation("elementwise", COPY_VALUES * copied).seconds / copied,
        source=f"links of {curves.calibration.source}",
    )
