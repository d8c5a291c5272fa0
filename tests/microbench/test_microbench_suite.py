"""The whole suite on real processes: rows as the contract has them, and numbers that follow the work."""

from __future__ import annotations

import json
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from piper_hpc.microbench import run
from piper_hpc.spec import Layout, RankMap

pytestmark = pytest.mark.processes

KEYS = {
    "benchmark_version", "operator", "work", "unit", "shape", "dtype", "n", "warmup", "iterations_per_sample",
    "median_s", "mean_s", "p5_s", "p95_s", "min_s", "max_s", "ranks", "nodes", "correct",
}  # fmt: skip
COMPUTE = {
    "gemm", "grouped_gemm", "attention_forward", "attention_backward", "elementwise", "adamw", "host_op",
}  # fmt: skip
DELAY_S = 0.004


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _measure(rank: int, world: int, port: int, out: str, budget_s: float, delayed: bool) -> None:
    torch.set_num_threads(1)
    if delayed:
        prompt = F.grouped_mm

        def late(*inputs: torch.Tensor, **options: torch.Tensor) -> torch.Tensor:
            time.sleep(DELAY_S)
            return prompt(*inputs, **options)

        F.grouped_mm = late
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),
    )
    ranks = RankMap.block(Layout(dp=world), ranks_per_node=2, rack_of_node=(0,) * (world // 2))
    with Path(out, f"rows-{rank}.jsonl").open("w") as file:
        run(
            ranks=ranks,
            device=torch.device("cpu"),
            dtype=torch.float32,
            budget_s=budget_s,
            on_row=lambda row: print(json.dumps(row), file=file),
            node_names=[f"n{node}" for node in range(world // 2)],
        )
    dist.barrier()
    dist.destroy_process_group()


def _rows(folder: Path, world: int, budget_s: float, delayed: bool = False) -> list[dict[str, Any]]:
    """Measure on `world` processes, two a node, and read rank 0's rows."""
    folder.mkdir()
    torch.multiprocessing.spawn(_measure, (world, _free_port(), str(folder), budget_s, delayed), nprocs=world)
    for rank in range(1, world):
        assert (folder / f"rows-{rank}.jsonl").read_text() == "", "only rank 0 writes rows"
    return [json.loads(line) for line in (folder / "rows-0.jsonl").read_text().splitlines()]


def _curve(rows: list[dict[str, Any]], operator: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["operator"] == operator]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return _rows(tmp_path_factory.mktemp("suite") / "four", world=4, budget_s=3.0)


def test_every_operator_is_measured_under_its_name(rows: list[dict[str, Any]]) -> None:
    exchanges = {"p2p/node", "p2p/rack"} | {
        f"{name}/{place}" for name in ("all_to_all", "all_reduce") for place in ("node/2", "rack/2", "rack/4")
    }
    assert {row["operator"] for row in rows} == COMPUTE | exchanges


def test_rows_have_the_contract_s_keys_and_are_right(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) >= KEYS, row["operator"]
        assert row["correct"] is True, row["operator"]
        assert row["n"] >= 3 and row["dtype"] == "float32"
        assert 0 < row["min_s"] <= row["p5_s"] <= row["median_s"] <= row["p95_s"] <= row["max_s"]
        if row["operator"] in COMPUTE:
            assert row["ranks"] == [0, 1, 2, 3] and row["nodes"] == ["n0", "n1"]


def test_exchange_rows_name_group_tier_and_bus_bandwidth(rows: list[dict[str, Any]]) -> None:
    factor = {"p2p/rack": 1.0, "all_to_all/rack/4": 3 / 4, "all_reduce/rack/4": 2 * 3 / 4}
    for operator, expected in factor.items():
        for row in _curve(rows, operator):
            assert row["unit"] == "bytes" and row["tier"] == "rack"
            assert row["group_size"] == (2 if operator.startswith("p2p") else 4)
            assert row["busbw_bytes_per_s"] == pytest.approx(row["work"] / row["median_s"] * expected)
    assert _curve(rows, "all_to_all/node/2")[0]["concurrent_groups"] == 2
    assert _curve(rows, "p2p/rack")[0]["ranks"] == [0, 2]


def test_more_work_takes_longer(rows: list[dict[str, Any]]) -> None:
    for operator in {row["operator"] for row in rows}:
        curve = _curve(rows, operator)
        assert [row["work"] for row in curve] == sorted(row["work"] for row in curve)
        if curve[-1]["work"] >= 64 * curve[0]["work"]:
            assert curve[-1]["median_s"] > curve[0]["median_s"], operator


def test_a_slowed_operator_shows_in_its_rows_alone(tmp_path: Path) -> None:
    prompt = _rows(tmp_path / "prompt", world=2, budget_s=2.0)
    late = _rows(tmp_path / "late", world=2, budget_s=2.0, delayed=True)
    smallest = _curve(late, "grouped_gemm")[0]["median_s"]
    assert smallest > DELAY_S > 4 * _curve(prompt, "grouped_gemm")[0]["median_s"]
    assert _curve(late, "gemm")[0]["median_s"] < DELAY_S / 4


def _refuse(rank: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
    common: dict[str, Any] = {"device": torch.device("cpu"), "on_row": print}
    alone, pair = (RankMap.block(Layout(dp=n), 2, (0,)) for n in (1, 2))
    messages = []
    for wrong in (
        {"ranks": alone, "dtype": torch.float64, "budget_s": 1.0},
        {"ranks": pair, "dtype": torch.float32, "budget_s": 1.0},
        {"ranks": alone, "dtype": torch.float32, "budget_s": 0.0},
    ):
        with pytest.raises(ValueError) as error:
            run(**common, **wrong)
        messages.append(str(error.value))
    Path(out).write_text("\n".join(messages))
    dist.destroy_process_group()


def test_bad_input_is_refused_with_a_value_that_works(tmp_path: Path) -> None:
    out = tmp_path / "messages"
    torch.multiprocessing.spawn(_refuse, (_free_port(), str(out)), nprocs=1)
    dtype, ranks, budget = out.read_text().splitlines()
    assert "torch.float64" in dtype and "use torch.float32" in dtype
    assert "holds 2 ranks, the process group 1" in ranks
    assert "budget_s=0.0" in budget and "7" in budget
