"""How true the resource model is: the bars that published rows must meet, on rows that no constant has seen.

A fixed subset of the shipped rows, so that a change of the model that makes it worse is seen at once. Bars are of
`python -m analysis.validate published`; what was fitted is told by the ids in conf/efficiency.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from analysis import fit
from analysis.published.judge import Judged, judge
from analysis.published.predict import predict
from analysis.published.rows import load, runs
from piper_hpc.cluster import accelerator, efficiency


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


@pytest.mark.parametrize("name", fit.FITS)
def test_a_fit_is_what_its_command_gives(name: str) -> None:
    document, _ = fit.fitted(name)
    shipped = efficiency.read(name)
    assert document["constants"] == pytest.approx(shipped["constants"], rel=0.01, abs=1e-7)
    assert {key: document[key] for key in ("carried", "fitted", "sources")} == {
        key: shipped[key] for key in ("carried", "fitted", "sources")
    }


@pytest.mark.parametrize("name", accelerator.names())
def test_every_constant_of_every_device_says_where_it_is_from(name: str) -> None:
    device = accelerator.known(name)
    if device is None:
        assert name == "a100_64gb_custom"  # its peak is not public
        return
    reached = device.efficiency
    assert reached.fitted_on or all(reached.sources.values())
    assert 0 < reached.gemm <= 1 and 0 < reached.memory <= 1


def test_a_constant_of_unknown_origin_is_refused() -> None:
    document = efficiency.read("a100")
    del document["fitted"]["memory"]
    with pytest.raises(ValueError, match="memory has neither a source nor fitted rows"):
        efficiency.resolve(document, "a100")
