"""What a calibration measured reaches the analytical engine, constant by constant, and nothing else moves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from piper_hpc.cli.plan import constants
from piper_hpc.cluster.measured import measured_link, with_measurements
from piper_hpc.planner import Axes
from piper_hpc.planner.engines import engine_of
from piper_hpc.resource_model import ResourceModelError, predict
from piper_hpc.spec import (
    EXECUTIONS,
    RECIPES,
    Calibration,
    ClusterSpec,
    Curve,
    Estimate,
    Fit,
    Layout,
    Prediction,
)
from tests.planner.machines import DEVICE, MOE, WORKLOAD, cluster

LATENCY_S, RATE = 2e-5, 5e9
SIZES = (1e3, 1e5, 1e7)
COMPUTE = ("attention_s", "router_s", "expert_s", "head_s", "host_s", "optimizer_s", "other_s")
MEGATRON = EXECUTIONS["megatron"]
ACROSS_NODES = Layout(ep=16, dp=1, micro_batch=1)
"""pp = dp = 1 and flat: 16 expert ranks on two nodes."""


def line(operator: str, unit: str, start_s: float, rate: float, work: tuple[float, ...] = SIZES) -> Curve:
    return Curve(operator, unit, work, tuple(start_s + each / rate for each in work), (0.1,) * len(work))


def calibration(rate: float = RATE, dtype: str = "bfloat16", **more: Curve) -> Calibration:
    curves = {f"p2p/{tier}": line(f"p2p/{tier}", "bytes", LATENCY_S, rate) for tier in ("node", "switch", "system")}
    return Calibration("made-up rows", "2026-11-28", 8e13, curves | more, {"dtype": dtype})


def measured(given: Calibration) -> ClusterSpec:
    return with_measurements(replace(cluster(), calibration=given))


def step(where: ClusterSpec, layout: Layout = ACROSS_NODES) -> Prediction:
    return predict(MOE, where, layout, WORKLOAD, MEGATRON)


def test_half_the_bandwidth_doubles_the_bandwidth_part_of_dispatch_and_combine_alone() -> None:
    endless, whole, half = (step(measured(calibration(rate))) for rate in (1e16, RATE, RATE / 2))
    for term in ("dispatch_s", "combine_s"):
        part = whole.terms[term] - endless.terms[term]
        assert part > 0.1 * whole.terms[term]
        assert half.terms[term] - endless.terms[term] == pytest.approx(2 * part, rel=1e-6)
    assert [whole.terms[term] for term in COMPUTE] == [half.terms[term] for term in COMPUTE]
    assert all(whole.terms[term] > 0 for term in ("attention_s", "expert_s", "head_s"))


def test_a_link_is_what_messages_took_and_is_not_discounted_again() -> None:
    found = measured_link(calibration(), "switch")
    assert found is not None
    link, constant = found
    assert (link.latency_s, link.bytes_per_s) == pytest.approx((LATENCY_S, RATE))
    assert constant.spread == 0.1 and "made-up rows" in constant.source
    evidence = step(measured(calibration())).calibration
    assert evidence["constants"]["link.switch"]["bytes_per_s"] == pytest.approx(RATE)
    assert evidence["constants"]["link.switch"]["measured"] and evidence["measured"]
    assert not evidence["constants"]["gemm"]["measured"]


def test_messages_of_all_ranks_at_once_go_before_those_of_a_pair() -> None:
    crowded = line("p2p_concurrent/system", "bytes", LATENCY_S, RATE / 3)
    found = measured_link(calibration(**{"p2p_concurrent/system": crowded}), "system")
    assert found is not None and found[0].bytes_per_s == pytest.approx(RATE / 3)
    assert measured_link(calibration(), "rack") is None


def test_shares_follow_from_curves_and_from_fits() -> None:
    curves = {
        "gemm": line("gemm", "flops", 0.0, 6e13, (1e9, 1e12)),
        "elementwise": line("elementwise", "bytes", 0.0, 5e11),
        "attention_forward": line("attention_forward", "flops", 0.0, 3e13),
        "attention_backward": line("attention_backward", "flops", 0.0, 1.2e13),
    }
    found = measured(calibration(**curves)).accelerator
    assert found is not None
    reached = found.efficiency
    assert reached.gemm == pytest.approx(0.6) and reached.memory == pytest.approx(0.5)
    assert reached.attention_forward == pytest.approx(0.3) and reached.attention_backward == pytest.approx(0.3)
    assert reached.grouped_gemm == DEVICE.efficiency.grouped_gemm and "grouped_gemm" not in reached.measured
    terms = {"start_s": 0.0, "s_per_flop": 2e-14, "s_per_weight": 0.0, "s_per_input": 0.0, "s_per_output": 4e-12}
    surface = Fit(
        "gemm", "torch", {name: Estimate(value, 0.9 * value, 1.1 * value) for name, value in terms.items()},
        "flops", 1e6, 1e12, 40, 0.02,
    )  # fmt: skip
    fitted = measured(replace(calibration(**curves), fits=(surface,))).accelerator
    assert fitted is not None
    assert fitted.efficiency.gemm == pytest.approx(0.5) and fitted.efficiency.gemm_edge == pytest.approx(100.0)
    assert fitted.efficiency.spread["gemm"] == pytest.approx(0.1)


def test_products_of_another_type_say_nothing_of_the_reference_type() -> None:
    curves = {"gemm": line("gemm", "flops", 0.0, 6e12), "elementwise": line("elementwise", "bytes", 0.0, 5e11)}
    found = measured(calibration(dtype="float32", **curves)).accelerator
    assert found is not None
    assert found.efficiency.gemm == DEVICE.efficiency.gemm and found.efficiency.memory == pytest.approx(0.5)


def test_a_device_without_a_data_sheet_is_what_was_measured_of_it() -> None:
    curves = {"gemm": line("gemm", "flops", 0.0, 8e13), "elementwise": line("elementwise", "bytes", 0.0, 5e11)}
    unknown = replace(cluster(), accelerator=None, links={}, calibration=calibration(dtype="float32", **curves))
    where = with_measurements(unknown)
    assert where.accelerator is not None and not where.accelerator.published
    prediction = predict(MOE, where, ACROSS_NODES, replace(WORKLOAD, recipe=RECIPES["float32"]), MEGATRON)
    assert prediction.step_time_s > 0 and any("no published run" in note for note in prediction.notes)
    with pytest.raises(ResourceModelError, match="bfloat16"):
        step(where)


def test_what_was_not_measured_stays_as_it_is() -> None:
    sheet = cluster()
    assert not sheet.calibration.measured and with_measurements(sheet) is sheet
    # A tier whose link was not measured keeps its rate and its share, whatever the others do.
    only_system = calibration()
    only_system = replace(only_system, curves={"p2p/system": only_system.curves["p2p/system"]})
    before, after = step(cluster()), step(measured(only_system))
    for tier in ("node", "switch"):
        constants = (each.calibration["constants"][f"link.{tier}"]["bytes_per_s"] for each in (before, after))
        assert len(set(constants)) == 1


@pytest.mark.parametrize(
    ("narrowed", "was_measured", "expected"),
    [(False, True, "megatron"), (False, False, "megatron"), (True, True, "piper"), (True, False, "megatron")],
)
def test_auto_takes_the_engine_that_has_the_axes_asked_for(narrowed: bool, was_measured: bool, expected: str) -> None:
    axes = Axes.shipped()
    if narrowed:
        axes = replace(
            axes, vpp=(1,), etp=(1,), tp=(1,), cp=(1,), zero=(0,), schedule=("1f1b",), recompute=("none",),
            placement=("linear",),
        )  # fmt: skip
    where = measured(calibration()) if was_measured else cluster()
    assert engine_of("auto", where, axes).name == expected


def test_auto_takes_the_eager_engine_where_no_data_sheet_is() -> None:
    curves = {"elementwise": line("elementwise", "bytes", 0.0, 5e11)}
    where = with_measurements(replace(cluster(), accelerator=None, calibration=calibration(**curves)))
    assert engine_of("auto", where, Axes.shipped()).name == "piper"


def test_a_plan_shows_which_of_its_constants_were_measured() -> None:
    curves = {"elementwise": line("elementwise", "bytes", 0.0, 5e11)}
    for where in (measured(calibration(**curves)), cluster()):
        said = list(constants(step(where).calibration))
        if not where.calibration.measured:
            assert not said
            continue
        here, elsewhere = said
        assert here.startswith("measured here: ") and "memory 0.5" in here and "link.system 5 GB/s" in here
        assert elsewhere.startswith("from data sheets") and "gemm 0.7" in elsewhere and "memory" not in elsewhere
