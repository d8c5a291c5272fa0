"""Errors, refusals that pay, the trivial baselines, ranking, out of memory, and the command."""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from types import ModuleType

import pytest
from rich.console import Console

from analysis.validate import main
from analysis.validation.published import flops
from analysis.validation.published.judge import Judged, judge
from analysis.validation.published.metrics import TIME
from analysis.validation.published.report import document, show, summary
from analysis.validation.published.request import Outcome, Predictor, Refused, Request
from analysis.validation.published.rows import COLUMNS, PublishedRow, PublishedRun, load, runs
from analysis.validation.published.score import baseline, kendall_tau, one_per_run, out_of_memory, ranking, statistics
from tests.analysis.published_rows import STATED, run_of, steady, write


def refuse(request: Request) -> Outcome:
    raise Refused("model.attention=mla: is not modelled here")


def constant(request: Request) -> Outcome:
    """40 % of the peak at every row: what the trivial baseline says with another constant."""
    work = flops.flops_per_token(request, "noncausal") * request.global_batch * request.sequence / request.gpus
    return Outcome(work / (0.4 * (flops.bf16_peak(request.accelerator) or 0)), 1.0, 2.0)


@pytest.fixture(scope="module")
def shipped() -> list[Judged]:
    return judge(runs(load()), constant)


# One row.


def test_an_error_is_in_the_rows_own_unit() -> None:
    """256 sequences on 128 GPUs take the steady device 2 s: 80 % less than the printed 10 s."""
    (row,) = judge([run_of(value="10000", unit="ms")], steady)
    assert (row.measured, row.predicted, row.error_pct) == (
        pytest.approx(10000),
        pytest.approx(2000),
        pytest.approx(-80),
    )
    (tokens,) = judge([run_of(metric="tokens_per_s_per_gpu", value="4.096", unit="ktok/s/GPU")], steady)
    assert (tokens.predicted, tokens.error_pct) == (pytest.approx(4.096), pytest.approx(0))
    (memory,) = judge([run_of(metric="peak_memory_allocated", value="8", unit="GiB")], steady)
    assert (memory.predicted, memory.error_pct) == (pytest.approx(10), pytest.approx(25))


def test_rates_of_sequences_and_steps_follow_from_the_step_time() -> None:
    """256 sequences on 128 GPUs in 2 s: one sequence a second and GPU, half a step a second."""
    rates = (("throughput", "seq/s/GPU", 1.0), ("samples", "samples/s", 128.0), ("speed", "it/s", 0.5))
    for metric, unit, expected in rates:
        (row,) = judge([run_of(metric=metric, unit=unit, value="1")], steady)
        assert row.predicted == pytest.approx(expected)
    (percent,) = judge([run_of(metric="mfu", unit="", value="45")], constant)
    assert (percent.measured, percent.predicted) == (pytest.approx(45), pytest.approx(40))


def test_mfu_is_taken_over_the_rows_own_peak() -> None:
    (row,) = judge([run_of(metric="mfu", value="40", unit="%", notes="peak 494.5 TFLOP/s")], constant)
    assert row.predicted == pytest.approx(80)
    assert row.document()["flop_convention"] == "noncausal_without_mtp"


def test_a_layers_rate_follows_from_its_two_times() -> None:
    run = run_of(model="Mixtral-8x22B (1 layer)", layers="1", pp="1", tp="1", num_gpus="8", global_batch="",
                 metric="layer_tflops_per_gpu", value="100", unit="TFLOP/s")  # fmt: skip
    (row,) = judge([run], steady)
    assert row.answer.request is not None and row.answer.request.single_layer
    assert row.predicted == pytest.approx(flops.layer_flops(row.answer.request) * 4096 / 0.03 / 1e12)


def test_a_part_that_the_model_does_not_give_is_refused() -> None:
    (row,) = judge([run_of(metric="time_optimizer", value="0.3", unit="s")], steady)
    assert row.error_pct is None and "optimizer_s" in row.refused
    (bubble,) = judge([run_of(metric="time_bubble", value="2", unit="s")], steady)
    assert bubble.error_pct == pytest.approx(-50)


def test_refusing_pays_only_where_everything_is_stated() -> None:
    """A refused row that states tp, pp, ep, batch, sequence and GPUs is 100 % wrong; one that does not is left out."""
    stated, open_ = run_of(), run_of(row_id="row-2", global_batch="", metric="mfu", value="40", unit="%")
    rows = judge([stated, open_], refuse)
    assert [row.error_pct for row in rows] == [None, None]
    assert [row.counted_pct for row in rows] == [100, None]
    assert rows[0].refused.startswith("model.attention")
    found = statistics(rows)
    assert (found["n"], found["mean_abs_error_pct"], found["coverage"], found["refused_counted"]) == (1, 100, 0, 1)
    dense = run_of(model="GPT 22B", experts="", topk="", moe_ffn="", ep="", layers="48", heads="64")
    assert judge([dense], refuse)[0].counted_pct == 100


def test_fitted_is_a_join_on_the_ids_that_outcomes_name() -> None:
    other = run_of(row_id="row-2", num_gpus="256", value="20")
    rows = judge([run_of(), other], steady)
    assert [row.fitted for row in rows] == [True, False]
    found = statistics(rows)
    assert (found["fitted"], found["held_out"]["n"]) == (1, 1)
    assert found["held_out"]["mean_abs_error_pct"] == pytest.approx(abs(rows[1].error_pct or 0))


def test_one_time_error_a_run_is_the_first_that_it_states() -> None:
    cells = [STATED | {"row_id": name, "metric": metric, "value": "10", "unit": unit} for name, metric, unit in
             (("a", "mfu", "%"), ("b", "tokens_per_s_total", "tok/s"), ("c", "step_time", "s"))]  # fmt: skip
    run = PublishedRun(tuple(map(PublishedRow.of, cells)))
    assert [row.row.row_id for row in one_per_run(judge([run], steady))] == ["c"]
    without = PublishedRun(run.rows[:2])
    assert [row.row.row_id for row in one_per_run(judge([without], steady))] == ["b"]


def test_a_step_time_without_a_batch_is_refused_and_a_rate_is_not() -> None:
    (step,) = judge([run_of(global_batch="")], steady)
    (tokens,) = judge([run_of(global_batch="", metric="tokens_per_s_total", value="100", unit="tok/s")], steady)
    assert "global_batch" in step.refused and step.counted_pct is None
    assert tokens.error_pct is not None and "global_batch" in tokens.document()["filled"]


def test_a_device_without_a_public_peak_is_refused_for_mfu_alone() -> None:
    leonardo = {"gpu": "A100-64GB (Leonardo)"}
    (mfu,) = judge([run_of(metric="mfu", value="40", unit="%", **leonardo)], steady)
    (step,) = judge([run_of(**leonardo)], steady)
    assert "peak is not public" in mfu.refused and step.error_pct == pytest.approx(-80)
    assert statistics([step])["baseline"]["n"] == 0


def test_what_a_document_prints_twice_counts_once_and_is_fitted_with_its_twin() -> None:
    """MoE Parallel Folding: Table 2 in bf16 is Table 3 times 989.5; its FP8 rows are runs of their own."""

    def seen(request: Request) -> Outcome:
        return Outcome(1.0, 1.0, 2.0, fitted_on=("mpf-0004",))

    rows = judge([run for run in runs(load()) if run.document == "2504.14960"], seen)
    twice = {row.row.row_id: row.repeat_of for row in rows if row.repeat_of}
    assert twice == {"mpf-0047": "mpf-0004", "mpf-0048": "mpf-0005"}
    assert [row.row.row_id for row in rows if row.fitted] == ["mpf-0004", "mpf-0047"]
    assert len(one_per_run(rows)) == 48


# Sets.


def only(rows: list[Judged], keep: Callable[[Judged], bool]) -> list[Judged]:
    return [row for row in one_per_run(rows) if keep(row)]


@pytest.mark.parametrize(
    ("key", "name", "table", "n", "mean", "largest"),
    [
        ("method", "MCore", "Table [34]", 11, 13.5, 26.7),
        ("method", "MCore w/ Folding", "Table [34]", 11, 11.8, 23.6),
        ("method", "FSDP+EP", "Table [34]", 11, 4.6, 10.6),
        ("method", "TP+EP+DP", "Table [34]", 11, 24.5, 42.8),
        ("system", "MegaScale-MoE", "Table 3", 5, 3.8, 10.6),
        ("system", "Megatron-LM f1f03922", "Table 3", 5, 5.3, 13.3),
    ],
)
def test_the_trivial_baselines_of_moe_sets_are_the_known_ones(
    shipped: list[Judged], key: str, name: str, table: str, n: int, mean: float, largest: float
) -> None:
    rows = only(
        shipped, lambda row: row.answer.run.note(key) == name and bool(re.search(table, row.row.cells["source"]))
    )
    errors = [abs(error) for error in baseline(rows) if error is not None]
    assert (len(errors), fmean(errors), max(errors)) == (
        n,
        pytest.approx(mean, abs=0.06),
        pytest.approx(largest, abs=0.06),
    )


def test_the_trivial_baselines_of_dense_sets_are_the_known_ones(shipped: list[Judged]) -> None:
    narayanan = baseline(only(shipped, lambda row: row.row.row_id.startswith("nar-")))
    assert fmean(abs(error or 0) for error in narayanan) == pytest.approx(5.4, abs=0.05)
    assert max(abs(error or 0) for error in narayanan) == pytest.approx(13.5, abs=0.05)
    korthikanti = [f"kor-00{number:02d}" for number in range(1, 13)]
    table_5 = baseline(only(shipped, lambda row: row.row.row_id in korthikanti))
    assert (len(table_5), fmean(abs(error or 0) for error in table_5)) == (8, pytest.approx(9.0, abs=0.3))


def test_a_model_that_is_its_baseline_does_no_better(shipped: list[Judged]) -> None:
    """A constant 40 % of 989, over the 989.5 that the rows divide by, errs by nothing but that constant."""
    rows = only(shipped, lambda row: row.answer.run.note("method") == "MCore" and row.row.row_id < "mpf-0047")
    found = statistics(rows)
    assert found["mean_abs_error_pct"] == pytest.approx(
        fmean(abs(40 * 989 / 989.5 / float(str(row.measured)) - 1) for row in rows) * 100
    )
    assert found["baseline"]["mean_abs_error_pct"] == pytest.approx(13.5, abs=0.06)


def test_memorys_baseline_is_states_alone() -> None:
    """SimuMax's Llama3 cut to 12 layers, TP 8 on 8 GPUs: 12.4e9 parameters at 16 B over eight ranks."""
    run = next(run for run in runs(load()) if run.rows[0].row_id == "simu-0010")
    allocated = [row for row in judge([run], steady) if row.row.quantity.name == "peak_memory_allocated"]
    (error,) = baseline(allocated)
    assert error == pytest.approx(100 * (12.37e9 * 16 / 8 / (28.29 * 2**30) - 1), abs=0.5)


def test_ranking_rewards_order_not_size() -> None:
    assert kendall_tau([(1, 10), (2, 20), (3, 30)]) == 1
    assert kendall_tau([(1, 30), (2, 20), (3, 10)]) == -1
    assert kendall_tau([(1, 1), (2, 3), (3, 2)]) == pytest.approx(1 / 3)

    def slower_with_more_tp(request: Request) -> Outcome:
        return Outcome(float(request.layout.tp), 1, 2)

    printed = {"1": "12", "2": "10", "4": "15"}
    rows = judge([run_of(tp=tp, value=value) for tp, value in printed.items()], slower_with_more_tp)
    found = ranking(rows)
    assert (found["sets"], found["runs"], found["kendall_tau"]) == (1, 3, pytest.approx(1 / 3))
    assert found["top1_regret_pct"] == pytest.approx(100 * (1 - 10 / 12))


def test_out_of_memory_is_a_classification() -> None:
    def predict(request: Request) -> Outcome:
        return Outcome(1.0, float(request.layout.tp), 2.5)

    status = {"metric": "status", "value": "OOM", "unit": ""}
    rows = judge([run_of(tp="4", **status), run_of(tp="2", **status), run_of(tp="8"), run_of(tp="1")], predict)
    assert [row.predicted for row in rows[:2]] == ["OOM", "fits"]
    assert [row.error_pct for row in rows[:2]] == [0, 100]
    found = out_of_memory(rows)
    assert (found["runs"], found["measured"], found["predicted"], found["both"]) == (4, 2, 2, 1)
    assert (found["precision"], found["recall"]) == (0.5, 0.5)


def test_the_summary_is_by_family_and_metric(shipped: list[Judged]) -> None:
    found = summary(shipped)
    assert (found["runs"], found["rows"]) == (191, 322)
    assert found["predicted"] + found["refused"] == 322
    timed = {id(r.answer.run) for r in shipped if r.row.quantity.kind == TIME and r.measured and not r.repeat_of}
    assert found["time"]["rows"] == len(timed) == 147
    assert sum(each["time"]["rows"] for each in found["models"].values()) == found["time"]["rows"]
    assert sum(each["rows"] for each in found["metrics"].values()) == 322
    assert found["oom"]["measured"] == 9
    assert sum(found["reasons"].values()) == found["refused"]
    json.dumps(document(shipped, "rows.csv"), allow_nan=False)


def test_means_are_over_unseen_rows_and_fitted_ones_stand_apart() -> None:
    rows = judge([run_of(), run_of(row_id="row-2", value="1.6")], steady)  # predicted 2 s of 10 s and of 1.6 s
    found = statistics(rows)
    assert found["mean_abs_error_pct"] == pytest.approx((80 + 25) / 2)
    assert (found["unseen"]["rows"], found["unseen"]["mean_abs_error_pct"]) == (1, pytest.approx(25))
    assert (found["seen"]["rows"], found["seen"]["mean_abs_error_pct"]) == (1, pytest.approx(80))
    console = Console(width=200, record=True)
    show(document(rows, "rows.csv"), console)
    printed = console.export_text()
    columns, row = (line.split() for line in printed.splitlines()[2:4])
    assert (columns[0], columns[-2:]) == ("unseen", ["fitted", "mean"])
    assert row[:3] == ["Mixtral", "1", "25.0"] and row[-2:] == ["1", "80.0"]


def test_machines_are_named_by_row(shipped: list[Judged]) -> None:
    """X-MoE ran on Frontier, and its Table 5 on eight A100."""
    found = summary(shipped)["machines"]
    own = {name: each["rows"] for name, each in found.items() if name.startswith("2508.13337, X-MoE,")}
    assert own == {"2508.13337, X-MoE, MI250X GCD (Frontier)": 5, "2508.13337, X-MoE, A100-40GB": 3}
    assert sum(each["rows"] for each in found.values()) == summary(shipped)["time"]["rows"]
    console = Console(width=80, record=True)
    show(document(shipped, "rows.csv"), console)
    assert "\u2026" not in console.export_text()  # no figure is cut short


# The command.


@pytest.fixture
def predictor(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command asks the steady device."""
    stand_in = ModuleType("analysis.validation.published.predict")
    stand_in.predict = steady  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "analysis.validation.published.predict", stand_in)


def test_the_document_has_the_rows_own_columns(
    predictor: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "rows.csv", {}, {"row_id": "row-2", "gpu": "V100"})
    assert main(["published", "--rows", str(path), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    first, second = answer["rows"]
    assert {name: first[name] for name in COLUMNS} == STATED
    assert (first["measured"], first["predicted"], first["error_pct"], first["refused"]) == (10, 2, -80, None)
    assert (first["fitted"], first["layout"]["dp"]) == (True, 2)
    assert "Megatron" in first["filled"]["recipe"] or "megatron" in first["filled"]["recipe"]
    assert (second["predicted"], second["error_pct"], second["counted_pct"]) == (None, None, 100)
    assert second["refused"].startswith("gpu=V100")
    mixtral = answer["summary"]["models"]["Mixtral"]["time"]
    assert (mixtral["n"], mixtral["coverage"], mixtral["mean_abs_error_pct"]) == (2, 0.5, 90)


@pytest.mark.slow
def test_the_table_names_families_baselines_and_fitted_rows(
    predictor: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["published"]) == 0
    printed = capsys.readouterr().out
    for expected in ("Mixtral", "Qwen2", "baseline", "fitted rows (0)", "Kendall tau", "out of memory: 9 of"):
        assert expected in printed


def test_a_tolerance_decides_the_exit_code(predictor: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "rows.csv", {"value": "2.1"})
    assert main(["published", "--rows", str(path), "--tolerance", "5"]) == 0
    assert "[  OK  ] mean time error 4.8 %" in capsys.readouterr().out
    assert main(["published", "--rows", str(path), "--tolerance", "4"]) == 1


def test_bad_files_end_with_2(predictor: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["published", "--rows", str(tmp_path / "nowhere.csv"), "--json"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and "must be a readable CSV file" in captured.err
    assert main(["published", "--rows", str(write(tmp_path / "a.csv", {}, columns=COLUMNS[:-1]))]) == 2
    assert "lacks notes" in capsys.readouterr().err


def test_odd_rows_never_end_the_command(predictor: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every odd row is refused with its key, and the others are judged."""
    path = write(
        tmp_path / "rows.csv",
        {},
        {"row_id": "a", "value": "about ten"},
        {"row_id": "b", "unit": "furlongs"},
        {"row_id": "c", "metric": "happiness", "unit": "x"},
        {"row_id": "d", "tp": "many", "num_gpus": ""},
        {"row_id": "e", **{name: "" for name in COLUMNS if name not in ("row_id", "metric")}},
        {"row_id": "f", "value": "nan"},
        {"row_id": "g", "pp": "0"},
    )
    assert main(["published", "--rows", str(path), "--json"]) == 0
    rows = {row["row_id"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    told = {"a": "value=about ten", "b": "unit=furlongs", "c": "metric=happiness", "d": "num_gpus=", "e": "value=",
            "f": "value=nan"}  # fmt: skip
    for row_id, key in told.items():
        assert rows[row_id]["error_pct"] is None and key in rows[row_id]["refused"], row_id
    assert rows["row-1"]["error_pct"] == -80
    assert rows["g"]["predicted"] is not None and "pp" in rows["g"]["filled"]


def test_rows_that_the_model_cannot_price_are_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """94 layers on pp 32 x vpp 3 leave a chunk without a layer; DualPipe needs two micro-batches a stage."""
    qwen3 = {"model": "Qwen3-235B-A22B", "layers": "94", "hidden": "4096", "experts": "128", "topk": "8",
             "moe_ffn": "1536", "pp": "32", "vpp": "3", "tp": "1", "num_gpus": "256",
             "global_batch": "1024"}  # fmt: skip
    (dualpipe,) = (dict(row.cells) for row in load() if row.cells["row_id"] == "dsv3-0012")
    path = write(
        tmp_path / "rows.csv", {}, qwen3 | {"row_id": "empty"}, dualpipe | {"global_batch": "128"}, {"row_id": "last"}
    )
    assert main(["published", "--rows", str(path), "--json"]) == 0
    rows = {row["row_id"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert "pp * vpp must not exceed the layers; got pp=32 vpp=3, model.layers=94" in rows["empty"]["refused"]
    assert "needs at least 2 pp = 32 micro-batches" in rows["dsv3-0012"]["refused"]
    assert all(rows[name]["predicted"] > 0 for name in ("row-1", "last"))


def test_predictors_are_plain_functions() -> None:
    asked: list[Request] = []

    def predict(request: Request) -> Outcome:
        asked.append(request)
        return steady(request)

    predictor: Predictor = predict
    judge([run_of(micro_batch="")], predictor)
    assert sorted(request.layout.micro_batch for request in asked) == [1, 2, 4, 8]


def test_any_mixture_of_odd_cells_gets_an_answer() -> None:
    """Shipped rows with cells replaced at random: each is judged or refused with a reason, none ends the command."""
    odd = ["", "0", "-3", "abc", "2 (weird)", "1e9", "999999999999", "7", "3.5", "not stated", "é", "1,2"]
    draw = random.Random(7)
    shipped = load()
    rows = []
    for row in draw.choices(shipped, k=150):
        changed = {name: draw.choice(odd) for name in draw.sample(COLUMNS, draw.randint(1, 6))}
        rows.append(PublishedRow.of(dict(row.cells) | changed))
    answers = document(judge(runs(rows), steady), "odd")["rows"]
    assert len(answers) == 150
    assert all((row["error_pct"] is None) == bool(row["refused"]) for row in answers)
    json.dumps(answers, allow_nan=False)
