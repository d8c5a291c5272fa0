"""Operators: their work, and checks that notice a wrong result."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn import functional as F

from piper_hpc.comm import flat_plan
from piper_hpc.microbench.operators import build
from piper_hpc.microbench.shapes import CPU, KIB, MIB
from piper_hpc.microbench.timing import SamplingPlan

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(CPU.compute))
def test_every_operator_is_right_on_its_first_call(name: str, dtype: torch.dtype) -> None:
    assert build(name, CPU.compute[name][1], DEVICE, dtype).correct


def test_work_is_counted_by_the_written_conventions() -> None:
    def work(name: str, **shape: int) -> float:
        return build(name, shape, DEVICE, torch.float32).work

    assert work("gemm", m=8, n=16, k=32) == 2 * 8 * 16 * 32
    assert work("grouped_gemm", experts=4, tokens=64, hidden=32, ffn=16) == 2 * 64 * 32 * 16
    # b = 2, s = 16, q_dim = 4 * 8: scores and values, half by causality
    for name in ("attention_forward", "attention_backward"):
        assert work(name, batch=2, heads=4, sequence=16, head_dim=8) == 2 * 2 * 16**2 * 32
    assert work("elementwise", elements=1000) == 3 * 1000 * 4
    assert work("activation", elements=1000) == 2 * 1000 * 4
    assert work("norm", tokens=64, hidden=128) == 2 * 64 * 128 * 4
    assert work("router", tokens=64, experts=8, top_k=2) == 64 * 8
    for name in ("dispatch_rows", "combine_rows"):
        assert work(name, tokens=64, hidden=32, experts=8, top_k=2) == 64 * 2 * 32 * 4
    assert work("gather", rows=64, hidden=32) == 2 * 64 * 32 * 4
    assert work("sort", values=1000) == 1000
    assert work("adamw", parameters=4096, tensors=4) == 4096
    assert work("host_op", operations=64) == 64


def test_work_ascends_along_each_grid() -> None:
    for name, shapes in CPU.compute.items():
        curves: dict[int, list[float]] = {}
        for shape in shapes:
            rows_per_expert = shape["tokens"] // shape["experts"] if name == "grouped_gemm" else 0
            curves.setdefault(rows_per_expert, []).append(build(name, shape, DEVICE, torch.float32).work)
        assert all(work == sorted(work) for work in curves.values()), name


def test_calls_go_round_memory_that_no_cache_holds() -> None:
    operator = build("activation", {"elements": 64 * KIB}, DEVICE, torch.float32)
    results: list[torch.Tensor] = []
    with monitored_silu(results):
        for _ in range(40):
            operator.call()
    inputs = [each.data_ptr() for each in results]
    # 16 MiB over 512 KiB a call, read and written, are 32 tensors; then the first comes again.
    assert len(set(inputs[:32])) == 32
    assert inputs[32:] == inputs[:8]


def test_large_operands_need_no_ring() -> None:
    results: list[torch.Tensor] = []
    operator = build("activation", {"elements": 4 * MIB}, DEVICE, torch.float32)
    with monitored_silu(results):
        operator.call()
        operator.call()
    assert results[0].data_ptr() == results[1].data_ptr()


@contextmanager
def monitored_silu(inputs: list[torch.Tensor]) -> Iterator[None]:
    """Keep the inputs of every `silu`."""
    right = F.silu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(F, "silu", lambda values: (inputs.append(values), right(values))[1])
        yield


def test_a_wrong_grouped_gemm_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.grouped_mm

    def wrong(rows: torch.Tensor, weights: torch.Tensor, *, offs: torch.Tensor) -> torch.Tensor:
        return right(rows, weights.flip(0), offs=offs)  # every token meets another expert

    monkeypatch.setattr(F, "grouped_mm", wrong)
    assert not build("grouped_gemm", CPU.compute["grouped_gemm"][0], DEVICE, torch.float32).correct


def test_attention_that_is_not_causal_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *inputs, is_causal, **other: right(*inputs))
    assert not build("attention_forward", CPU.compute["attention_forward"][0], DEVICE, torch.float32).correct


@pytest.mark.parametrize("name", ["attention_forward", "attention_backward"])
def test_heads_that_share_their_keys_meet_their_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"batch": 2, "heads": 4, "kv_heads": 2, "sequence": 16, "head_dim": 8}
    assert build(name, shape, DEVICE, torch.float32).correct
    right = F.scaled_dot_product_attention

    def wrong(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **other: bool) -> torch.Tensor:
        return right(query, key, value.flip(1), **other)  # the keys of another group of heads

    monkeypatch.setattr(F, "scaled_dot_product_attention", wrong)
    assert not build(name, shape, DEVICE, torch.float32).correct


def test_a_router_that_chooses_the_smallest_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = torch.Tensor.topk

    def wrong(values: torch.Tensor, count: int, dim: int) -> object:
        return right(values, count, dim=dim, largest=values.dtype == torch.float64)

    monkeypatch.setattr(torch.Tensor, "topk", wrong)
    assert not build("router", CPU.compute["router"][0], DEVICE, torch.float32).correct


def test_a_dispatch_that_loses_the_order_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flat_plan, "inverse", lambda order: order)
    for name in ("dispatch_rows", "combine_rows"):
        assert not build(name, CPU.compute[name][0], DEVICE, torch.float32).correct


def test_effort_fills_its_share_and_keeps_enough_samples() -> None:
    quick = SamplingPlan.plan(iteration_s=1e-5, share_s=1.0, least=3)
    assert quick.sample_s == pytest.approx(0.03) and quick.iterations * 1e-5 >= 0.03
    assert 3 <= quick.samples * quick.sample_s / 0.03 <= 1.0 / 0.03
    slow = SamplingPlan.plan(iteration_s=0.5, share_s=0.1, least=3)
    assert (slow.samples, slow.iterations) == (3, 1)
    small = SamplingPlan.plan(iteration_s=1e-4, share_s=0.04, least=3)
    assert small.samples >= 3 and small.sample_s * (1 + small.samples) <= 0.04


def test_a_router_whose_choices_tie_is_right_whichever_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda gate: torch.nn.init.zeros_(gate.weight))
    assert build("router", CPU.compute["router"][0], DEVICE, torch.float32).correct
