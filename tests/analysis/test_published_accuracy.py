"""How true the resource model is: the bars that published rows must meet, on rows that no constant has seen.

A fixed subset of the shipped rows, so that a change of the model that makes it worse is seen at once. Bars are of
`python -m analysis.validate published`; what was fitted is told by the ids in conf/efficiency.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import OptimizeResult

from analysis.validation import fit
from analysis.validation.published.judge import Judged, judge
from analysis.validation.published.predict import predict
from analysis.validation.published.rows import load, runs
from piper_hpc.cluster import accelerator, efficiency

pytestmark = pytest.mark.slow  # predicts every published row, and fits anew


@pytest.fixture(scope="module")
def judged() -> list[Judged]:
    """Rows of the sources that a bar is stated for."""
    every = runs(load())
    notes = ("MCore", "network=")
    chosen = [
        run
        for run in every
        if run.rows[0].row_id.startswith(("simu", "nar", "kor", "dsv3"))
        or (run.rows[0].row_id.startswith("mpf") and any(note in run.cells["notes"] for note in notes))
    ]
    return judge(chosen, predict, every)


def errors(judged: list[Judged], chosen: Callable[[Judged], bool]) -> np.ndarray:
    """Absolute errors in per cent of the chosen rows, none of which was refused."""
    rows = [row for row in judged if chosen(row)]
    assert rows
    assert all(row.error_pct is not None for row in rows)
    return np.abs([row.error_pct for row in rows])


def starts(row: Judged, prefix: str, metric: str) -> bool:
    return row.row.row_id.startswith(prefix) and row.row.cells["metric"] == metric


def test_a100_layers_predict_whole_models(judged: list[Judged]) -> None:
    """Fitted on the ten single-layer rows of arXiv 2205.05198 Table 4 alone."""
    table_5 = errors(judged, lambda row: starts(row, "kor", "step_time") and "Table 5" in row.row.cells["source"])
    assert table_5.mean() < 3.65
    assert table_5.max() < 9.0
    assert errors(judged, lambda row: starts(row, "nar", "hw_tflops_per_gpu")).mean() < 6.0
    assert not any(row.fitted for row in judged if row.row.row_id.startswith("nar"))


@pytest.mark.parametrize(("model", "bar"), [("Mixtral", 5.0), ("Qwen2", 10.0)])
def test_h100_predicts_the_other_model(judged: list[Judged], model: str, bar: float) -> None:
    """Fitted on two rows of Mixtral-8x22B; every row of Qwen2-57B-A14B is unseen."""
    unseen = errors(
        judged, lambda row: starts(row, "mpf", "mfu") and model in row.row.cells["model"] and not row.fitted
    )
    assert unseen.mean() < bar


def test_b200_predicts_experts_from_dense_models(judged: list[Judged]) -> None:
    """Fitted on the dense rows of SimuMax's release; memory is fitted on nothing."""
    experts = errors(judged, lambda row: starts(row, "simu", "step_time") and "DeepSeek" in row.row.cells["model"])
    assert experts.mean() < 5.0
    memory = errors(judged, lambda row: starts(row, "simu", "peak_memory_allocated"))
    assert memory.mean() < 1.0
    assert memory.max() < 3.0


def test_deepseek_v3_is_predicted_without_any_row_of_it(judged: list[Judged]) -> None:
    assert errors(judged, lambda row: starts(row, "dsv3", "step_time")).max() < 10.0
    assert errors(judged, lambda row: starts(row, "dsv3", "time_1F1B_total")).max() < 10.0


@pytest.mark.parametrize("name", fit.PRESETS)
def test_a_fit_is_what_its_command_gives(name: str) -> None:
    document, _ = fit.content(name)
    shipped = efficiency.read(name)
    assert document.keys() == shipped.keys()
    assert document["constants"] == pytest.approx(shipped["constants"], rel=0.01, abs=1e-7)
    assert document["spread"] == pytest.approx(shipped["spread"], rel=0.1)
    stated = document.keys() - {"constants", "spread"}
    assert {key: document[key] for key in stated} == {key: shipped[key] for key in stated}


def test_every_efficiency_file_is_written_by_the_command() -> None:
    assert {path.stem for path in efficiency.path_of("a100").parent.glob("*.yaml")} == set(fit.PRESETS)


@pytest.mark.parametrize(("name", "best", "peak"), [("mi300x", 668.4, 1307.4), ("mi355x", 1565.0, 2500.0)])
def test_a_device_without_rows_reaches_as_much_of_its_best_product_as_the_fits(
    name: str, best: float, peak: float
) -> None:
    document = efficiency.read(name)
    a100, h100 = (efficiency.read(fitted)["constants"]["gemm"] for fitted in ("a100", "h100"))
    share = (a100 / (271.2 / 312) + h100 / (794.5 / 989)) / 2
    assert document["constants"]["gemm"] == pytest.approx(share * best / peak, rel=1e-3)
    assert document["fitted"]["grouped_gemm"] == sorted([*fit.KOR_LAYER, *fit.MPF_TWO])


def test_a_fit_is_as_unsure_as_its_rows_are_few() -> None:
    """Of the same residuals: two rows and one constant leave one degree of freedom, twelve rows eleven."""

    def spread(rows: int) -> dict[str, float]:
        errors = np.resize([0.01, -0.01], rows)
        return fit.spread(("gemm",), OptimizeResult(x=np.array([0.7]), fun=errors, jac=np.full((rows, 1), -1 / 0.7)))

    # t(0.95, 1) = 6.314 and t(0.95, 11) = 1.796, of a standard error of 0.01 sqrt(rows / (rows - 1)).
    assert spread(2)["model"] == pytest.approx(np.expm1(6.314 * 0.01 * np.sqrt(2)), rel=0.01)
    assert spread(12)["model"] == pytest.approx(np.expm1(1.796 * 0.01 * np.sqrt(12 / 11)), rel=0.01)
    assert spread(2)["gemm"] == pytest.approx(6.314 * 0.01, rel=0.01)


@pytest.mark.parametrize("name", accelerator.names())
def test_every_constant_of_every_device_says_where_it_is_from(name: str) -> None:
    device = accelerator.load_if_public(name)
    if device is None:
        assert name == "a100_64gb_custom"  # its peak is not public
        return
    reached = device.efficiency
    assert all(reached.sources.values()) and all(reached.assumed.values())
    assert not reached.sources.keys() & reached.assumed.keys()
    assert 0 < reached.gemm <= 1 and 0 < reached.memory <= 1


def test_what_is_assumed_or_carried_is_less_sure_than_what_was_fitted() -> None:
    h100, b200 = efficiency.load("h100"), efficiency.load("b200")
    assert h100.assumed.keys() == {"gemm_edge", "framework_bytes"}
    assert h100.spread["framework_bytes"] == efficiency.ASSUMED_SPREAD > efficiency.UNKNOWN_SPREAD
    assert h100.spread["attention_forward"] == h100.spread["memory"] == efficiency.UNKNOWN_SPREAD
    assert h100.spread["launch_s"] == b200.spread["launch_s"] > efficiency.UNKNOWN_SPREAD  # no surer than where fitted


def test_tied_constants_are_named_and_equally_sure() -> None:
    b200 = efficiency.load("b200")
    assert b200.tied == {"grouped_gemm": "gemm", "attention_backward": "attention_forward"}
    assert b200.spread["attention_backward"] == b200.spread["attention_forward"] < efficiency.UNKNOWN_SPREAD
    document = efficiency.read("b200")
    document["constants"]["grouped_gemm"] = 0.9
    with pytest.raises(ValueError, match=r"grouped_gemm=0.9 is tied to gemm=0.\d+ and must equal it"):
        efficiency.resolve(document, "b200")


def test_a_constant_of_no_or_of_two_origins_is_refused() -> None:
    document = efficiency.read("a100")
    rows = document["fitted"].pop("memory")
    with pytest.raises(ValueError, match="memory is in none of fitted, sources, assumed, carried"):
        efficiency.resolve(document, "a100")
    document["fitted"]["memory"] = rows
    document["assumed"]["memory"] = "as on another device"
    with pytest.raises(ValueError, match="memory is in fitted and assumed of fitted"):
        efficiency.resolve(document, "a100")
