"""Clocks of different hosts on one scale: comparing them, and their drift until the next comparison."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.profiling.clock import compare_with_rank_0
from piper_hpc.profiling.offset import ClockOffset
from tests.processes import run_ranks


@given(
    started_s=st.floats(-1e6, 1e6),
    drift=st.floats(-1e-3, 1e-3),
    compared_s=st.tuples(st.floats(0.0, 1e3), st.floats(1.0, 1e3)),
    later_s=st.floats(-1e3, 1e4),
)
def test_a_clock_that_drifts_steadily_is_recovered_at_any_time(
    started_s: float, drift: float, compared_s: tuple[float, float], later_s: float
) -> None:
    """Rank 0's clock shows t; this one started at another time and runs faster or slower by `drift`."""

    def here(t: float) -> float:
        return started_s + (1 + drift) * t

    first, second = here(compared_s[0]), here(sum(compared_s))
    line = ClockOffset(first, compared_s[0] - first).then(second, sum(compared_s) - second)
    t = sum(compared_s) + later_s
    assert here(t) + line.at(here(t)) == pytest.approx(t, abs=1e-5)


def test_one_comparison_holds_until_the_next() -> None:
    assert ClockOffset(5.0, 2.0).at(100.0) == 2.0


def test_an_error_of_a_comparison_grows_threefold_at_most_until_the_next() -> None:
    error_s, every_s = 1e-4, 30.0
    worst = ClockOffset(0.0, -error_s).then(every_s, error_s)
    assert worst.at(every_s / 2) == pytest.approx(0.0) and worst.at(2 * every_s) == pytest.approx(3 * error_s)


def compared(error_s: float, hosts: list[str]) -> tuple[float, float]:
    """(offset, how far its time is from this rank's clock) where clocks are wrong by `error_s` a rank."""
    host = hosts[dist.get_rank()]
    wrong_s = hosts.index(host) * error_s  # ranks of one host share its clock
    found = compare_with_rank_0(torch.device("cpu"), now=lambda: time.monotonic() + wrong_s, host=host)
    return found.offset_s, abs(time.monotonic() + wrong_s - found.at_s)


@pytest.mark.processes
@pytest.mark.alone
def test_clocks_of_other_hosts_are_aligned_with_rank_0() -> None:
    found = run_ranks(4, compared, 100.0, ["a", "b", "c", "b"])
    assert [offset for offset, _ in found] == pytest.approx([0.0, -100.0, -200.0, -100.0], abs=5e-3)
    assert max(age for _, age in found) < 5.0, "each offset is of a moment of this rank's own clock"


@pytest.mark.processes
def test_clock_shared_by_ranks_of_one_host_needs_no_correction() -> None:
    assert [offset for offset, _ in run_ranks(2, compared, 100.0, ["a", "a"])] == [0.0, 0.0]
