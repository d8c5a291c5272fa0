"""What a rank under a quota saves while it waits."""

from __future__ import annotations

import pytest

from piper_hpc.runtime import quota
from piper_hpc.testbed import saved_quota


@pytest.mark.alone
@pytest.mark.slow
@pytest.mark.skipif(not quota.writable(), reason="the cpu control group is not writable here")
def test_a_rank_that_waits_saves_quota_until_its_period_ends() -> None:
    """Why the testbed flatters layouts that wait often: docs/validation.md."""
    found = {(each.rest_s, each.work_s): each for each in saved_quota.measure(0.2, 10_000)}
    long, short = found[0.02, 0.016], found[0.003, 0.016]
    assert long.steady_s == pytest.approx(5 * long.work_s, rel=0.3)
    assert 0.004 < long.saved_s < 0.016 and short.saved_s < long.saved_s
