"""Training that moves experts by itself: what it records, what it leaves alone, and how it survives and goes on."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from piper_hpc.balance.balancer import Migration
from piper_hpc.parallel import migration as moving
from piper_hpc.runs.checkpoints import Sidecar, newest
from piper_hpc.spec import Layout, ModelSpec, RankMap, Workload
from piper_hpc.spec.migration import MigrationPrices, MigrationSettings
from piper_hpc.train.data import ByteDataset
from piper_hpc.train.loop import train
from piper_hpc.train.settings import TrainSettings
from tests.processes import run_ranks

MODEL = ModelSpec(
    "tiny", layers=2, hidden=32, heads=2, kv_heads=1, head_dim=16, experts=16, top_k=4, expert_ffn=64, vocab=64
)
LAYOUT = Layout(ep=4, micro_batch=2)
WORKLOAD = Workload(global_batch=16, sequence=32)
STEPS, EVERY = 12, 2
CHEAP, DEAR = (MigrationPrices(4, 4, row_s=1e-4, expert_s=expert_s) for expert_s in (1e-5, 1e3))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "bytes.bin"
    np.random.default_rng(1).integers(0, MODEL.vocab, 9000, dtype=np.uint8).tofile(path)
    return path


def run(
    corpus: Path,
    routing: str | None,
    prices: MigrationPrices | None,
    *,
    layout: Layout = LAYOUT,
    checkpoints: Path | None = None,
    resume_from: Path | None = None,
    killed_rank: int | None = None,
    every: int = EVERY,
) -> list[dict[str, Any]]:
    """On one rank: the rows of a run, on rank 0; a rank that is killed dies in the middle of its first move."""
    rank_map = RankMap.block(layout, layout.ranks, (0,))
    place = rank_map.places[dist.get_rank()]
    data = ByteDataset(
        corpus, sequence=32, global_batch=16, dense_dp=layout.dense_dp, place=place, ep=layout.ep, seed=3
    )
    exchange, rows = moving._exchange, []

    def die(*arguments: Any) -> int:
        sent = exchange(*arguments)
        if dist.get_rank() == killed_rank and sent:
            os._exit(9)
        return sent

    with patch.object(moving, "_exchange", side_effect=die):
        train(
            MODEL,
            layout,
            WORKLOAD,
            TrainSettings(steps=STEPS, routing=routing, checkpoint_every=2, collective_timeout_s=10.0),
            rank_map=rank_map,
            device=torch.device("cpu"),
            data=data,
            migration=None if prices is None else Migration(MigrationSettings("auto", every, 1.1), prices),
            checkpoint_dir=checkpoints,
            resume_from=resume_from,
            on_step=rows.append,
        )
    return rows


@pytest.mark.processes
def test_a_hot_rank_is_spread_and_the_row_says_so(corpus: Path) -> None:
    stayed, moved, dear = (run_ranks(4, run, corpus, "W2", prices)[0] for prices in (None, CHEAP, DEAR))
    told = {row["step"]: row["migration"] for row in moved if "migration" in row}
    (first, *_) = told
    assert first == 2 * EVERY - 1 and told[first]["migrated"]
    assert told[first]["moved"] > 0 and told[first]["bytes"] > 0 and told[first]["seconds"] > 0
    # Each move carries three matrices of an expert and both moments of each, in float32.
    assert told[first]["bytes"] == told[first]["moved"] * 3 * MODEL.expert_parameters * 4
    before, after = (max(moved[step]["rank_load"]) for step in (first, first + 1))
    assert before > 2 and after <= 1.1 * told[first]["bound"] < 1.6
    assert [row["loss"] for row in moved] == [row["loss"] for row in stayed]
    assert [row["grad_norm"] for row in moved] == [row["grad_norm"] for row in stayed]
    assert [row["expert_load"] for row in moved] == [row["expert_load"] for row in stayed]
    assert "migration" not in stayed[first] and "routed" not in stayed[first]
    assert [len(row["routed"]) for row in moved if "routed" in row] == [MODEL.layers] * (STEPS // EVERY)
    looks = [row["migration"] for row in dear if "migration" in row]
    assert looks and not any(look["migrated"] or look["bytes"] for look in looks)


@pytest.mark.processes
def test_a_rank_killed_in_the_middle_of_a_move_loses_nothing_beyond_the_last_checkpoint(
    corpus: Path, tmp_path: Path
) -> None:
    undisturbed = run_ranks(4, run, corpus, "W2", None)[0]
    with pytest.raises(RuntimeError):
        run_ranks(4, run_killed, corpus, tmp_path)
    found = newest(tmp_path)
    assert found is not None
    sidecar = Sidecar.read(found)
    assert 0 < sidecar.step <= 2 * EVERY and sidecar.rank_of_expert == []
    rest = run_ranks(4, resumed, corpus, tmp_path, LAYOUT)[0]
    assert [row["loss"] for row in rest] == [row["loss"] for row in undisturbed[sidecar.step :]]
    # That run has moved experts: who goes on from it begins with them where they were, or at another layout in order.
    late = tmp_path / "step-00000010"
    assert [len(ranks) for ranks in Sidecar.read(late).rank_of_expert] == [MODEL.experts] * MODEL.layers
    again = run_ranks(4, resumed, corpus, late, LAYOUT)[0]
    assert [row["loss"] for row in again] == [row["loss"] for row in undisturbed[10:]]
    assert all(max(row["rank_load"]) < 1.6 for row in again)
    other = run_ranks(4, resumed, corpus, late, Layout(pp=2, ep=2, micro_batch=2))[0]
    assert [row["loss"] for row in other] == pytest.approx([row["loss"] for row in undisturbed[10:]], rel=1e-5)


def run_killed(corpus: Path, checkpoints: Path) -> None:
    run(corpus, "W2", CHEAP, checkpoints=checkpoints, killed_rank=2)


def resumed(corpus: Path, checkpoints: Path, layout: Layout) -> list[dict[str, Any]]:
    return run(corpus, "W2", CHEAP, layout=layout, checkpoints=checkpoints, resume_from=newest(checkpoints))


@pytest.mark.processes
def test_rotating_and_even_loads_move_nothing(corpus: Path) -> None:
    for routing in ("W0", "W6", None):
        rows = run_ranks(4, every_four, corpus, routing)[0]
        assert not any(row.get("migration", {}).get("migrated") for row in rows), routing


def every_four(corpus: Path, routing: str | None) -> list[dict[str, Any]]:
    return run(corpus, routing, MigrationPrices(4, 4, 1e-6, 1e-3), every=4)


@pytest.mark.processes
def test_forced_routing_is_the_same_where_layers_run_again(corpus: Path) -> None:
    """Whole layers ask for their routing twice, and several micro-batches are under way at once."""
    layouts = [Layout(pp=2, ep=2, micro_batch=2, recompute=recompute) for recompute in ("none", "full")]
    kept, again = (run_ranks(4, with_layout, corpus, layout)[0] for layout in layouts)
    for name in ("loss", "grad_norm", "expert_load"):
        assert [row[name] for row in kept] == [row[name] for row in again], name


def with_layout(corpus: Path, layout: Layout) -> list[dict[str, Any]]:
    return run(corpus, "W2", None, layout=layout)
