"""`make validate-testbed`: points that train and are told apart, and bars that hold and fail on known numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from piper_hpc.cluster import calibration as calibrations
from piper_hpc.resource_model.predict import predict
from piper_hpc.runs import RunFolder
from piper_hpc.spec import TERMS
from piper_hpc.spec.executor import missing_of_layout, missing_of_model
from piper_hpc.spec.rules import layout_problems
from piper_hpc.studies.own_runs.__main__ import MET, MISSED, NO_ANSWER, main
from piper_hpc.studies.own_runs.judge import Bar, bars, results
from piper_hpc.studies.own_runs.points import POINTS, RANKS, SKEWED
from piper_hpc.studies.own_runs.predicting import PREDICTED, predicted_again
from piper_hpc.studies.own_runs.resident import CPU, MEASURED
from tests.resource_model.clusters import calibration, cluster


def test_points_train_on_the_testbeds_ranks_and_cover_every_axis() -> None:
    assert len(POINTS) >= 16 and len({point.name for point in POINTS}) == len(POINTS)
    for point in POINTS:
        assert point.layout.ranks == RANKS
        assert not list(layout_problems(point.model, point.layout, point.workload)), point.name
        assert not list(missing_of_layout(point.layout)) and not list(missing_of_model(point.model, "float32"))
    layouts = [point.layout for point in POINTS]
    assert len({point.model.name for point in POINTS}) == 2
    assert {layout.pp for layout in layouts} == {1, 2, 4} and {layout.zero for layout in layouts} == {0, 1}
    assert len({layout.schedule for layout in layouts}) >= 4 and len({layout.all_to_all for layout in layouts}) >= 3
    assert len({layout.recompute for layout in layouts}) >= 3 and len({layout.micro_batch for layout in layouts}) >= 2
    assert {layout.ep > 1 for layout in layouts} == {layout.dp > 1 for layout in layouts} == {True, False}


def test_a_skewed_point_is_told_what_is_routed() -> None:
    (point, *_) = [point for point in POINTS if point.routing == SKEWED]
    histogram = point.workload.routing.histogram
    assert len(histogram) == point.model.experts and sum(histogram) == pytest.approx(1.0)
    hot = point.model.experts // 8
    assert sum(histogram[:hot]) == pytest.approx(0.5, abs=0.02)
    assert float(point.workload.routing.load(point.layout.ep)) > 1.5


def rows(
    errors: dict[str, float], *, spread: float = 0.02, width: float = 0.1, peak: float = 1.0
) -> list[dict[str, Any]]:
    """Points of one model whose steps take 1, 2, 3 ... s, predicted off by `errors`; two terms share each step."""
    made: list[dict[str, Any]] = []
    for index, (name, error) in enumerate(errors.items()):
        step_s = 1.0 + index
        predicted = step_s * (1 + error)
        terms = dict.fromkeys(TERMS, 0.0) | {"expert_s": 0.6 * predicted, "dispatch_s": 0.4 * predicted}
        intervals = {
            key: [seconds * (1 - width), seconds * (1 + width)]
            for key, seconds in {"step_time_s": predicted, **terms}.items()
        }
        made.append(
            {
                "operator": PREDICTED, "point": name, "step_time_s": predicted, "terms": terms, "intervals": intervals,
                "peak_memory_bytes": [1000, 2000],
            }
        )  # fmt: skip
        for repeat, factor in enumerate((1 - spread, 1.0, 1 + spread)):
            measured = dict.fromkeys(TERMS, 0.0) | {"expert_s": 0.6 * step_s, "dispatch_s": 0.4 * step_s}
            made.append(
                {
                    "operator": MEASURED, "point": name, "repeat": repeat, "step_time_s": factor * step_s,
                    "terms": measured, "peak_memory_bytes": [] if repeat else [int(1000 * peak), int(2000 * peak)],
                }
            )  # fmt: skip
    return made


def judged(*args: Any, **options: Any) -> dict[str, Bar]:
    return {bar.name: bar for bar in bars(results(rows(*args, **options)))}


def test_the_cpu_of_layers_is_held_against_what_was_counted() -> None:
    made = rows({"a x": 0.0, "a y": 0.0})
    made[0]["layers_cpu_s"] = 0.33
    counted = {"attention_s": 0.1, "router_s": 0.05, "expert_s": 0.15, "weight_grad_s": 0.0, "dispatch_s": 9.0}
    first, second = results([*made, {"operator": CPU, "point": "a x", "cpu_s": counted}])
    assert first.layers is not None and first.layers.error == pytest.approx(0.1) and second.layers is None


GOOD = {"a x": 0.03, "a y": -0.05, "a z": 0.06}


def test_good_predictions_meet_every_bar() -> None:
    found = judged(GOOD)
    assert all(bar.met for bar in found.values()) and len(found) >= 7
    assert results(rows(GOOD))[1].step.error == pytest.approx(-0.05)
    assert results(rows(GOOD))[0].step.spread == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("errors", "options", "missed"),
    [
        ({"a x": 0.08, "a y": 0.08, "a z": 0.09}, {}, {"step time, mean"}),
        ({"a x": 0.0, "a y": 0.0, "a z": 0.25}, {"width": 0.3}, {"step time, largest", "half width of the interval"}),
        (GOOD, {"width": 0.01}, {"inside the 90 % interval"}),
        (GOOD, {"peak": 1.1}, {"peak memory"}),
        ({"a x": 1.5, "a y": 0.0, "a z": -0.7}, {}, {"step time", "regret of the first choice", "Kendall's tau"}),
    ],
    ids=["biased", "wide", "narrow", "memory", "ranking"],
)
def test_each_bar_can_be_missed(errors: dict[str, float], options: dict[str, float], missed: set[str]) -> None:
    found = [name for name, bar in judged(errors, **options).items() if bar.met is False]
    assert all(any(name.startswith(one) for name in found) for one in missed), found


def test_a_run_is_shown_again_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(tmp_path)
    run.write_manifest({})
    assert main(["--show", str(run.path)]) == NO_ANSWER
    assert "make validate-testbed" in capsys.readouterr().err
    for row in rows(GOOD):
        run.append_measurement(row)
    assert main(["--show", str(run.path)]) == MET
    assert "a y" in capsys.readouterr().out
    assert "| Kendall's tau | 1.00 of 3 pairs |" in (run.path / "report.md").read_text()
    other = RunFolder.create(tmp_path)
    other.write_manifest({})
    for row in rows({"a x": 0.5, "a y": 0.5, "a z": 0.5}):
        other.append_measurement(row)
    assert main(["--show", str(other.path)]) == MISSED


def test_a_run_is_judged_again_by_a_calibration_and_the_model_as_it_is(tmp_path: Path) -> None:
    run, point = RunFolder.create(tmp_path), POINTS[1]
    places = [{"node": rank // 2, "rack": rank // 4} for rank in range(RANKS)]
    run.write_manifest({"job": {"rank_map": places}})
    run.write_config("cluster: {name: made-up}\n")
    for row in rows({point.name: 0.5}):
        run.append_measurement(row)
    calibrations.save(calibration(), tmp_path / "calibration.json")
    (found,) = results(predicted_again(run, tmp_path / "calibration.json"))
    expected = predict(point.model, cluster(), point.layout, point.workload)
    assert found.step.predicted == pytest.approx(expected.step_time_s) and found.step.measured == 1.0
    assert main(["--show", str(run.path), "--calibration", str(tmp_path / "calibration.json")]) == MISSED
    assert main(["--show", str(run.path), "--calibration", str(tmp_path / "none.json")]) == NO_ANSWER
    assert main(["--calibration", "calibration.json"]) == NO_ANSWER  # nothing is measured
