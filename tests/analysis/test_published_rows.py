"""Published rows: every shipped one is read, numbers are in SI units, and odd files end with a clear message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from analysis.validation.published.fill import fill
from analysis.validation.published.metrics import COMPONENT, MEMORY, STATUS, TIME, UNKNOWN, UnknownUnit, in_si, quantity
from analysis.validation.published.names import DEVICES, device, family, framework, schedule
from analysis.validation.published.request import Refused
from analysis.validation.published.rows import COLUMNS, load, runs
from piper_hpc.paths import data_folder
from piper_hpc.report.load import UsageError
from tests.analysis.published_rows import run_of, write


def test_the_shipped_file_has_322_rows_of_191_runs() -> None:
    rows = load()
    found = runs(rows)
    assert (len(rows), len({row.row_id for row in rows}), len(found)) == (322, 322, 191)
    assert sum(len(run.rows) for run in found) == 322
    assert sum(run.moe for run in found) == 125
    assert sum(run.moe and run.fully_stated for run in found) == 65


def test_every_shipped_metric_and_unit_is_known() -> None:
    rows = load()
    assert {row.cells["metric"] for row in rows if row.problem} == {"normalized_throughput"}
    kinds = [row.quantity.kind for row in rows]
    assert {kind: kinds.count(kind) for kind in (TIME, MEMORY, COMPONENT, STATUS, UNKNOWN)} == {
        TIME: 197, MEMORY: 54, COMPONENT: 58, STATUS: 9, UNKNOWN: 4
    }  # fmt: skip
    assert all(row.out_of_memory for row in rows if row.quantity.kind == STATUS)
    assert all(row.value is None or row.value > 0 for row in rows)


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (50, "%", 0.5),
        (12, "ms", 0.012),
        (2, "GiB", 2 * 2**30),
        (2, "GB", 2e9),
        (458, "TFLOP/s", 458e12),
        (458, "TFLOPS/GPU", 458e12),
        (10.44, "PFLOP/s", 10.44e15),
        (7600, "tok/s/GPU", 7600),
        (7.6, "ktokens/s/GPU", 7600),
        (864, "B tokens/day", 1e7),
        (25, "GiB (percent of 192)", 48 * 2**30),
        (1.125, "GiB (printed GB)", 1.125 * 2**30),
    ],
)
def test_units_are_normalised(value: float, unit: str, expected: float) -> None:
    assert in_si(value, unit) == pytest.approx(expected)


def test_an_unknown_unit_is_named() -> None:
    with pytest.raises(UnknownUnit, match="furlong"):
        in_si(1, "furlong")
    (row,) = run_of(unit="furlong").rows
    assert row.value is None and "unit=furlong" in row.problem


def test_the_unit_tells_what_a_rate_is_of() -> None:
    assert quantity("throughput", "tokens/s").name == "tokens_per_s"
    assert quantity("throughput", "tokens/s/GPU").name == "tokens_per_s_per_gpu"
    assert quantity("throughput", "samples/s").name == "sequences_per_s"
    assert quantity("iteration_time", "s").name == "step_time_s"
    assert (quantity("hw_tflops_per_gpu", "TFLOP/s").convention, quantity("mfu_causal", "%").convention) == (
        "hardware",
        "causal",
    )


@pytest.mark.parametrize(
    ("text", "number"),
    [("2 (DualPipe)", 2), ("interleaved (degree not stated)", None), ("not stated per row", None), ("15,360", 15360),
     ("4.0", 4), ("4.5", None), ("", None), ("-1", None)],
)  # fmt: skip
def test_numbers_in_text(text: str, number: int | None) -> None:
    assert run_of(vpp=text).number("vpp") == number


@pytest.mark.parametrize(
    ("column", "text", "number"),
    [
        ("seq", "4k", 4096), ("seq", "8K", 8192), ("seq", "128k", 131072), ("seq", "4096 tokens", 4096),
        ("seq", "1M", 2**20), ("seq", "4.1k", None), ("seq", "1e9", None), ("seq", "1,2", None),
        ("global_batch", "16M tokens", 4096), ("global_batch", "4194304 tokens", 1024), ("global_batch", "4M", 1024),
        ("global_batch", "62.9M tokens", None), ("global_batch", "1024 (4M tokens)", 1024),
        ("global_batch", "2304 samples", 2304), ("num_gpus", "2k", 2048), ("num_gpus", "1.5k", 1536),
        ("num_gpus", "64 GPUs", 64), ("num_gpus", "64xH100", 64), ("num_gpus", "64 H100 SXM", 64),
        ("num_gpus", "16 nodes", None), ("num_gpus", "8x8", None), ("tp", "8-way", 8), ("experts", "256 routed", 256),
    ],
)  # fmt: skip
def test_a_number_is_read_whole_or_not_at_all(column: str, text: str, number: int | None) -> None:
    assert run_of(**{column: text}).number(column) == number


def test_a_batch_in_tokens_needs_the_sequence_length() -> None:
    assert run_of(global_batch="16M tokens", seq="").number("global_batch") is None


@pytest.mark.parametrize(
    ("metric", "unit", "name"),
    [
        ("throughput", "TFLOP/s/GPU", "flops_per_s_per_gpu"),
        ("throughput per GPU (TFLOP/s/GPU)", "", "flops_per_s_per_gpu"),
        ("throughput", "PFLOP/s", "flops_per_s"), ("throughput", "seq/s/GPU", "sequences_per_s_per_gpu"),
        ("samples", "samples/s", "sequences_per_s"),
        ("throughput", "tokens per second per GPU", "tokens_per_s_per_gpu"),
        ("tok/s/device", "", "tokens_per_s_per_gpu"), ("tokens/sec/GPU", "tokens/sec/GPU", "tokens_per_s_per_gpu"),
        ("TGS", "", "tokens_per_s_per_gpu"), ("throughput", "it/s", "steps_per_s"),
        ("iteration latency", "ms", "step_time_s"),
        ("time per batch", "s", "step_time_s"), ("elapsed time per iteration (ms)", "", "step_time_s"),
        ("hbm", "GiB", "peak_memory_allocated"), ("max memory", "GB", "peak_memory_allocated"),
        ("peak_mem", "GiB/GPU", "peak_memory_allocated"), ("mfu", "", "mfu"),
    ],
)  # fmt: skip
def test_names_and_units_agree_on_what_is_measured(metric: str, unit: str, name: str) -> None:
    assert quantity(metric, unit).name == name
    assert not run_of(metric=metric, unit=unit).rows[0].problem


@pytest.mark.parametrize(
    ("metric", "unit", "reason"),
    [
        ("step_time", "TFLOP/s", r"must be a time \(s, ms\) for metric=step_time"),
        ("mfu", "TFLOP/s", "must be a share"),
        ("tokens_per_s", "TFLOP/s", "must be a rate of tokens"),
        ("step_time", "days", "unit=days: must be a time of a step"),
        ("step_time", "h", "unit=h: must be"), ("step_time", "", r"unit=\(empty\): must be a time"),
        ("hbm bandwidth", "GB/s", "unit=GB/s"), ("forward time", "ms", "is relative, a part or unknown"),
    ],
)  # fmt: skip
def test_a_name_that_its_unit_contradicts_is_refused(metric: str, unit: str, reason: str) -> None:
    (row,) = run_of(metric=metric, unit=unit).rows
    assert row.value is None and re.search(reason, row.problem)


def test_a_bare_mfu_above_one_is_percent() -> None:
    values = [run_of(metric="mfu", value=value, unit="").rows[0].value for value in ("45", "0.45", "45%")]
    assert values == pytest.approx([0.45] * 3)
    assert "at most the whole peak" in run_of(metric="mfu", value="145", unit="%").rows[0].problem


@pytest.mark.parametrize(
    ("gpu", "expected"),
    [
        ("MI250X GCD (Frontier)", ("mi250x_gcd", "frontier")),
        ("A100-40GB", ("a100_40gb", "dgx_a100")),
        ("A100-80GB (Selene)", ("a100_80gb", "dgx_a100")),
        ("NVIDIA H100 80GB HBM3", ("h100", "dgx_h100")),
        ("H800", ("h800", "h800")),
        ("B200-SXM", ("b200", "b200")),
        ("GB200 NVL72", ("gb200", "gb200_nvl72")),
        ("GH200 (Alps)", ("gh200", "alps")),
        ("AMD Instinct MI355X", ("mi355x", "mi355x")),
        ("8xH100", ("h100", "dgx_h100")),
        ("64xH100 SXM", ("h100", "dgx_h100")),
        ("DGX-H100", ("h100", "dgx_h100")),
        ("H-100", ("h100", "dgx_h100")),
        ("DGXB200", ("b200", "b200")),
        ("A100 SXM4 80GB", ("a100_80gb", "dgx_a100")),
        ("A100-80GB (40 nodes)", ("a100_80gb", "dgx_a100")),
        ("MI300X OAM", ("mi300x", "mi325x")),
    ],
)
def test_a_gpu_names_its_accelerator_and_cluster(gpu: str, expected: tuple[str, str]) -> None:
    assert device(gpu) == (*expected, "")


@pytest.mark.parametrize(
    ("gpu", "accelerator", "taken"),
    [
        ("A800", "a100_80gb", "NVLink, cut"),
        ("B300", "b200", "B300 is taken as B200"),
        ("GB300 NVL72", "gb200", "GB300 is taken as GB200"),
        ("H100 PCIe", "h100", "H100 SXM"),
        ("MI350X", "mi355x", "clocks higher"),
    ],
)
def test_a_near_device_is_taken_and_told(gpu: str, accelerator: str, taken: str) -> None:
    assert device(gpu)[0] == accelerator and taken in device(gpu)[2]
    assert taken in fill(run_of(gpu=gpu))[0].filled["accelerator"]


def test_every_known_device_has_its_files() -> None:
    for _, accelerator, cluster, _ in DEVICES:
        assert (data_folder("conf") / "accelerator" / f"{accelerator}.yaml").is_file()
        assert (data_folder("conf") / "cluster" / f"{cluster}.yaml").is_file()


@pytest.mark.parametrize("gpu", ["", "V100", "8-GPU node (type not stated)", "H20", "MI308X", "TPU v5p", "Hopper"])
def test_an_unknown_gpu_is_refused(gpu: str) -> None:
    with pytest.raises(Refused, match=r"gpu=.*: must name one of .*h100"):
        device(gpu)


def test_families_have_no_sizes() -> None:
    names = {row.cells["model"]: family(row.cells["model"]) for row in load()}
    assert names["Qwen2-57B-A14B"] == "Qwen2"
    assert names["GPT 22B single layer"] == names["MT-NLG 530B"] == names["GPT-3 175B"] == "GPT"
    assert names["DeepSeek-V2 (cut to 4 layers, 1 dense)"] == "DeepSeek-V2"
    assert names["X-MoE Small-SR"] == "X-MoE"


def test_schedules_and_frameworks_come_from_words() -> None:
    assert schedule(run_of(vpp="2 (DualPipe)"))[0] == "dualpipev"
    assert schedule(run_of(vpp="", notes="schedule=ZBB"))[0] == "zb_h1"
    assert schedule(run_of(vpp="2 (ZBV)"))[0] == "zbv"
    assert schedule(run_of(vpp="3"))[0] == ""
    with pytest.raises(Refused, match="schedule=v-half"):
        schedule(run_of(notes="schedule=V-half"))
    assert framework(run_of(notes="method=FSDP+EP; peak 989.5")) == ("fsdp", "FSDP+EP")
    assert framework(run_of(notes="system=Tutel")) == ("deepspeed", "Tutel")
    assert framework(run_of())[0] == "megatron"


def test_rows_of_one_run_are_grouped_and_notes_keep_runs_apart(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.csv",
        {"row_id": "a"},
        {"row_id": "b", "metric": "mfu", "value": "40", "unit": "%"},
        {"row_id": "c", "notes": "system=other"},
    )
    assert [[row.row_id for row in run.rows] for run in runs(load(path))] == [["a", "b"], ["c"]]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="must be a readable CSV file"):
        load(tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match="lacks gpu, notes"):
        load(write(tmp_path / "a.csv", columns=tuple(name for name in COLUMNS if name not in ("gpu", "notes"))))
    with pytest.raises(UsageError, match="at least one row"):
        load(write(tmp_path / "b.csv"))
    binary = tmp_path / "c.csv"
    binary.write_bytes(b"\xff\xfe\x00row_id")
    with pytest.raises(UsageError, match="UTF-8"):
        load(binary)
