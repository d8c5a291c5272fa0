"""The whole suite on real processes: rows as the contract has them, and numbers that follow the work."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

from piper_hpc.microbench import suite
from piper_hpc.microbench.arrival_skew import time_arrival_skew
from piper_hpc.microbench.operator import Operator
from piper_hpc.microbench.overhead import neighbour_exchange, time_overhead
from piper_hpc.microbench.rows import RowWriter
from piper_hpc.microbench.shapes import CPU
from piper_hpc.microbench.suite import run
from piper_hpc.microbench.timing import Budget, Team, time_compute, time_exchange
from piper_hpc.spec import Layout, RankMap
from tests.processes import run_ranks

pytestmark = [pytest.mark.processes, pytest.mark.alone]

KEYS = {
    "benchmark_version", "operator", "work", "unit", "shape", "dtype", "n", "warmup", "iterations_per_sample",
    "median_s", "mean_s", "p5_s", "p95_s", "min_s", "max_s", "statistic", "ranks", "nodes", "correct",
}  # fmt: skip
COMPUTE = {
    "gemm", "grouped_gemm", "attention_forward", "attention_backward", "elementwise", "activation", "norm",
    "router", "dispatch_rows", "combine_rows", "gather", "sort", "adamw", "host_op",
}  # fmt: skip
COLLECTIVES = "all_to_all", "all_reduce", "all_gather"
SKEWS = {"skew/node/2", "skew/rack/4"}
"""Skew follows the size of a group: each size on its nearest tier."""
OVERHEADS = {"overhead/node", "overhead/rack"}
DELAY_S = 0.004
DELAY_S_PER_BYTE = 1e-7


def _late(call: Callable[..., Any], delay_s: Callable[..., float]) -> Callable[..., Any]:
    def wrapped(*inputs: Any, **options: Any) -> Any:
        time.sleep(delay_s(*inputs))
        return call(*inputs, **options)

    return wrapped


def _measure(budget_s: float, slowed: str | None = None) -> list[dict[str, Any]]:
    """The rows that this rank is given, on two ranks a node, with one operator slowed down."""
    slow = {
        "grouped_gemm": (F, "grouped_mm", lambda rows, weights: DELAY_S),
        "all_to_all": (dist, "all_to_all_single", lambda received, sent: sent.nbytes * DELAY_S_PER_BYTE),
    }
    nodes = dist.get_world_size() // 2
    rows: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        if slowed is not None:
            module, name, delay_s = slow[slowed]
            patch.setattr(module, name, _late(getattr(module, name), delay_s))
        run(
            ranks=RankMap.block(Layout(dp=2 * nodes), ranks_per_node=2, rack_of_node=(0,) * nodes),
            device=torch.device("cpu"),
            dtype=torch.float32,
            budget_s=budget_s,
            on_row=rows.append,
            node_names=[f"n{node}" for node in range(nodes)],
        )
    return rows


def _curve(rows: list[dict[str, Any]], operator: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["operator"] == operator]


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    first, *others = run_ranks(4, _measure, 3.0)
    assert others == [[], [], []], "only rank 0 is given rows"
    return list(json.loads(json.dumps(first)))


def test_every_operator_is_measured_under_its_name(rows: list[dict[str, Any]]) -> None:
    exchanges = {"p2p/node", "p2p/rack"} | {
        f"{name}/{place}" for name in COLLECTIVES for place in ("node/2", "rack/2", "rack/4")
    }
    assert {row["operator"] for row in rows} == COMPUTE | exchanges | SKEWS | OVERHEADS


def test_rows_have_the_contract_s_keys_and_are_right(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert set(row) >= KEYS, row["operator"]
        assert row["correct"] is True, row["operator"]
        assert row["n"] >= 3 and row["dtype"] == "float32"
        assert row["statistic"] == ("mean" if row["operator"] in SKEWS else "median")
        assert row["operator"] in SKEWS | OVERHEADS or row["min_s"] > 0  # those are differences of times
        assert row["min_s"] <= row["p5_s"] <= row["median_s"] <= row["p95_s"] <= row["max_s"]
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
    for operator in COMPUTE:
        curves: dict[int, list[dict[str, Any]]] = {}
        for row in _curve(rows, operator):
            shape = row["shape"]
            rows_per_expert = shape["tokens"] // shape["experts"] if operator == "grouped_gemm" else 0
            curves.setdefault(rows_per_expert, []).append(row)
        for curve in curves.values():
            assert [row["work"] for row in curve] == sorted(row["work"] for row in curve)
            assert curve[-1]["median_s"] > curve[0]["median_s"], operator


def test_exchanges_say_how_long_their_ranks_compute_nothing(rows: list[dict[str, Any]]) -> None:
    exchanges = [row for row in rows if row["operator"].split("/")[0] in ("p2p", *COLLECTIVES)]
    assert exchanges and all(0 <= row["idle_s"] <= row["max_s"] for row in exchanges)
    assert not any("idle_s" in row for row in rows if row["operator"] in COMPUTE)


def test_skew_is_measured_over_what_busy_ranks_compute(rows: list[dict[str, Any]]) -> None:
    for operator in sorted(SKEWS):
        curve = _curve(rows, operator)
        assert [row["unit"] for row in curve] == ["seconds"] * len(CPU.arrival_skew)
        assert [row["work"] for row in curve] == sorted(row["work"] for row in curve)
        per_gemm_s = [row["work"] / row["shape"]["gemms"] for row in curve]
        assert max(per_gemm_s) == pytest.approx(min(per_gemm_s))
        assert curve[0]["ranks"] == [0, 1, 2, 3] and curve[0]["together_s"] > 0


def _overhead(busy_s: float) -> float:
    """Usual seconds that a message costs two ranks whose sends and receives also compute for `busy_s`."""
    team, values = Team(torch.device("cpu")), torch.ones(4096)
    post, wrong = neighbour_exchange(1 - dist.get_rank(), 256, team.device, torch.float32)

    def slow_post() -> Any:
        started = time.perf_counter()
        while time.perf_counter() - started < busy_s:
            values.mul_(1.0)
        return post()

    timing = time_overhead(lambda: time.sleep(1e-3), 1e-3, slow_post if busy_s else post, team, 1.0)
    assert wrong == 0
    return float(np.median(timing.samples))


def _compute_with_pauses(cores_per_rank: float | None) -> float:
    """Usual seconds of a call that computes for DELAY_S and sleeps for as long."""
    team = Team(torch.device("cpu"), cores_per_rank)

    def call() -> None:
        until = time.process_time() + DELAY_S
        while time.process_time() < until:
            pass
        time.sleep(DELAY_S)

    return float(np.median(time_compute(call, team, 1.0).samples))


def _unit_of_a_rank_that_is_stopped(budget_s: float) -> float:
    """Mean seconds of the gemm that skew is counted in, where every 24th call waits as under a quota: 0.1 ms, and 8 ms
    every 2.4 ms."""
    team, calls = Team(torch.device("cpu")), itertools.count(1)

    def gemm() -> None:
        time.sleep(8e-3 if next(calls) % 24 == 0 else 4e-5)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "build", lambda *_: Operator("flops", 1.0, gemm, True))
        writer = RowWriter(team, RankMap.block(Layout(), 1, (0,)), torch.float32, lambda row: None)
        return suite._Suite(writer, team.device, CPU, Budget(budget_s, 100)).time_smallest_gemm()[1]


def test_the_unit_of_skew_is_measured_over_whole_periods_of_a_quota_whatever_the_budget() -> None:
    long = run_ranks(1, _unit_of_a_rank_that_is_stopped, 60.0)[0]
    assert run_ranks(1, _unit_of_a_rank_that_is_stopped, 0.02)[0] == pytest.approx(long, rel=0.3)


def test_where_ranks_share_cores_a_call_is_what_it_computes() -> None:
    """Others that pause must not make an operator look quicker than it is while all are busy."""
    assert run_ranks(1, _compute_with_pauses, 0.5)[0] == pytest.approx(2 * DELAY_S, rel=0.25)
    assert run_ranks(1, _compute_with_pauses, None)[0] > 1.8 * DELAY_S


def test_what_a_message_takes_from_computing_shows_as_its_overhead() -> None:
    """Up to three tries: a machine that does something else for a second answers wrongly once."""
    tries = []
    for _ in range(3):
        tries.append(tuple(run_ranks(2, _overhead, busy_s)[0] for busy_s in (DELAY_S, 0.0)))
        busy, free = tries[-1]
        if busy - free == pytest.approx(DELAY_S, rel=0.4) and abs(free) < DELAY_S / 2:
            return
    pytest.fail(f"(with, without) a delay of {DELAY_S} s: {tries}")


def test_a_transfer_that_compute_hides_is_no_overhead() -> None:
    assert abs(run_ranks(2, _hidden_transfer)[0]) < DELAY_S / 4


def _hidden_transfer() -> float:
    """Usual overhead of messages that take DELAY_S to arrive, and nobody's core."""
    team = Team(torch.device("cpu"))

    class Arriving:
        def __init__(self) -> None:
            self.there_s = time.perf_counter() + DELAY_S

        def wait(self) -> None:
            time.sleep(max(0.0, self.there_s - time.perf_counter()))

    timing = time_overhead(lambda: time.sleep(1e-3), 1e-3, lambda: [Arriving()], team, 1.0)  # type: ignore[list-item]
    return float(np.median(timing.samples))


def _skew(late_s: float) -> list[float]:
    """The usual extra seconds of each rank in an exchange of two, to which rank 1 comes `late_s` after rank 0."""
    team, values = Team(torch.device("cpu")), torch.zeros(8)
    exchange, wait_s = (lambda: dist.all_reduce(values)), 0.001 + late_s * dist.get_rank()
    together = np.median(time_exchange(exchange, team, 0.3).samples)
    timing = time_arrival_skew(lambda: time.sleep(wait_s), exchange, float(together), team, 0.5)
    return [float(seconds) for seconds in np.median(timing.samples, axis=1)]


def test_a_rank_that_comes_late_shows_as_skew_of_those_it_keeps_waiting() -> None:
    late_s = 5 * DELAY_S
    early, late = run_ranks(2, _skew, late_s)[0]
    assert early == pytest.approx(late_s, rel=0.5)
    assert late < late_s / 4, "the late rank itself waits for nobody"
    assert max(run_ranks(2, _skew, 0.0)[0]) < late_s / 4


def test_a_slowed_operator_shows_in_its_rows_alone() -> None:
    prompt = run_ranks(2, _measure, 1.0)[0]
    late = run_ranks(2, _measure, 1.0, "grouped_gemm")[0]
    smallest = _curve(late, "grouped_gemm")[0]["median_s"]
    assert smallest > DELAY_S > 4 * _curve(prompt, "grouped_gemm")[0]["median_s"]
    assert _curve(late, "gemm")[0]["median_s"] < DELAY_S / 4


def test_slow_links_take_longer_for_more_and_end_their_curve_early() -> None:
    curve = _curve(run_ranks(2, _measure, 1.0, "all_to_all")[0], "all_to_all/node/2")
    assert [row["median_s"] >= row["work"] * DELAY_S_PER_BYTE for row in curve] == [True] * len(curve)
    assert [row["median_s"] for row in curve] == sorted(row["median_s"] for row in curve)
    assert 2 <= len(curve) < len(CPU.messages["all_to_all"]), "messages that do not fit the budget are left out"


def _refusals() -> list[str]:
    alone, pair = (RankMap.block(Layout(dp=n), 2, (0,)) for n in (1, 2))
    messages = []
    for ranks, dtype, budget_s in (
        (alone, torch.float64, 1.0),
        (pair, torch.float32, 1.0),
        (alone, torch.float32, 0.0),
    ):
        with pytest.raises(ValueError) as error:
            run(ranks=ranks, device=torch.device("cpu"), dtype=dtype, budget_s=budget_s, on_row=print)
        messages.append(str(error.value))
    return messages


def test_bad_input_is_refused_with_a_value_that_works() -> None:
    ((dtype, ranks, budget),) = run_ranks(1, _refusals)
    assert "torch.float64" in dtype and "use torch.float32" in dtype
    assert "holds 2 ranks, the process group 1" in ranks
    assert "budget_s=0.0" in budget and "7" in budget
