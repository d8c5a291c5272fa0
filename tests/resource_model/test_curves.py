"""Reading curves: exact at the points, monotone between them, honest beyond them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model.eager.cost import Cost, total
from piper_hpc.resource_model.eager.curves import Curves, seconds_at
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.spec import Calibration, Curve
from tests.resource_model.clusters import calibration, cluster, line


def curve(work: list[float], seconds: list[float]) -> Curve:
    return Curve("gemm", "flops", tuple(work), tuple(seconds), (0.1,) * len(work))


@st.composite
def curves(draw: st.DrawFn) -> Curve:
    size = draw(st.integers(1, 6))
    work = sorted(draw(st.lists(st.floats(1.0, 1e9), min_size=size, max_size=size, unique=True)))
    seconds = sorted(draw(st.lists(st.floats(1e-7, 10.0), min_size=size, max_size=size)))
    return curve(work, seconds)


@given(curves())
def test_a_curve_goes_through_its_points(given_curve: Curve) -> None:
    for work, seconds in zip(given_curve.work, given_curve.seconds, strict=True):
        assert seconds_at(given_curve, work) == pytest.approx(seconds, rel=1e-9)


@given(curves(), st.floats(0.1, 1e11), st.floats(1.0, 100.0))
def test_more_work_never_takes_less_time(given_curve: Curve, work: float, factor: float) -> None:
    assert seconds_at(given_curve, work * factor) >= seconds_at(given_curve, work) * (1 - 1e-9)


def test_between_two_points_the_line_is_straight_on_logarithmic_axes() -> None:
    assert seconds_at(curve([1e3, 1e5], [1e-4, 1e-2]), 1e4) == pytest.approx(1e-3)


def test_beyond_the_last_point_latency_is_not_paid_again() -> None:
    """20 ms and 50 MB/s: what 8 and 64 KiB took says what 26 MB take, not 400 times as much as 64 KiB."""

    def line(work: float) -> float:
        return 0.02 + work / 50e6

    assert seconds_at(curve([8192, 65536], [line(8192), line(65536)]), 26e6) == pytest.approx(line(26e6))
    assert seconds_at(curve([1e5], [2e-3]), 1e6) == pytest.approx(2e-2), "a point alone has a rate alone"


def test_noise_between_the_last_points_makes_nothing_free() -> None:
    assert seconds_at(curve([1e3, 1e5], [2.1e-3, 2e-3]), 1e6) == pytest.approx(2e-3 + 9e5 * 0.01 * 2e-8)


def test_below_the_first_point_pure_latency_stays() -> None:
    assert seconds_at(curve([1e3, 1e4], [1e-4, 1e-4]), 1.0) == pytest.approx(1e-4)


def grouped(*rates: tuple[int, float]) -> Curves:
    """Grouped products that run at a rate in FLOP/s for each number of rows an expert."""
    made = {f"grouped_gemm/{rows}": curve([1e6, 1e9], [1e6 / rate, 1e9 / rate]) for rows, rate in rates}
    return Curves(cluster(Calibration("made up", "2026-01-01T00:00:00+00:00", 50e9, made)), 4)


@pytest.mark.parametrize(("rows_per_expert", "rate"), [(16, 2e9), (32, 4e9), (64, 8e9), (4, 2e9), (1000, 8e9)])
def test_few_rows_an_expert_are_priced_as_they_were_measured(rows_per_expert: float, rate: float) -> None:
    cost = grouped((16, 2e9), (64, 8e9)).grouped_product(1e8, rows_per_expert)
    assert cost.seconds == pytest.approx(1e8 / rate)
    assert cost.half_width <= 0.1 * cost.seconds * (1 + 1e-9), "no wider than the two that it lies between"


def test_the_nearest_numbers_of_rows_are_asked() -> None:
    read = grouped((512, 8e9), (16, 2e9), (64, 4e9))
    assert read.grouped_product(1e8, 32).curves == ["grouped_gemm/16", "grouped_gemm/64"]
    assert read.grouped_product(1e8, 64).curves == ["grouped_gemm/64"]
    assert grouped().grouped_product(1e8, 64).seconds > 0, "a GEMM stands in"


def test_stretching_a_curve_is_recorded() -> None:
    read = Curves(cluster(), 4)
    read.operation("gemm", 1e6)
    assert read.extrapolated == {}
    read.operation("gemm", 1e13)
    read.operation("gemm", 2e13)
    assert read.extrapolated == {"gemm": (1e13, 2e13)}


@pytest.mark.parametrize(
    ("missing", "stand_in"),
    [
        ("grouped_gemm", "gemm"),
        ("attention_forward", "gemm"),
        ("attention_backward", "attention_forward"),
        ("elementwise", "adamw"),
        ("adamw", "elementwise"),
        ("activation", "elementwise"),
        ("norm", "elementwise"),
        ("router", "elementwise"),
        ("dispatch_rows", "elementwise"),
        ("combine_rows", "elementwise"),
        ("gather", "elementwise"),
        ("sort", "router"),
    ],
)
def test_the_nearest_curve_stands_in_and_the_notes_say_so(missing: str, stand_in: str) -> None:
    read = Curves(cluster(calibration(missing)), 4)
    cost = read.operation(missing, 1e6)
    assert cost.seconds > 0
    assert cost.curves == [stand_in]
    assert any(note.startswith(f"{missing}: not measured; {stand_in}") for note in read.notes)


def test_an_unknown_cost_is_zero_and_said_to_be() -> None:
    read = Curves(cluster(calibration("elementwise", "adamw")), 4)
    assert read.operation("elementwise", 1e6) == Cost()
    assert any("elementwise: not measured" in note for note in read.notes)


def test_without_a_gemm_its_flops_run_at_the_peak() -> None:
    read = Curves(cluster(Calibration("data sheet", "", 1e12)), 4)
    assert read.operation("gemm", 1e9).seconds == pytest.approx(1e-3)


def test_a_cluster_of_which_nothing_is_known_is_refused() -> None:
    read = Curves(cluster(Calibration("data sheet", "", 0.0)), 4)
    with pytest.raises(ResourceModelError, match=r"'made-up' has no peak_flops.*task=microbench cluster=made-up"):
        read.operation("gemm", 1e9)


def test_launches_cost_the_rate_of_the_longest_chain() -> None:
    read = Curves(cluster(), 4)
    longest = line("host_op")
    assert read.launches(10).seconds == pytest.approx(10 * longest.seconds[-1] / longest.work[-1])


def test_one_curve_errs_in_one_direction_and_several_partly_cancel() -> None:
    same = total([Cost(1.0, {"gemm": 0.1}), Cost(1.0, {"gemm": 0.1})])
    different = total([Cost(1.0, {"gemm": 0.1}), Cost(1.0, {"p2p/node": 0.1})])
    assert same.half_width == pytest.approx(0.2)
    assert different.half_width == pytest.approx(math.hypot(0.1, 0.1))
    low, high = same.interval
    assert (low, high) == pytest.approx((2 / 1.1, 2 * 1.1))
