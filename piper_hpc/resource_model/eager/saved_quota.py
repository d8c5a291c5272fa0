"""What a rank under a CPU quota saves while it waits, which no device does.

The kernel makes a quota whole again at the start of every period, whatever was left of the last: a token bucket. A rank
that is busy all the time computes for `share` of a period and stands still for the rest. One that has waited finds some
or all of a quota, and computes at the whole core's speed until that is spent. How much shorter that makes what follows
depends on where in a period the wait begins, which is anywhere while the rank computes, and on how long it lasts: the
mean is taken over both, waits being as likely of any length up to twice their mean. Nothing is fitted, and `python -m
piper_hpc.testbed.saved_quota` measures it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from piper_hpc.resource_model.eager.compute import ModuleCost
from piper_hpc.resource_model.eager.cost import Cost
from piper_hpc.spec import CpuQuota

POINTS = 24
"""Of each of the two that the mean is taken over."""


@lru_cache(maxsize=4096)
def left_of(quota: CpuQuota, wait_s: float, busy_s: float) -> float:
    """The share that is left of `busy_s` seconds of compute after a wait."""
    if busy_s <= 0 or wait_s <= 0:
        return 1.0
    middles = (np.arange(POINTS) + 0.5) / POINTS
    begun_s = quota.share * quota.period_s * middles[:, None]
    after, without = (_taken(quota, begun_s, waited_s, busy_s) for waited_s in (2 * wait_s * middles, np.zeros(1)))
    return min(1.0, float(after.mean() / without.mean()))


def _taken(quota: CpuQuota, begun_s: np.ndarray, waited_s: np.ndarray, busy_s: float) -> np.ndarray:
    """Seconds that `busy_s` of compute take [begun, waited], where a rank has computed for begun_s of a period, [begun,
    1], and then waited, [waited]."""
    period_s, granted_s, needed_s = quota.period_s, quota.share * quota.period_s, quota.share * busy_s
    since_s = begun_s + waited_s
    left_s = np.where(since_s < period_s, granted_s - begun_s, granted_s)
    until_next_s = period_s - since_s % period_s
    # What can be computed before the next period; then a quota in each, of which the last is not waited out.
    rest_s = needed_s - np.minimum(left_s, until_next_s)
    whole = np.maximum(0.0, np.ceil(rest_s / granted_s) - 1)
    return np.where(rest_s <= 0, needed_s, until_next_s + whole * period_s + rest_s - whole * granted_s)


@dataclass(frozen=True)
class Waits:
    """Where a layer's mean rank stands still for rows and for late ranks, in seconds.

    dispatched, combined: before experts and before attention in forward; before attention and before experts in
    backward. received_s: what a rank then computes to receive rows. counts_s: in the exchange of counts before a
    dispatch; planned_s: what a dispatch computes between that and the wait for its rows.
    """

    dispatched: ModuleCost
    combined: ModuleCost
    received_s: float
    counts_s: float
    planned_s: float


def after_waits(quota: CpuQuota, modules: Mapping[str, ModuleCost], waits: Waits) -> dict[str, ModuleCost]:
    """The terms of a layer whose ranks save quota while they wait, before its experts and before attention and router,
    forward and backward, and for counts. Autograd's overhead is halved between both waits of the backward.

    The mean rank's waits count, those for late ranks too: who is late at one exchange, as its quota was spent, begins
    the next stretch with a whole one, and others are late then.
    """
    half_overhead_s = modules["other_s"].backward.seconds / 2
    changed, overheads = dict(modules), []
    # A dispatch comes before experts, a combine before the next attention; in the backward the other way round.
    for terms, came_by, came, went_by, went in (
        (("expert_s",), "dispatch_s", waits.dispatched, "combine_s", waits.combined),
        (("attention_s", "router_s"), "combine_s", waits.combined, "dispatch_s", waits.dispatched),
    ):
        forward_s, backward_s = (
            sum(getattr(modules[term], way).seconds for term in terms) for way in ("forward", "backward")
        )
        forward = left_of(quota, came.forward.seconds, waits.received_s + forward_s)
        backward = left_of(quota, went.backward.seconds, waits.received_s + backward_s + half_overhead_s)
        changed |= {term: _times(modules[term], forward, backward) for term in terms}
        changed[came_by] = _less(changed[came_by], forward_s=(1 - forward) * waits.received_s)
        changed[went_by] = _less(changed[went_by], backward_s=(1 - backward) * waits.received_s)
        overheads.append(backward)
    planned = left_of(quota, waits.counts_s, waits.planned_s)
    changed["dispatch_s"] = _less(changed["dispatch_s"], forward_s=(1 - planned) * waits.planned_s)
    return changed | {"other_s": _times(modules["other_s"], 1.0, sum(overheads) / len(overheads))}


def _times(cost: ModuleCost, forward: float, backward: float) -> ModuleCost:
    """A module of whose forward and backward these shares are left."""
    return ModuleCost(cost.forward * forward, cost.backward * backward, cost.weight * backward)


def _less(cost: ModuleCost, forward_s: float = 0.0, backward_s: float = 0.0) -> ModuleCost:
    """A module whose forward and backward are so many seconds shorter."""

    def left(whole: Cost, seconds: float) -> float:
        return max(0.0, 1 - seconds / whole.seconds) if whole.seconds else 1.0

    return _times(cost, left(cost.forward, forward_s), left(cost.backward, backward_s))
