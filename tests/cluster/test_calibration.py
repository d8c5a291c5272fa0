"""Measurement rows to curves: medians, monotone, refused where wrong; and the file that keeps them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.cluster import evidence, machine
from piper_hpc.cluster.calibration import CalibrationError, fit, load, save, staleness
from piper_hpc.cluster.machine import Machine
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.resource_model import predict
from piper_hpc.spec import ClusterSpec, Layout, Workload
from tests.resource_model.clusters import TINY, UNITS, WIDE


def row(operator: str, work: float, seconds: float, **changes: Any) -> dict[str, Any]:
    """A row of measurements.jsonl, without what calibration does not read."""
    return {
        "schema_version": 1,
        "operator": operator,
        "work": work,
        "unit": UNITS[operator][0],
        "shape": {"elements": int(work)},
        "dtype": "float32",
        "n": 4,
        "median_s": seconds,
        "p5_s": seconds * 0.9,
        "p95_s": seconds * 1.3,
        "correct": True,
        "benchmark_version": 1,
    } | changes


def measurements() -> list[dict[str, Any]]:
    """Every operator at three sizes."""
    return [row(name, work, 1e-5 + work / rate) for name, (_, rate) in UNITS.items() for work in (1e4, 1e6, 1e8)]


def test_points_become_curves_and_the_best_gemm_the_peak() -> None:
    rows = [row("gemm", 1e6, 1e-4), row("gemm", 1e8, 2e-3), row("elementwise", 1e5, 1e-5)]
    calibration = fit(rows, cluster="local", provenance={"torch": "2.13.0"}, source="runs/a/measurements.jsonl")
    assert calibration.peak_flops == pytest.approx(5e10)
    assert calibration.measured
    assert calibration.source == "runs/a/measurements.jsonl"
    gemm = calibration.curves["gemm"]
    assert (gemm.work, gemm.seconds) == ((1e6, 1e8), (1e-4, 2e-3))
    assert gemm.spread == pytest.approx((0.1, 0.1)), "four repeats: what one scatters by, halved"
    assert calibration.provenance == {
        "cluster": "local",
        "dtype": "float32",
        "benchmark_version": "1",
        "torch": "2.13.0",
    }


def test_repeats_and_shapes_of_nearly_equal_work_are_one_point() -> None:
    rows = [row("gemm", 1.00e6, 1e-4), row("gemm", 1.02e6, 3e-4), row("gemm", 1.05e6, 2e-4)]
    gemm = fit(rows, cluster="local", provenance={}).curves["gemm"]
    assert gemm.work == (1.02e6,)
    assert gemm.seconds == (2e-4,)
    # The point's spread is that of the shapes, each with the interval of its own mean.
    assert gemm.spread == pytest.approx(((3.45e-4 - 0.95e-4) / 2 / 2e-4,))


def test_grouped_products_are_a_curve_for_each_number_of_rows_an_expert() -> None:
    shapes = [
        {"experts": experts, "tokens": tokens, "hidden": 64, "ffn": 64} for experts, tokens in ((4, 64), (8, 512))
    ]
    grouped = [row("gemm", 1e6, 1e-4, shape=shape) | {"operator": "grouped_gemm"} for shape in shapes]
    curves = fit([row("gemm", 1e6, 1e-4), *grouped], cluster="local", provenance={}).curves
    assert sorted(curves) == ["gemm", "grouped_gemm/16", "grouped_gemm/64"]


def test_what_an_exchange_stands_still_is_a_curve_of_its_own() -> None:
    rows = [row("all_to_all/node/2", work, 2 * work / 1e9, idle_s=work / 1e9) for work in (1e4, 1e6)]
    curves = fit([row("gemm", 1e6, 1e-4), *rows], cluster="local", provenance={}).curves
    assert curves["idle/all_to_all/node/2"].seconds == (1e-5, 1e-3) and curves["all_to_all/node/2"].seconds[1] == 2e-3
    assert "idle/gemm" not in curves


def test_a_row_is_read_by_the_statistic_that_it_names() -> None:
    rows = [row("gemm", 1e6, 1e-4), row("skew/node/2", 1e-3, 1e-4, mean_s=3e-4, statistic="mean")]
    assert fit(rows, cluster="local", provenance={}).curves["skew/node/2"].seconds == (3e-4,)


def test_skew_that_was_not_found_is_no_point() -> None:
    nothing = [row("skew/node/2", work, 1e-4, mean_s=-1e-6, statistic="mean") for work in (1e-3, 1e-2)]
    some = row("skew/node/2", 1e-1, 1e-4, mean_s=2e-4, statistic="mean")
    gemm = row("gemm", 1e6, 1e-4)
    assert fit([gemm, *nothing, some], cluster="local", provenance={}).curves["skew/node/2"].work == (1e-1,)
    assert "skew/node/2" not in fit([gemm, *nothing], cluster="local", provenance={}).curves


@given(st.lists(st.tuples(st.floats(1.0, 1e9), st.floats(1e-6, 1.0)), min_size=1, max_size=20))
def test_a_curve_never_falls(points: list[tuple[float, float]]) -> None:
    gemm = fit([row("gemm", *point) for point in points], cluster="local", provenance={}).curves["gemm"]
    assert list(gemm.work) == sorted(set(gemm.work))
    assert list(gemm.seconds) == sorted(gemm.seconds)
    medians = [seconds for _, seconds in points]
    assert min(medians) <= gemm.seconds[0] <= gemm.seconds[-1] <= max(medians)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no gemm of the calibration suite among 0 measurement rows"),
        ([row("elementwise", 1e5, 1e-5)], "no gemm of the calibration suite among 1 measurement rows"),
        ([row("gemm", 1e6, 1e-4, correct=False)], "gemm .* gave wrong values"),
        ([row("gemm", 1e6, 0.0)], "median_s=0.0, both must be above 0"),
        ([row("gemm", 1e6, 1e-4), row("gemm", 1e7, 1e-3, dtype="bfloat16")], "mix dtype bfloat16 and float32"),
        ([row("gemm", 1e6, 1e-4), row("gemm", 1e7, 1e-3, benchmark_version=2)], "mix benchmark_version 1 and 2"),
    ],
)
def test_rows_that_cannot_be_trusted_are_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        fit(rows, cluster="local", provenance={})


def test_one_file_serves_two_models_and_two_layouts(tmp_path: Path) -> None:
    calibration = fit(measurements(), cluster="testbed", provenance={"torch": "2.13.0"})
    path = tmp_path / "calibrations" / "testbed.json"
    save(calibration, path)
    read = load(path)
    assert read == calibration
    cluster = ClusterSpec("testbed", 4, 2, (0, 0, 1, 1), 2**30, read)
    steps = {
        (model.name, layout.name()): predict(model, cluster, layout, Workload(32, 128)).step_time_s
        for model in (TINY, WIDE)
        for layout in (Layout(pp=2, ep=4, micro_batch=2), Layout(pp=2, ep=2, dp=2, micro_batch=2))
    }
    assert len(set(steps.values())) == 4
    assert all(seconds > 0 for seconds in steps.values())
    assert [name for name in path.parent.iterdir()] == [path]


def test_a_missing_file_says_how_to_measure(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"no calibration at .*task=microbench"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"schema_version": 2, "curves": {}}'])
def test_a_broken_file_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(CalibrationError, match=r"broken.json is no calibration file"):
        load(path)


def test_a_file_of_another_version_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    save(fit(measurements(), cluster="local", provenance={}), path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 99}))
    with pytest.raises(CalibrationError, match="schema_version=99, this version of piper_hpc reads 2"):
        load(path)


def test_a_calibration_goes_stale_by_age_and_by_change() -> None:
    calibration = fit(
        measurements(), cluster="local", provenance={"torch": "2.13.0"}, measured_at="2026-01-01T00:00:00+00:00"
    )
    soon = datetime(2026, 2, 1, tzinfo=timezone.utc)
    later = datetime(2026, 12, 1, tzinfo=timezone.utc)
    assert staleness(calibration, {"torch": "2.13.0", "unknown": "x"}, now=soon) == []
    assert staleness(calibration, {"torch": "2.14.0"}, now=soon) == [
        "torch was '2.13.0' when it was measured and is '2.14.0' now"
    ]
    assert staleness(calibration, {}, now=later) == ["it was measured 334 days ago, more than 180"]


def test_measurements_of_another_version_of_the_benchmark_are_not_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, cluster = Machine(rack_of_node=(0,), memory_bytes=2**30, cores=2.0), ClusterConfig()
    now = here.calibration_file(cluster, "float32", tmp_path)
    assert here.calibration_file(cluster, "float32", tmp_path) == now
    monkeypatch.setattr(machine, "BENCHMARK_VERSION", machine.BENCHMARK_VERSION + 1)
    assert here.calibration_file(cluster, "float32", tmp_path) != now


def wide(operator: str, work: float, seconds: float, **changes: Any) -> dict[str, Any]:
    """A row of an exchange suite."""
    named = {"operator": operator, "cell": f"torch/{operator}/{work}", "backend": "torch"}
    return row("elementwise", work, seconds) | named | changes


def dispatch(algorithm: str, seconds: float, **changes: Any) -> dict[str, Any]:
    """A row of the all-to-all family."""
    return {
        **{"operator": "dispatch_combine", "algorithm": algorithm, "chunks": 4, "workload": "W0", "experts": 64},
        **{"top_k": 8, "tokens": 512, "hidden": 512, "dtype": "float32", "benchmark_version": 1, "correct": True},
        **{"group": {"ranks": 8, "nodes": 4, "racks": 1}, "logical_bytes_per_rank": 2**23, "row_bytes": 2048},
        **{"imbalance": 1.0, "median_s": seconds, "spread": 0.1},
    } | changes


def test_wide_rows_add_to_what_was_measured_before(tmp_path: Path) -> None:
    before = fit(measurements(), cluster="local", provenance={"run": "a"}, measured_at="2026-01-01T00:00:00+00:00")
    tiers = [name for name in before.curves if name.startswith("p2p/")]
    rows = [wide(tiers[0], work, 5e-5 + work / 1e9) for work in (1e5, 1e6, 1e7)]
    rows += [wide("all_gather/node/2", work, 5e-5 + work / 1e9) for work in (1e4, 1e5, 1e6)]
    rows += [dispatch("flat", 0.2), dispatch("halo_dedup", 0.1), dispatch("mpi", 0.3)]
    before = replace(before, provenance=before.provenance | {"driver": "1"})
    after = fit(rows, cluster="local", provenance={"run": "b", "driver": "2"}, previous=before)
    assert after.provenance["driver"] == "1", "most of it is still of the old driver"
    assert after.curves[tiers[0]].work == (1e4, 1e5, 1e6, 1e7, 1e8), "new points in their range, old ones outside it"
    assert after.curves["gemm"] == before.curves["gemm"] and "all_gather/node/2" in after.curves
    assert [(each.algorithm, each.seconds) for each in after.exchanges] == [("flat", 0.2), ("halo_dedup", 0.1)]
    assert after.peak_flops == before.peak_flops
    assert after.measured_at == before.measured_at, "as old as the oldest of it"
    assert {each.operator for each in after.fits} >= {tiers[0], "all_gather/node/2"}
    again = fit([dispatch("flat", 0.15)], cluster="local", provenance={"run": "c"}, previous=after)
    assert {each.algorithm: each.seconds for each in again.exchanges} == {"halo_dedup": 0.1, "flat": 0.15}
    save(again, tmp_path / "file.json")
    assert load(tmp_path / "file.json") == again


def test_what_a_rank_computes_in_an_algorithm_is_stretched_to_its_share_of_a_core(tmp_path: Path) -> None:
    timed = dispatch("halo", 0.010, computed_s=0.004, idle_s=0.003, core_share=0.2)
    known = fit([*measurements(), dispatch("flat", 0.008), timed], cluster="local", provenance={})
    device, rank = known.exchanges
    assert (device.seconds, device.idle_s) == (0.008, 0.0), "of a device nobody knows what it computes"
    assert (rank.seconds, rank.idle_s) == pytest.approx((0.003 + 0.004 / 0.2, 0.003))
    assert not [name for name in known.curves if "dispatch" in name and "idle" in name]
    save(known, tmp_path / "file.json")
    assert load(tmp_path / "file.json") == known


def test_a_refused_row_takes_its_whole_curve_along() -> None:
    name = "all_to_all/rack/4"
    rows = [row("gemm", 1e6, 1e-4), *(wide(name, work, 1e-3) for work in (1e3, 1e4))]
    assert name in fit(rows, cluster="local", provenance={}).curves
    rows.append(wide(name, 1e6, 1e-3, correct=False, refused="eth0 sent 0 bytes"))
    assert name not in fit(rows, cluster="local", provenance={}).curves


def test_a_model_s_own_matrices_alone_are_no_calibration() -> None:
    rows = [wide("gemm", work, 1e-4, part="head") for work in (1e6, 1e7)]
    with pytest.raises(CalibrationError, match="no gemm of the calibration suite among 2"):
        fit(rows, cluster="local", provenance={})


def test_what_mpi_and_a_model_s_own_matrices_took_are_no_curves() -> None:
    rows = [row("gemm", 1e6, 1e-4), row("gemm", 1e8, 1e-3, part="head", cell="x", shape={"m": 1, "n": 1, "k": 1})]
    rows.append(wide("all_to_all/node/2", 1e6, 1e-3, backend="mpi"))
    found = fit(rows, cluster="local", provenance={})
    assert found.curves["gemm"].work == (1e6,) and set(found.curves) == {"gemm"}
    assert found.peak_flops == pytest.approx(1e11), "the best rate of any matrix product"


def test_facts_of_now_name_nodes_and_size_and_what_changed_is_told() -> None:
    here = Machine(rack_of_node=(0,), memory_bytes=2**30, cores=2.0, fingerprint={"torch": "2.13.0"})
    then = evidence.facts(here, ClusterConfig(name="local"), "float32", ["n1", "n2"])
    calibration = fit(measurements(), cluster="local", provenance=then)
    assert staleness(calibration, evidence.facts(here, ClusterConfig(name="local"), "float32", ["n1", "n2"])) == []
    assert staleness(calibration, evidence.facts(here, ClusterConfig(name="local"), "float32", ["n2", "n1"])) == []
    assert staleness(calibration, evidence.facts(here, ClusterConfig(name="local"), "float32")) == []
    other = replace(here, fingerprint={"torch": "2.14.0"})
    reasons = staleness(
        calibration, evidence.facts(other, ClusterConfig(name="local", nodes=2), "float32", ["n1", "n3"])
    )
    assert [reason.split(" was ")[0] for reason in reasons] == ["torch", "size", "nodes"]


def test_what_a_job_alone_knows_is_compared_there_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    here, cluster = Machine(rack_of_node=(0,), memory_bytes=2**30, cores=2.0), ClusterConfig(name="frontier")

    def torch(nccl: tuple[int, ...], started: bool = True, cuda: str | None = "13.0") -> SimpleNamespace:
        device = SimpleNamespace(
            is_initialized=lambda: started,
            get_device_name=lambda: "H100",
            nccl=SimpleNamespace(version=lambda: nccl),
        )
        none = SimpleNamespace(is_initialized=lambda: False)
        return SimpleNamespace(version=SimpleNamespace(cuda=cuda, hip=None), cuda=device, xpu=none)

    def now(module: SimpleNamespace | None, nodes: tuple[str, ...] = ("n1",)) -> dict[str, str]:
        monkeypatch.setitem(sys.modules, "torch", module)
        return evidence.facts(here, cluster, "bfloat16", nodes)

    then = now(torch((2, 27, 5)))
    assert (then["nccl"], then["device_name"]) == ("2.27.5", "H100") and "processor" in then
    calibration = fit(measurements(), cluster="frontier", provenance=then | {"dtype": "bfloat16"})
    assert staleness(calibration, now(None, ())) == [], "a login node knows none of it"
    assert staleness(calibration, now(torch((), started=False, cuda=None))) == [], "nor does a build for CPUs"
    assert staleness(calibration, now(torch((2, 28, 3)))) == [
        "nccl was '2.27.5' when it was measured and is '2.28.3' now"
    ]
    assert staleness(calibration, now(None) | {"device_name": "H200"}) == [
        "device_name was 'H100' when it was measured and is 'H200' now"
    ]


def test_a_moved_file_makes_nothing_stale_and_a_new_version_does(tmp_path: Path) -> None:
    """Calibrations of before have a digest of the measuring code, which is read and no longer compared."""
    now = evidence.facts(Machine((0,), 1, 1.0), ClusterConfig(name="local"), "float32", ["n1"])
    old = fit(measurements(), cluster="local", provenance=now | {"benchmark_code": "0badc0de"})
    save(old, tmp_path / "old.json")
    calibration = load(tmp_path / "old.json")
    assert calibration.provenance["benchmark_code"] == "0badc0de"
    assert staleness(calibration, now) == []
    (reason,) = staleness(calibration, now | {"benchmark_version": now["benchmark_version"] + "1"})
    assert reason.startswith("benchmark_version was")


def test_nothing_is_imported_to_ask() -> None:
    code = (
        "import sys; from piper_hpc.cluster import evidence; from piper_hpc.cluster.machine import Machine; "
        "from piper_hpc.config.schema import ClusterConfig; "
        "facts = evidence.facts(Machine((0,), 1, 1.0), ClusterConfig(), 'float32', ['n1']); "
        "assert facts['benchmark_version'] and not {'torch', 'mpi4py.MPI'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
