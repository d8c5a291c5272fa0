"""What a rank under a CPU quota saves while it waits, which no device does.

The kernel makes a quota whole again at the start of every period, whatever was left of the last. A rank that waits
therefore saves up to a period's, and computes at the whole core's speed until that is spent. Of x seconds that a busy
rank takes for some compute the part 1 - share is waiting for its quota, so that a wait of w seconds before it saves

    min(w, period, (1 - share) x)

(a token bucket in the fluid limit; `python -m piper_hpc.testbed.saved_quota` measures it, nothing here is fitted).
"""

from __future__ import annotations

from piper_hpc.resource_model.eager.compute import ModuleCost
from piper_hpc.spec import CpuQuota


def left_of(quota: CpuQuota | None, wait_s: float, busy_s: float) -> float:
    """The share that is left of `busy_s` seconds of compute after a wait; 1 without a quota."""
    if quota is None or busy_s <= 0:
        return 1.0
    return 1 - min(wait_s, quota.period_s, (1 - quota.share) * busy_s) / busy_s


def shorter(cost: ModuleCost, forward: float, backward: float) -> ModuleCost:
    """A module of whose forward and backward these shares are left."""
    return ModuleCost(cost.forward * forward, cost.backward * backward, cost.weight * backward)
