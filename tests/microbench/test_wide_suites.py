"""The wide suites: shapes of a model, time boxes, link counters; exchanges on real ranks; and how a run is resumed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from piper_hpc.cluster.resume import finished
from piper_hpc.microbench.attention_block import attention_block_backward, attention_block_forward
from piper_hpc.microbench.box import TimeBox
from piper_hpc.microbench.compute_suite import ComputeSuite, cells_of
from piper_hpc.microbench.exchange_suite import MESSAGES, ExchangeSuite
from piper_hpc.microbench.exchanges import TorchBackend
from piper_hpc.microbench.groups import GroupFamily, pipeline_families
from piper_hpc.microbench.links import LinkCounter, counter_mismatch, link_counter, minimum_bytes
from piper_hpc.microbench.model_shapes import SEQUENCES, TOKENS, block_shape, matrices
from piper_hpc.microbench.rows import RowWriter
from piper_hpc.microbench.timing import Team
from piper_hpc.spec import Layout, ModelSpec, RankMap
from tests.processes import run_ranks

TINY = ModelSpec("tiny", 4, 128, 4, 2, 32, 8, 2, 128, 256)
MLA = ModelSpec(
    **{"name": "mla", "layers": 4, "hidden": 64, "heads": 4, "kv_heads": 4, "head_dim": 24, "experts": 8, "top_k": 2},
    **{"expert_ffn": 32, "vocab": 256, "attention": "mla", "q_lora_rank": 48, "kv_lora_rank": 32},
    **{"qk_nope_dim": 16, "qk_rope_dim": 8, "v_head_dim": 16},
)
CPU = torch.device("cpu")


def test_shapes_are_the_model_s_own() -> None:
    assert matrices(TINY) == {
        **{"qkv": (128, 4 * 32 + 2 * 2 * 32), "output": (128, 128), "router": (128, 8)},
        **{"expert_up": (128, 128), "expert_down": (128, 128), "head": (128, 256)},
    }
    # Every weight of attention is in one of its matrices.
    for model in (TINY, MLA):
        attention = [size for part, size in matrices(model).items() if part[:2] in ("qk", "qu", "la", "ou")]
        assert sum(k * n for k, n in attention) == model.attention_weights
    assert TOKENS[0] == 16 and TOKENS[-1] > 100_000
    grouped = cells_of(["grouped_gemm"], TINY, ranks=4)
    assert {cell.shape["experts"] for cell in grouped} == {2, 8}
    assert {cell.shape["tokens"] // cell.shape["experts"] for cell in grouped} == set(TOKENS)
    assert len({cell.key for cell in cells_of(["gemm", "attention"], TINY, 4)}) == len(
        cells_of(["gemm", "attention"], TINY, 4)
    )


def test_attention_is_measured_over_sequences_head_widths_and_heads() -> None:
    def measured(model: ModelSpec) -> set[tuple[int, ...]]:
        cells = [cell for cell in cells_of(["attention"], model, 1) if cell.operator == "attention_backward"]
        assert len({cell.part for cell in cells}) * len(SEQUENCES) == len(cells), "a time box for each width and heads"
        return {tuple(cell.shape[key] for key in ("heads", "kv_heads", "head_dim", "sequence")) for cell in cells}

    assert measured(TINY) == {
        (*heads, width, sequence) for heads in ((4, 2), (2, 1)) for width in (32, 64, 128) for sequence in SEQUENCES
    }
    wide = replace(TINY, heads=64, kv_heads=4, head_dim=128)
    assert {each[:2] for each in measured(wide)} == {(64, 4), (32, 2), (8, 1)}, "a rank has one head of keys at least"
    assert len(measured(wide)) == 3 * 2 * len(SEQUENCES)
    assert {each[:2] for each in measured(MLA)} == {(4, 4), (2, 2)}
    assert {each[:2] for each in measured(replace(TINY, heads=28, kv_heads=4))} == {(28, 4), (14, 2)}


@pytest.mark.parametrize("model", [TINY, MLA], ids=["gqa", "mla"])
@pytest.mark.parametrize("build", [attention_block_forward, attention_block_backward])
def test_attention_with_its_projections_is_right(model: ModelSpec, build: Any) -> None:
    torch.manual_seed(0)
    block = build(CPU, torch.float32, **block_shape(model, 16))
    assert block.correct
    assert block.work == 2 * 16 * model.attention_weights + 16**2 * (model.q_dim + model.v_dim)


def test_a_box_leaves_out_what_would_not_fit_and_says_so() -> None:
    box = TimeBox(cell_s=1.0)
    assert box.fits(1e12), "nothing is known of a first cell"
    box.add(1e6, 0.01)
    box.add(2e6, 0.02)
    assert box.fits(1e7) and not box.fits(2e7)
    assert "one call would take 0.2 s" in box.reason(2e7) and "task.cell_s=1" in box.reason(2e7)
    assert not TimeBox(cell_s=1.0, rate=1e9).fits(1e9)


RANKS = RankMap.block(Layout(dp=4), 2, (0, 0))


def test_neighbouring_stages_send_at_once() -> None:
    families = pipeline_families(RankMap.block(Layout(dp=8), 2, (0, 0, 1, 1)))
    assert families[1] == GroupFamily(2, "node", ((0, 1), (2, 3), (4, 5), (6, 7)))
    assert families[2] == GroupFamily(2, "rack", ((0, 2), (1, 3), (4, 6), (5, 7)))
    assert families[4] == GroupFamily(2, "system", ((0, 4), (1, 5), (2, 6), (3, 7)))
    assert pipeline_families(RankMap.block(Layout(dp=2), 2, (0,))) == {}


def test_what_must_cross_between_nodes() -> None:
    whole, pairs = GroupFamily(4, "rack", ((0, 1, 2, 3),)), GroupFamily(2, "rack", ((0, 2), (1, 3)))
    assert minimum_bytes("all_to_all", whole, 4000, RANKS) == 4 * 2 * 1000, "each rank sends two parts of four away"
    assert minimum_bytes("all_gather", whole, 4000, RANKS) == 4000
    assert minimum_bytes("all_reduce", whole, 4000, RANKS) == 8000
    assert minimum_bytes("p2p_concurrent", pairs, 1000, RANKS) == 4000, "two pairs, there and back"
    assert minimum_bytes("p2p", GroupFamily(2, "node", ((0, 1),)), 1000, RANKS) == 0


def test_a_row_whose_bytes_took_another_way_is_refused() -> None:
    # MPICH on the testbed without UCX_TLS=tcp,self: 0 bytes on eth0 where 25 MB were exchanged.
    assert "eth0 sent 0 bytes" in str(counter_mismatch("all_to_all", "eth0", 0, 25e6))
    assert counter_mismatch("all_to_all", "eth0", 26.5e6, 25e6) is None
    assert "others used the link" in str(counter_mismatch("all_to_all", "eth0", 80e6, 25e6))
    assert counter_mismatch("all_reduce", "eth0", 80e6, 25e6) is None, "only a lower bound is known of an all-reduce"
    assert counter_mismatch("all_to_all", "eth0", 80e3, 25e3) is None, "barriers are more than so few bytes"
    assert LinkCounter("lo").sent_bytes() >= 0
    assert link_counter("off", "cpu") is None and link_counter("hsn0", "cuda") == LinkCounter("hsn0")
    assert link_counter("auto", "cpu", {"GLOO_SOCKET_IFNAME": "eth0"}) == LinkCounter("eth0")
    assert link_counter("auto", "cpu", {}) is None and link_counter("auto", "cpu", {"GLOO_SOCKET_IFNAME": "lo"}) is None


def _suite(rows: list[dict[str, Any]], **options: Any) -> ExchangeSuite:
    ranks = RankMap.block(Layout(dp=dist.get_world_size()), 2, (0,) * (dist.get_world_size() // 2))
    book = RowWriter(Team(CPU), ranks, torch.float32, rows.append, ("n0", "n1"))
    return ExchangeSuite(book, TorchBackend(CPU, torch.float32), CPU, 0.1, **options)


def _measured_twice() -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of a suite, of the same suite resumed without one of them, and of one whose link saw nothing pass."""
    suites = ["p2p", "reduce_scatter", "all_gather"]
    first: list[dict[str, Any]] = []
    _suite(first).run(suites)
    everyone: list[Any] = [first]
    dist.broadcast_object_list(everyone, src=0)
    done = finished(everyone[0])
    done.pop("torch/all_gather/rack/4/4096", None)
    again: list[dict[str, Any]] = []
    resumed = _suite(again, done=done)
    resumed.run(suites)
    refused: list[dict[str, Any]] = []
    other = _suite(refused, counter=LinkCounter("lo"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LinkCounter, "sent_bytes", lambda self: 0)
        other.run(["p2p"])
    return first, again, refused


@pytest.fixture(scope="module")
def measured() -> Any:
    return run_ranks(4, _measured_twice)[0]


@pytest.mark.processes
@pytest.mark.alone
def test_every_exchange_is_right_on_every_kind_of_group(measured: Any) -> None:
    rows = measured[0]
    assert {row["operator"] for row in rows} == {
        *("p2p/node", "p2p/rack", "p2p_concurrent/node/1", "p2p_concurrent/rack/2"),
        *(f"{name}/{place}" for name in ("reduce_scatter", "all_gather") for place in ("node/2", "rack/2", "rack/4")),
    }
    for row in rows:
        assert row["correct"] and row["wrong"] == 0 and row["library"] == "gloo", row["cell"]
        assert len(row["samples_s"]) == row["n"] and row["p99_s"] <= row["max_s"] * 1.0001
    (row,) = (row for row in rows if row["cell"] == "torch/reduce_scatter/rack/4/1024")
    assert row["busbw_bytes_per_s"] == pytest.approx(3 / 4 * row["work"] / row["median_s"])
    assert row["nodes"] == ["n0", "n1"] and row["racks"] == ["0"]


@pytest.mark.processes
@pytest.mark.alone
def test_a_resumed_suite_measures_what_is_missing_alone(measured: Any) -> None:
    cells = {row["cell"] for row in measured[0]}
    assert "torch/all_gather/rack/4/4096" in cells
    again = {row["cell"] for row in measured[1]}
    # Beside it only cells that were left out before, where noise let one call seem too long.
    assert "torch/all_gather/rack/4/4096" in again and again & cells == {"torch/all_gather/rack/4/4096"}


@pytest.mark.processes
@pytest.mark.alone
def test_rows_that_the_link_did_not_see_are_marked(measured: Any) -> None:
    by_tier = {row["operator"]: row for row in measured[2]}
    assert by_tier["p2p/node"]["correct"] and "refused" not in by_tier["p2p/node"]
    assert by_tier["p2p/rack"]["correct"] is False and "lo sent 0 bytes" in by_tier["p2p/rack"]["refused"]
    assert not [row for row in finished(measured[2]).values() if row.get("refused")], "measured again when resumed"


def _computed() -> tuple[list[dict[str, Any]], dict[str, str]]:
    rows: list[dict[str, Any]] = []
    book = RowWriter(Team(CPU), RankMap.block(Layout(dp=1), 1, (0,)), torch.float32, rows.append)
    suite = ComputeSuite(book, CPU, cell_s=0.02, memory_bytes=64 * 2**20)
    suite.run(["grouped_gemm"], TINY)
    return rows, suite.left_out


@pytest.mark.processes
@pytest.mark.alone
def test_compute_cells_are_measured_or_left_out_with_a_reason() -> None:
    rows, left_out = run_ranks(1, _computed)[0]
    cells = {cell.key for cell in cells_of(["grouped_gemm"], TINY, 1)}
    assert {row["cell"] for row in rows} | set(left_out) == cells and rows and left_out
    assert not {row["cell"] for row in rows} & set(left_out)
    assert any("MiB" in reason for reason in left_out.values()), "tensors beyond a rank's memory"
    for row in rows:
        assert row["correct"] and row["flops_per_s"]["max"] >= row["flops_per_s"]["median"]


def test_sizes_reach_from_latency_to_bandwidth() -> None:
    assert MESSAGES["cpu"][0] == 1024 and MESSAGES["cpu"][-1] == 4 << 20
